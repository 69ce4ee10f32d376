"""ResNet-18 to 152 over deferred activations, with torchvision's state_dict and three variants of
the details.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fusedres._tensors import stored_format
from fusedres.deferred import Deferred
from fusedres.models.stages import build_stages, maps_taken
from fusedres.models.variants import VARIANTS, check_counts, check_flags, check_middle, details_of
from fusedres.models.weights import WeightsLike, load_weights, read_weights
from fusedres.nn.blocks import (
    MEMORY,
    BasicBlock,
    ConvBlock,
    FusedModule,
    IdentityBlock,
    as_tensor,
    call,
    packed,
    set_memory,
    takes_deferred,
)
from fusedres.nn.frames import FromPixels
from fusedres.nn.init import Initializer, resolve
from fusedres.nn.layers import apply_conv_bn, apply_stem, plain_reason

__all__ = [
    "VARIANTS",
    "FusedResNet50",
    "ResNet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]


class ResNet(FusedModule):
    """A ResNet of any depth; use FusedResNet50 or resnet18() to resnet152(), which explain the
    arguments.

    Attributes:
        num_classes: outputs of the classifier; 0 without one.
        num_features: channels of the last stage's map.
        feature_info: for the stem, before its max pool, and each stage {"num_chs": channels,
            "reduction": by which factor its map is smaller than the image, "module": its name}, in
            the order of forward_intermediates.
        from_pixels: a fusedres.nn.FromPixels that comes before the stem, in a network that takes
            pixels (`from_keras` makes such); else None.
    """

    from_pixels: FromPixels | None
    _unpooled = False  # whether forward_head leaves the map as it is

    def __init__(
        self,
        depth: int,
        num_classes: int = 1000,
        *,
        variant: str = "torchvision",
        weights: WeightsLike | None = None,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        groups: int = 1,
        width_per_group: int = 64,
        zero_init_residual: bool = False,
        in_channels: int = 3,
        memory: str = "exact",
        **overrides: Any,
    ) -> None:
        super().__init__()
        owner, basic = f"resnet{depth}", depth < 50
        details = details_of(owner, basic, variant, overrides)
        check_counts(owner, {"num_classes": num_classes, "in_channels": in_channels})
        flags = {"zero_init_residual": zero_init_residual, "stride_in_1x1": details.stride_in_1x1}
        check_flags(owner, flags)
        dilate = check_middle(owner, basic, replace_stride_with_dilation, groups, width_per_group)
        if memory not in MEMORY:
            raise ValueError(
                f"resnet{depth}: memory must be 'exact' or 'recompute', got {memory!r}"
            )
        fill = resolve(details.initializer)
        given = None if weights is None else read_weights(owner, weights)
        self.variant = variant
        # a function is not kept: models are pickled
        self._initializer = (
            details.initializer if isinstance(details.initializer, str) else "kaiming_normal"
        )
        self.register_module("from_pixels", None)  # the first child, as it is the first to run
        norm = {"eps": details.eps, "momentum": details.momentum}
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        fill(self.conv1.weight)
        self.bn1 = nn.BatchNorm2d(64, **norm)  # type: ignore[arg-type]
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, details.stem_pool_padding)
        channels, stem = 64, {"num_chs": 64, "reduction": 2, "module": "relu"}
        self.feature_info: list[dict[str, Any]] = [stem]
        stages = build_stages(depth, channels, details, dilate, groups, width_per_group)
        for i, (stage, channels, reduction) in enumerate(stages, 1):
            info = {"num_chs": channels, "reduction": reduction, "module": f"layer{i}"}
            self.feature_info.append(info)
            setattr(self, f"layer{i}", stage)
        self.num_features, self.num_classes = channels, num_classes
        self.avgpool: nn.Module = nn.AdaptiveAvgPool2d(1)
        self.fc = self._classifier(num_classes, details.initializer)
        if zero_init_residual:
            self._zero_init_residual()
        if given is not None:
            load_weights(owner, self, given)
        set_memory(self, memory)

    def op_of(self, conv: str) -> str:
        return "conv_bn_relu_maxpool"  # of the stem; blocks have their own

    def units(self) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
        yield "conv1", self.conv1, "bn1", self.bn1

    def plain_reason(self) -> str | None:
        """Why the stem runs as plain modules, or None. Blocks answer for themselves."""
        return (
            super().plain_reason()
            or plain_reason(self.relu, "relu", nn.ReLU)
            or plain_reason(self.maxpool, "maxpool", nn.MaxPool2d)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] -> logits [N, num_classes].

        Any memory format; channels_last is the fast one. H and W from 32 up for every variant.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] -> the last stage's map [N, num_features, h, w].

        The map has the dtype that the network computes in; it is in x's memory format, on a GPU in
        channels_last, as it is behind from_pixels.
        """
        x = self._input(x)
        with packed(self, x):
            return self._run(self._stem(x), self._stages(), {})

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """A map [N, num_features, h, w] -> logits [N, num_classes]: what comes after the stages.

        Args:
            features: of forward_features, any dtype that fc takes, any memory format.
            pre_logits: return what enters the classifier, [N, num_features].

        Returns:
            The logits; without a classifier the pooled features, without a pool the map.
        """
        pooled: Tensor = self.avgpool(features)
        if not self._unpooled:
            pooled = pooled.flatten(1)
        return pooled if pre_logits else self.fc(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of the stem and the stages on the way, as detectors want them.

        Args:
            x: images [N, in_channels, H, W].
            indices: which of the five in feature_info, 0 being the stem before its max pool; an int
                for the last so many, negative ones in a sequence count from the end, None for all.
                Asked for index 0 the stem runs its max pool by itself.
            norm: accepted, for callers that serve other networks too; nothing comes of it.
            stop_early: run no stage beyond the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.

        Returns:
            (the last map, the list) or the list: maps [N, num_chs, H / reduction, W / reduction]
            in the order of the network, each once, in x's memory format and the dtype that the
            network computes in.

        Raises:
            TypeError, ValueError: indices that are no such ints or out of range, or another
                output_fmt, named.
        """
        if output_fmt != "NCHW":
            raise ValueError(
                f"forward_intermediates: output_fmt must be 'NCHW', got {output_fmt!r}"
            )
        taken = maps_taken(indices, len(self.feature_info))
        stages = self._stages()[: max(taken)] if stop_early else self._stages()
        kept: dict[int, Tensor | None] = dict.fromkeys(sorted(taken))
        x = self._input(x)
        with packed(self, x):
            if 0 in kept:
                kept[0] = self._stem_map(x)
                last = self._run(self.maxpool(kept[0]), stages, kept)
            else:
                last = self._run(self._stem(x), stages, kept)
        stored = stored_format(x)
        maps = [m.contiguous(memory_format=stored) for m in kept.values() if m is not None]
        return maps if intermediates_only else (last.contiguous(memory_format=stored), maps)

    def get_classifier(self) -> nn.Module:
        """The last layer, fc: nn.Linear, or nn.Identity where there are no classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new last layer in, initialised as the constructor does (by nn.Linear's own where
        that was given a function).

        It is on the device and in the dtype of the other parameters, and wants gradients. An
        optimizer knows the old layer's parameters only: make it afterwards.

        Args:
            num_classes: its outputs; 0 for none: forward then gives the pooled features.
            global_pool: None to leave the pool as it is, "avg", or "" for none (with 0 classes):
                forward then gives the map.

        Raises:
            ValueError: an argument out of range or of the wrong type, named; nothing has changed.
        """
        owner = "reset_classifier"
        check_counts(owner, {"num_classes": num_classes}, least=0)
        if global_pool not in (None, "avg", ""):
            raise ValueError(f"{owner}: global_pool must be None, 'avg' or '', got {global_pool!r}")
        unpooled = self._unpooled if global_pool is None else global_pool == ""
        if unpooled and num_classes > 0:
            raise ValueError(
                f"{owner}: num_classes must be 0 where nothing is pooled, got {num_classes}; or "
                "give global_pool='avg'"
            )
        fc = self._classifier(num_classes, self._initializer, next(self.parameters()))
        self.fc = fc.train(self.training)
        self.num_classes = num_classes
        if global_pool is not None:
            self.avgpool = nn.Identity() if unpooled else nn.AdaptiveAvgPool2d(1)
            self.avgpool.train(self.training)
            self._unpooled = unpooled

    @torch.no_grad()
    def _classifier(
        self, num_classes: int, initializer: Initializer, like: Tensor | None = None
    ) -> Any:
        """A new last layer, beside a parameter: nn.Linear, for no classes nn.Identity."""
        if num_classes == 0:
            return nn.Identity()
        place = {} if like is None else {"device": like.device, "dtype": like.dtype}
        fc = nn.Linear(self.num_features, num_classes, **place)  # type: ignore[arg-type]
        if initializer != "kaiming_normal":  # torchvision leaves fc to nn.Linear
            resolve(initializer)(fc.weight)
            nn.init.zeros_(fc.bias)
        return fc

    def _input(self, x: Tensor) -> Tensor:
        return x if self.from_pixels is None else self.from_pixels(x)

    def _stages(self) -> list[nn.Module]:
        return [self.get_submodule(f"layer{i}") for i in range(1, 5)]

    def _run(
        self, x: Tensor, stages: Sequence[nn.Module], kept: dict[int, Tensor | None]
    ) -> Tensor:
        """The stages one after the other; `kept` gets the maps of those it has, 1 the first."""
        h: Tensor | Deferred = x
        for i, stage in enumerate(stages, 1):
            hands_over = i not in kept and i < len(stages) and takes_deferred(stages[i])
            h = call(stage, h, defer=hands_over)
            if i in kept:
                kept[i] = as_tensor(h)
        return as_tensor(h)

    def _stem(self, x: Tensor) -> Tensor:
        if self.runs_plainly():
            return self.maxpool(self._stem_map(x))
        return apply_stem(x, self.conv1, self.bn1, self.maxpool)

    def _stem_map(self, x: Tensor) -> Tensor:
        """What the stem's max pool reads; fused, it is never in memory."""
        if self.runs_plainly():
            return self.relu(self.bn1(self.conv1(x)))
        return apply_conv_bn(x, self.conv1, self.bn1).value()

    def _zero_init_residual(self) -> None:
        """Let every block start as its shortcut."""
        for block in self.modules():
            if isinstance(block, IdentityBlock | ConvBlock):
                nn.init.zeros_(block.bn3.weight)
            elif isinstance(block, BasicBlock):
                nn.init.zeros_(block.bn2.weight)


class FusedResNet50(ResNet):
    """ResNet-50 whose training step runs on fused ops; a drop-in for torchvision's resnet50.

    Its state_dict has torchvision's keys and shapes; its convolutions and BatchNorms are plain
    nn.Conv2d and nn.BatchNorm2d.

    Args:
        num_classes: outputs of the last layer.
        variant:
            "torchvision": v1.5, stride in the 3x3, eps 1e-5, momentum 0.1, padded max pool, Kaiming
                normal convolutions, nn.Linear's own initialiser for fc;
            "keras": Keras Applications, stride in the first 1x1, eps 1.001e-5, momentum 0.01,
                padded max pool, Glorot uniform, fc bias 0;
            "coursera": stride in the first 1x1, eps 1e-3, momentum 0.01, max pool without padding,
                Glorot uniform, fc bias 0.
        weights: what to load, strictly: the path of a .pt, .pth (read without executing anything in
            it) or .safetensors file; a state_dict, also under "state_dict" or "model", also with
            "module." in front of every name; or a member of torchvision's weights enums, which
            downloads. None: start anew.
        replace_stride_with_dilation: three bools, for layer2 to layer4: keep the map's size and
            dilate the 3x3 instead. None: none.
        groups, width_per_group: of each 3x3, which has 64 planes * width_per_group / 64 * groups
            channels in layer1: 32 and 4 make a ResNeXt-50 32x4d, 1 and 128 a Wide ResNet-50-2.
        zero_init_residual: start the last BatchNorm of each block at zero weight.
        in_channels: channels of the images.
        memory: "exact", or "recompute": the outputs of the last convolution and of the projection
            of each block are not kept for backward, but computed again there. Gradients stay the
            same (in half types up to the rounding of the projection before it is added).
        **overrides: any of stride_in_1x1, eps, momentum, stem_pool_padding, initializer, in place
            of the variant's; for initializer see fusedres.nn.init.resolve, a callable is kept for
            reset_classifier. The same torch.manual_seed gives the same bits.

    Raises:
        ValueError, TypeError: an argument out of range, of the wrong type or unknown, named;
            weights that are damaged, want more than tensors, or do not fit the network.
        OSError (FileNotFoundError among them), ImportError, RuntimeError: weights that cannot be
            read; a .safetensors file without that package; a download that failed.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2015.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        variant: str = "torchvision",
        weights: WeightsLike | None = None,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        groups: int = 1,
        width_per_group: int = 64,
        zero_init_residual: bool = False,
        in_channels: int = 3,
        memory: str = "exact",
        **overrides: Any,
    ) -> None:
        super().__init__(
            50,
            num_classes,
            variant=variant,
            weights=weights,
            replace_stride_with_dilation=replace_stride_with_dilation,
            groups=groups,
            width_per_group=width_per_group,
            zero_init_residual=zero_init_residual,
            in_channels=in_channels,
            memory=memory,
            **overrides,
        )

    @classmethod
    def from_keras(
        cls,
        path: str | os.PathLike[str],
        *,
        variant: str | None = None,
        preprocess: str | None = None,
        **options: Any,
    ) -> Self:
        """A network with the weights of a ResNet-50 that Keras saved; arguments, result and errors
        as those of fusedres.models.from_keras. ValueError also where the file has another depth.
        """
        from fusedres.models.keras import convert  # which stands on this module

        found = convert(path, variant=variant, preprocess=preprocess, options=options, cls=cls)
        return cast(Self, found.model)


def resnet18(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-18 of basic blocks; arguments as FusedResNet50's. ValueError: stride_in_1x1=True, it
    has no 1x1; other groups than 1, another width_per_group than 64, dilation.
    """
    return ResNet(18, num_classes, **options)


def resnet34(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-34 of basic blocks; arguments as FusedResNet50's. ValueError: stride_in_1x1=True, it
    has no 1x1; other groups than 1, another width_per_group than 64, dilation.
    """
    return ResNet(34, num_classes, **options)


def resnet50(num_classes: int = 1000, **options: Any) -> FusedResNet50:
    """FusedResNet50, by torchvision's name for it."""
    return FusedResNet50(num_classes, **options)


def resnet101(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-101 of bottlenecks; arguments as FusedResNet50's."""
    return ResNet(101, num_classes, **options)


def resnet152(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-152 of bottlenecks; arguments as FusedResNet50's."""
    return ResNet(152, num_classes, **options)
