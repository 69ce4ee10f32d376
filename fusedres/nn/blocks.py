"""Residual blocks over deferred activations.

Every block maps Tensor -> Tensor. Within a ResNet, `Stage` and the model also hand a Deferred from
one block straight to the next (`defer=True`), where nothing between them needs a Tensor; a hook on
a block or a stage, a foreign module or a forward of one's own turns it into a Tensor there.
"""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres import backends
from fusedres._tensors import memory_format_of, stored_format
from fusedres.deferred import Deferred
from fusedres.nn.init import Initializer, resolve
from fusedres.nn.layers import (
    apply_conv_bn,
    by_hook,
    has_hooks,
    is_pointwise,
    is_untouched,
    plain_reason,
    same_padding,
    sampling,
    taps_of,
)
from fusedres.ops import _contract as contract
from fusedres.ops._contract import autocast_on, compute_dtype, exporting
from fusedres.ops._packed import packed_weights, packing


def as_tensor(x: Tensor | Deferred) -> Tensor:
    """The value of either."""
    return x.value() if isinstance(x, Deferred) else x


def as_stored(x: Tensor | Deferred) -> Tensor:
    """The tensor that is in memory."""
    return x.y if isinstance(x, Deferred) else x


def in_format_of(out: Tensor, x: Tensor | Deferred) -> Tensor:
    """out in the memory format that the caller's x came in."""
    if isinstance(x, Deferred) or stored_format(x) == memory_format_of(x):
        return out
    return out.contiguous(memory_format=stored_format(x))


class FusedModule(nn.Module, ABC):
    """A module that fuses its convolutions and BatchNorms in its own forward, or calls them as they
    are.

    Attributes:
        fused: set to False to run this module's own children plainly; blocks within have their own.
        memory: "exact", or "recompute": the output of the last convolution of each branch of a
            block is not kept for backward, but computed again there.
    """

    fused: bool = True
    memory: str = "exact"
    _warned: bool = False

    def runs_plainly(self) -> bool:
        """Whether this call is to be that of plain modules; warns once where a hook is the reason.

        A graph that is recorded for elsewhere is one of plain modules.
        """
        if exporting():
            return True
        reason = self.plain_reason()
        hooked = reason is not None and by_hook(reason)
        if hooked and not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}: {reason}, so its children run as plain modules; "
                "fusedres.report(model) shows which parts do",
                stacklevel=3,
            )
        return reason is not None

    def accepts_deferred(self) -> bool:
        """Whether it may be handed a Deferred."""
        return False

    def op_of(self, conv: str) -> str:
        """Which op of fusedres runs that convolution."""
        return "conv_bn"

    @abstractmethod
    def units(self) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
        """Convolution and BatchNorm pairs, with their names."""

    def plain_reason(self) -> str | None:
        """Why the children run as plain modules; None where they are fused."""
        if not self.fused:
            return "fused is set to False"
        for conv_name, conv, bn_name, bn in self.units():
            reason = plain_reason(conv, conv_name, nn.Conv2d) or plain_reason(
                bn, bn_name, nn.BatchNorm2d
            )
            if reason is not None:
                return reason
        return None


class _Block(FusedModule):
    """A fused module that maps an activation to an activation, fused or plainly."""

    def forward(self, x: Tensor | Deferred, *, defer: bool = False) -> Tensor | Deferred:
        """[N, C, H, W] -> [N, K, OH, OW] in x's memory format.

        Args:
            x: a Tensor; a Deferred where the caller hands one over.
            defer: return a Deferred where the block ends in one.
        """
        if self.runs_plainly():
            return self._forward_plain(as_tensor(x))
        out = self._forward_fused(x)
        return out if defer else in_format_of(as_tensor(out), x)

    @abstractmethod
    def _forward_fused(self, x: Tensor | Deferred) -> Tensor | Deferred:
        """The children's fused ops; what it returns is still deferred, or not kept."""

    @abstractmethod
    def _forward_plain(self, x: Tensor) -> Tensor:
        """The children as they are, called one by one."""

    def _in_place(self) -> bool:
        """Whether plain ReLU and add run in place as torchvision's: on what a BatchNorm gave, that
        no hook wants to keep.
        """
        norms = all(isinstance(bn, nn.BatchNorm2d) for _, _, _, bn in self.units())
        return not self.fused and norms and not any(map(has_hooks, self.modules()))


