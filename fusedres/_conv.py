"""What every room agrees on about convolutions: geometry, and the input that is still deferred.

A leaf beside _tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEM_CHANNELS = 4  # the most that kernels for images take
BLOCK = 32  # channels and filters of the CPU's products come in so many
MOST_CHANNELS = 4096  # and no more than so many channels
TILE = 64  # channels and filters of the products on a GPU's tensor cores come in so many
MOST_TILED = {"mma": 1024, "wgmma": 2048}  # and no more: what goes with them lies on the chip


class Conv(NamedTuple):
    """The geometry of a convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, bottom, left, right
    dilation: tuple[int, int]
    groups: int

    def check(self, op: str) -> None:
        """What libraries do not look at where they have no use for it, or divide by.

        Raises:
            ValueError: a stride, dilation or number of groups below 1, padding below 0, or too few
                or too many of them.
        """
        least = {"stride": (2, 1), "padding": (4, 0), "dilation": (2, 1)}
        for name, (count, minimum) in least.items():
            values = getattr(self, name)
            if len(values) != count or min(values) < minimum:
                raise ValueError(
                    f"{op}: {name} must be {count} of at least {minimum}, got {list(values)}"
                )
        if self.groups < 1:
            raise ValueError(f"{op}: groups must be at least 1, got {self.groups}")

    def even_padding(self) -> bool:
        """Whether both sides are padded alike, so that the library can do it."""
        top, bottom, left, right = self.padding
        return top == bottom and left == right

    def reduced(self, x: torch.Size, weight: torch.Size) -> Conv:
        """The same without strides past the one window that they leave, and dilation of one tap:
        libraries hang or crash over huge ones.
        """
        if max(*self.stride, *self.dilation) <= 16:
            return self
        top, bottom, left, right = self.padding
        free = (
            extent - step * (taps - 1) - 1  # how far a window can go
            for extent, step, taps in zip(
                (x[2] + top + bottom, x[3] + left + right),
                self.dilation,
                weight[2:],
                strict=True,
            )
        )
        stride = [min(s, max(1, f + 1)) for s, f in zip(self.stride, free, strict=True)]
        dilation = [1 if k == 1 else d for d, k in zip(self.dilation, weight[2:], strict=True)]
        return self._replace(stride=(stride[0], stride[1]), dilation=(dilation[0], dilation[1]))

    def gives_a_column(self, x: torch.Size, weight: torch.Size) -> bool:
        """Whether the output is one pixel wide, and the horizontal stride therefore means nothing:
        oneDNN in bf16 gives garbage there unless it is 1.
        """
        return self.stride[1] > 1 and output_shape(x, weight, self)[3] == 1

    def is_pointwise(self, kernel_size: tuple[int, int]) -> bool:
        """Whether it is a matrix product over pixels: 1x1, of stride 1 or 2, not padded, one
        group.
        """
        pointwise = kernel_size == (1, 1) and not any(self.padding) and self.groups == 1
        return pointwise and max(self.stride) <= 2

    def has_fused_kernel(self, kernel_size: tuple[int, int]) -> bool:
        """Whether conv_bn has a fused plan for it: of any kernel size, but one group."""
        return self.groups == 1 and min(kernel_size) > 0

    def has_cpu_kernel(self, weight: torch.Size) -> bool:
        """Whether the CPU's fused plan takes it: 1x1, channels and filters in blocks."""
        filters, channels, height, width = weight
        whole = filters % BLOCK == 0 and channels % BLOCK == 0
        return self.is_pointwise((height, width)) and whole and channels <= MOST_CHANNELS

    def has_tensor_core_kernel(self, weight: torch.Size, product: str) -> bool:
        """Whether the plan "fused+mma" or "fused+wgmma" takes it: 1x1 of stride 1, channels and
        filters in tiles.
        """
        filters, channels, height, width = weight
        whole = filters % TILE == 0 and channels % TILE == 0 and min(filters, channels) > 0
        sizes = whole and max(filters, channels) <= MOST_TILED[product]
        return self.is_pointwise((height, width)) and self.stride == (1, 1) and sizes

    def has_stem_kernel(self, in_channels: int) -> bool:
        """Whether kernels for images serve it, whatever its kernel and stride."""
        return in_channels <= STEM_CHANNELS and self.groups == 1 and self.dilation == (1, 1)


class Source(NamedTuple):
    """A convolution's input: a Tensor (mean is None), or the fields of a Deferred."""

    x: Tensor  # [N, C, H, W]
    mean: Tensor | None  # [C]
    scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None  # [N, C, H, W]
    res_mean: Tensor | None  # [C]: given if the residual is a Deferred
    res_scale: Tensor | None
    res_bias: Tensor | None
    relu: bool

    @classmethod
    def plain(cls, x: Tensor) -> Source:
        """A Tensor."""
        return cls(x, None, None, None, None, None, None, None, False)


class Upstream(NamedTuple):
    """What the backward of a convolution with BatchNorm starts from."""

    g: Tensor  # [N, K, OH, OW], the gradient of (y - mean)*scale + bias
    sums: Tensor  # [2, K]: sum g, sum g*(y - mean), of the masked g
    y: Tensor  # like g
    mean: Tensor  # [K], as are the next two
    scale: Tensor
    rstd: Tensor
    bias: Tensor | None  # [K]: g is still to be masked, where relu((y - mean)*scale + bias) is 0
    training: bool  # else the statistics are frozen: dy = scale*g


def output_shape(
    x: torch.Size | tuple[int, ...], weight: torch.Size, conv: Conv
) -> tuple[int, int, int, int]:
    """[N, K, OH, OW] of the convolution of x [N, C, H, W] with weight [K, C / groups, R, S]."""
    top, bottom, left, right = conv.padding
    taps_h = conv.dilation[0] * (weight[2] - 1) + 1
    taps_w = conv.dilation[1] * (weight[3] - 1) + 1
    return (
        x[0],
        weight[0],
        (x[2] + top + bottom - taps_h) // conv.stride[0] + 1,
        (x[3] + left + right - taps_w) // conv.stride[1] + 1,
    )
