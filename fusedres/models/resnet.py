"""ResNet-18 to 152 over deferred activations, with torchvision's state_dict and three variants of
the details.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from fusedres.deferred import Deferred
from fusedres.nn.blocks import (
    BasicBlock,
    ConvBlock,
    FusedModule,
    IdentityBlock,
    Stage,
    as_tensor,
    call,
    packed,
    takes_deferred,
)
from fusedres.nn.init import Initializer, resolve
from fusedres.nn.layers import apply_stem, plain_reason


@dataclass(frozen=True)
class Variant:
    """The details in which published ResNets differ."""

    stride_in_1x1: bool  # of a stage's first block: in its first 1x1, or in the 3x3
    eps: float
    momentum: float | None  # in torch's sense: the weight of the new batch
    stem_pool_padding: int
    initializer: Initializer


VARIANTS = {
    "torchvision": Variant(False, 1e-5, 0.1, 1, "kaiming_normal"),
    "keras": Variant(True, 1.001e-5, 0.01, 1, "glorot_uniform"),
    "coursera": Variant(True, 1e-3, 0.01, 0, "glorot_uniform"),
}
_DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_WIDTHS = (64, 128, 256, 512)


class ResNet(FusedModule):
    """A ResNet of any depth; use FusedResNet50 or resnet18() to resnet152(), which explain the
    arguments.
    """

    op = "conv_bn_relu_maxpool"  # of the stem; blocks have their own

    def __init__(
        self,
        depth: int,
        num_classes: int = 1000,
        *,
        variant: str = "torchvision",
        zero_init_residual: bool = False,
        in_channels: int = 3,
        memory: str = "exact",
        **overrides: Any,
    ) -> None:
        super().__init__()
        details = _details(f"resnet{depth}", depth < 50, variant, overrides)
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                raise ValueError(
                    f"resnet{depth}: {name} must be a positive int below 2**31, got {value!r}"
                )
        for name, flag in (
            ("zero_init_residual", zero_init_residual),
            ("stride_in_1x1", details.stride_in_1x1),
        ):
            if not isinstance(flag, bool):
                raise TypeError(f"resnet{depth}: {name} must be a bool, got {flag!r}")
        if memory != "exact":
            raise ValueError(f"resnet{depth}: memory must be 'exact', got {memory!r}")
        self.variant = variant
        fill = resolve(details.initializer)
        norm = {"eps": details.eps, "momentum": details.momentum}
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        fill(self.conv1.weight)
        self.bn1 = nn.BatchNorm2d(64, **norm)  # type: ignore[arg-type]
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, details.stem_pool_padding)
        channels = 64
        for i, (width, blocks) in enumerate(zip(_WIDTHS, _DEPTHS[depth], strict=True)):
            stage, channels = _stage(depth, channels, width, blocks, 1 if i == 0 else 2, details)
            setattr(self, f"layer{i + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        if details.initializer != "kaiming_normal":  # torchvision leaves fc to nn.Linear
            fill(self.fc.weight)
            nn.init.zeros_(self.fc.bias)
        if zero_init_residual:
            self._zero_init_residual()

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
        with packed(self, x):
            h: Tensor | Deferred = self._stem(x)
            stages = [self.get_submodule(f"layer{i}") for i in range(1, 5)]
            for i, stage in enumerate(stages):
                hands_over = i + 1 < len(stages) and takes_deferred(stages[i + 1])
                h = call(stage, h, defer=hands_over)
            pooled: Tensor = self.avgpool(as_tensor(h))
        return self.fc(pooled.flatten(1))

    def _stem(self, x: Tensor) -> Tensor:
        if self.runs_plainly():
            return self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return apply_stem(x, self.conv1, self.bn1, self.maxpool)

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
        zero_init_residual: start the last BatchNorm of each block at zero weight.
        in_channels: channels of the images.
        memory: "exact".
        **overrides: any of stride_in_1x1, eps, momentum, stem_pool_padding, initializer, in place
            of the variant's; for initializer see fusedres.nn.init.resolve. The same
            torch.manual_seed gives the same bits.

    Raises:
        ValueError, TypeError: an argument out of range, of the wrong type or unknown, named.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2015.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        variant: str = "torchvision",
        zero_init_residual: bool = False,
        in_channels: int = 3,
        memory: str = "exact",
        **overrides: Any,
    ) -> None:
        super().__init__(
            50,
            num_classes,
            variant=variant,
            zero_init_residual=zero_init_residual,
            in_channels=in_channels,
            memory=memory,
            **overrides,
        )


def resnet18(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-18 of basic blocks; arguments as FusedResNet50's. stride_in_1x1=True: ValueError, it
    has no 1x1.
    """
    return ResNet(18, num_classes, **options)


def resnet34(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-34 of basic blocks; arguments as FusedResNet50's. stride_in_1x1=True: ValueError, it
    has no 1x1.
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


def _details(owner: str, basic: bool, variant: str, overrides: dict[str, Any]) -> Variant:
    """The variant with overrides in place, checked."""
    if variant not in VARIANTS:
        accepted = ", ".join(map(repr, VARIANTS))
        raise ValueError(f"{owner}: variant: got {variant!r}, accepted: {accepted}")
    accepted_names = [f.name for f in fields(Variant)]
    for name in overrides:
        if name not in accepted_names:
            raise TypeError(
                f"{owner}: unknown argument {name!r}; overrides are {', '.join(accepted_names)}"
            )
    if basic and overrides.get("stride_in_1x1"):
        raise ValueError(f"{owner}: stride_in_1x1=True, but a basic block has no 1x1 convolution")
    details = replace(VARIANTS[variant], **overrides)
    if details.stem_pool_padding not in (0, 1):
        raise ValueError(
            f"{owner}: stem_pool_padding must be 0 or 1, got {details.stem_pool_padding!r}"
        )
    return details


def _stage(
    depth: int, channels: int, width: int, blocks: int, stride: int, details: Variant
) -> tuple[Stage, int]:
    """One stage and the number of channels that leave it."""
    common: dict[str, Any] = {
        "eps": details.eps,
        "momentum": details.momentum,
        "initializer": details.initializer,
    }
    if depth < 50:
        first: nn.Module = BasicBlock(channels, width, stride, **common)
        rest = [BasicBlock(width, width, **common) for _ in range(blocks - 1)]
        return Stage(first, *rest), width
    filters = (width, width, 4 * width)
    first = ConvBlock(channels, filters, 3, stride, stride_in_1x1=details.stride_in_1x1, **common)
    others = [IdentityBlock(4 * width, filters, **common) for _ in range(blocks - 1)]
    return Stage(first, *others), 4 * width