class ConvBNReLU(_Block):
    """Convolution, BatchNorm and (unless relu=False) ReLU. Children: conv, bn; the convolution has
    no bias.

    Args:
        in_channels, out_channels: channels of the input [N, C, H, W] and the output [N, K, OH, OW].
        kernel_size, stride, padding: as nn.Conv2d takes them.
        relu: whether to end in ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        relu: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _check_positive(name, "in_channels", in_channels)
        _check_positive(name, "out_channels", out_channels)
        contract.check_pair(name, "kernel_size", kernel_size, 1)
        contract.check_pair(name, "stride", stride, 1)
        if not isinstance(padding, str):
            contract.check_pair(name, "padding", padding, 0)
        contract.check_bool(name, "relu", relu)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = relu
        resolve("kaiming_normal")(self.conv.weight)

    def units(self) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
        yield "conv", self.conv, "bn", self.bn

    def _forward_fused(self, x: Tensor | Deferred) -> Deferred:
        return apply_conv_bn(x, self.conv, self.bn, relu=self.relu)

    def _forward_plain(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return F.relu(out, self._in_place()) if self.relu else out


class _ResidualBlock(_Block):
    """conv1 .. convN with their BatchNorms, and `downsample` (a convolution and its BatchNorm) or
    None.
    """

    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    downsample: nn.Sequential | None
    depth: int

    def units(self) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
        for i in range(1, self.depth + 1):
            yield f"conv{i}", getattr(self, f"conv{i}"), f"bn{i}", getattr(self, f"bn{i}")
        if self.downsample is not None:
            yield "downsample.0", self.downsample[0], "downsample.1", self.downsample[1]

    def plain_reason(self) -> str | None:
        down = self.downsample
        if down is not None and not (
            type(down) is nn.Sequential and len(down) == 2 and is_untouched(down)
        ):
            return "downsample is not a plain pair of convolution and BatchNorm"
        return super().plain_reason()

    def conv_padding(self, i: int) -> tuple[int, int, int, int] | None:
        """Padding of conv<i> where the module cannot say it: (top, bottom, left, right)."""
        return None

    def _forward_fused(self, x: Tensor | Deferred) -> Tensor | Deferred:
        if isinstance(x, Deferred) and not is_pointwise(self.conv1):
            x = x.value()
        emit: Any = (self.downsample and sampling(x, self.downsample[0])) or True  # type: ignore[arg-type]
        h, a = apply_conv_bn(x, self.conv1, self.bn1, padding=self.conv_padding(1), emit=emit)
        shortcut = a
        recompute = self.memory == "recompute"
        if self.downsample is not None:
            pair: Any = self.downsample
            conv, bn = pair
            shortcut = apply_conv_bn(a, conv, bn, relu=False, recompute=recompute)
        for i in range(2, self.depth + 1):
            last = i == self.depth
            h = apply_conv_bn(
                h,
                getattr(self, f"conv{i}"),
                getattr(self, f"bn{i}"),
                padding=self.conv_padding(i),
                residual=shortcut if last else None,
                recompute=recompute and last,
            )
        return h

    def _forward_plain(self, x: Tensor) -> Tensor:
        h, in_place = x, self._in_place()
        for i in range(1, self.depth + 1):
            padding = self.conv_padding(i)
            if padding is not None:
                top, bottom, left, right = padding
                h = F.pad(h, (left, right, top, bottom))
            h = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(h))
            if i < self.depth:
                h = F.relu(h, in_place)
        shortcut = x if self.downsample is None else self.downsample(x)
        h = h.add_(shortcut) if in_place else h + shortcut
        return F.relu(h, in_place)


class _Bottleneck(_ResidualBlock):
    """1x1, kxk, 1x1 with `filters` output channels each."""

    depth = 3

    def __init__(
        self,
        in_channels: int,
        filters: Sequence[int],
        kernel_size: int,
        stride: int,
        stride_in_1x1: bool,
        project: bool,
        eps: float,
        momentum: float | None,
        initializer: Initializer,
        groups: int,
        dilation: int,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _check_positive(name, "in_channels", in_channels)
        _check_positive(name, "kernel_size", kernel_size)
        _check_positive(name, "stride", stride)
        _check_positive(name, "groups", groups)
        _check_positive(name, "dilation", dilation)
        contract.check_bool(name, "stride_in_1x1", stride_in_1x1)
        if not isinstance(filters, tuple | list) or len(filters) != 3:
            raise ValueError(f"{name}: filters must be (F1, F2, F3), got {filters!r}")
        for f in filters:
            _check_positive(name, "filters", f)
        f1, f2, f3 = filters
        if f1 % groups or f2 % groups:
            raise ValueError(
                f"{name}: groups must divide filters F1 {f1} and F2 {f2}, got {groups}"
            )
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        both = dilation * (kernel_size - 1)  # the padding of two sides
        # nn.Conv2d pads both sides alike, or "same" at stride 1; what it cannot say the block pads
        # itself
        padding: int | str = both // 2 if both % 2 == 0 else ("same" if second == 1 else 0)
        self._pads_conv2 = both % 2 == 1 and second != 1
        self.conv1 = nn.Conv2d(in_channels, f1, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(f1, eps, momentum)
        self.conv2 = nn.Conv2d(
            f1, f2, kernel_size, second, padding, dilation, groups=groups, bias=False
        )
        self.bn2 = nn.BatchNorm2d(f2, eps, momentum)
        self.conv3 = nn.Conv2d(f2, f3, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(f3, eps, momentum)
        self.downsample = _projection(in_channels, f3, stride, eps, momentum) if project else None
        _initialize(self, initializer)

    def conv_padding(self, i: int) -> tuple[int, int, int, int] | None:
        own = i == 2 and self._pads_conv2 and self.conv2.padding == (0, 0)
        return same_padding(taps_of(self.conv2)) if own else None


class IdentityBlock(_Bottleneck):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x))))))) + x): the bottleneck whose shortcut is
    its input.

    Children: conv1 bn1 conv2 bn2 conv3 bn3, plain nn.Conv2d without bias and nn.BatchNorm2d.

    Args:
        in_channels: C of the input [N, C, H, W]; the output has the same shape.
        filters: (F1, F2, F3), output channels of the three convolutions; F3 equals in_channels.
        kernel_size: side of the middle convolution, padded as Keras's 'same': an even one at the
            bottom and the right only.
        eps, momentum: BatchNorm's, in torch's sense.
        initializer: see fusedres.nn.init.resolve.
        groups, dilation: of the middle convolution, whose padding grows with its dilation; groups
            divides F1 and F2.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type, named.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2015.
    """

    def __init__(
        self,
        in_channels: int,
        filters: Sequence[int],
        kernel_size: int = 3,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        initializer: Initializer = "kaiming_normal",
        groups: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__(
            in_channels, filters, kernel_size, 1, False, False, eps, momentum, initializer, groups,
            dilation,
        )  # fmt: skip
        if filters[2] != in_channels:
            raise ValueError(
                f"IdentityBlock: filters[2] must equal in_channels {in_channels}, got "
                f"{filters[2]}; a ConvBlock projects its shortcut"
            )


class ConvBlock(_Bottleneck):
    """The bottleneck whose shortcut is a strided 1x1 convolution with BatchNorm of its own.

    Children: conv1 bn1 conv2 bn2 conv3 bn3 downsample.0 downsample.1, plain nn.Conv2d without bias
    and nn.BatchNorm2d.

    Args:
        in_channels: C of the input [N, C, H, W]; the output is [N, F3, OH, OW].
        filters: (F1, F2, F3), output channels of the three convolutions.
        kernel_size: side of the middle convolution; k - 1 rows and columns of padding, dilation
            times, the odd one at the bottom and the right (Keras's 'same').
        stride: of the block.
        stride_in_1x1: put it in conv1 (the original and Keras) rather than in conv2 (torchvision,
            v1.5).
        eps, momentum: BatchNorm's, in torch's sense.
        initializer: see fusedres.nn.init.resolve.
        groups, dilation: of the middle convolution, whose padding grows with its dilation; groups
            divides F1 and F2.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type, named.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2015.
    """

    def __init__(
        self,
        in_channels: int,
        filters: Sequence[int],
        kernel_size: int = 3,
        stride: int = 2,
        *,
        stride_in_1x1: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        initializer: Initializer = "kaiming_normal",
        groups: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__(
            in_channels,
            filters,
            kernel_size,
            stride,
            stride_in_1x1,
            True,
            eps,
            momentum,
            initializer,
            groups,
            dilation,
        )


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions and a shortcut, as ResNet-18 and 34 have them.

    Args:
        in_channels, channels: C of the input [N, C, H, W] and K of the output [N, K, OH, OW].
        stride: of the first convolution and of the projection, which is there where the shape
            changes.
        eps, momentum: BatchNorm's, in torch's sense.
        initializer: see fusedres.nn.init.resolve.
    """

    depth = 2

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        initializer: Initializer = "kaiming_normal",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, eps, momentum)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, eps, momentum)
        project = stride != 1 or in_channels != channels
        self.downsample = (
            _projection(in_channels, channels, stride, eps, momentum) if project else None
        )
        _initialize(self, initializer)


class Stage(nn.Sequential):
    """A sequence of blocks that hands a Deferred from one to the next wherever both sides can take
    it.
    """

    def forward(self, x: Tensor | Deferred, *, defer: bool = False) -> Tensor | Deferred:
        """[N, C, H, W] -> [N, K, OH, OW]; a Deferred only for a caller that asks by `defer`."""
        blocks = list(self)
        for i, block in enumerate(blocks):
            hands_over = takes_deferred(blocks[i + 1]) if i + 1 < len(blocks) else defer
            x = call(block, x, defer=hands_over)
        return x


def takes_deferred(module: nn.Module) -> bool:
    """Whether the module may be handed a Deferred: one of ours, called as its class is."""
    if not is_untouched(module):
        return False
    if type(module) is Stage:
        return len(module) > 0 and takes_deferred(module[0])
    if type(module) in (IdentityBlock, ConvBlock, BasicBlock):
        return True
    return isinstance(module, FusedModule) and module.accepts_deferred()


def call(module: nn.Module, x: Tensor | Deferred, *, defer: bool) -> Tensor | Deferred:
    """module(x), by a Deferred on either side only where the module takes part in handing them
    over.
    """
    if takes_deferred(module):
        return module(x, defer=defer)
    return module(as_tensor(x))


def packed(model: nn.Module, x: Tensor | Deferred) -> contextlib.AbstractContextManager[None]:
    """A scope in which autocast's casts of the weights that a model fuses are made at once.

    Nothing where autocast is off or a graph is recorded: there each convolution casts its own. So
    it does on a CPU, forward and backward: that costs little beside a convolution, and what is
    cast at once is held until backward.
    """
    recorded = torch.compiler.is_compiling() or exporting()
    if not isinstance(x, Tensor) or recorded or not autocast_on(x) or packed_weights() is not None:
        return contextlib.nullcontext()
    dtype = compute_dtype(x)
    if backends.choose("conv_bn", x.device.type, dtype).backend in ("reference", "cpp"):
        return contextlib.nullcontext()
    fused = [m for m in model.modules() if isinstance(m, FusedModule) and not m.plain_reason()]
    weights = [conv.weight for m in fused for _, conv, _, _ in m.units()]
    return packing(weights, dtype, x.device)  # type: ignore[arg-type]


MEMORY = ("exact", "recompute")


def set_memory(model: nn.Module, memory: str) -> None:
    """What the fused modules of a model keep for backward: one of MEMORY."""
    for module in model.modules():
        if isinstance(module, FusedModule) and module.memory != memory:
            module.memory = memory


def _projection(
    in_channels: int, channels: int, stride: int, eps: float, momentum: float | None
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, stride, bias=False),
        nn.BatchNorm2d(channels, eps, momentum),
    )


@torch.no_grad()
def _initialize(block: nn.Module, initializer: Initializer) -> None:
    fill = resolve(initializer)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            fill(module.weight)


def _check_positive(owner: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if not 1 <= value < 2**31:
        raise ValueError(f"{owner}: {name} must be at least 1 and below 2**31, got {value}")
