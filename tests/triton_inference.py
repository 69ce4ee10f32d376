"""What an inference launches, for triton_launches.py: every convolution of a ResNet-50 by conv_act,
and every configuration of its kernels. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from fusedres._conv import Conv, output_shape
from fusedres._plan_table import Shape
from fusedres._tensors import stat_dtype
from fusedres.triton_kernels import _configs
from fusedres.triton_kernels.conv_act import conv_act


class Layer(NamedTuple):
    """One convolution and what follows it."""

    channels: int
    outs: int
    kernel: int
    stride: int
    side: int  # of the input's map
    residual: bool = False
    relu: bool = True

    @property
    def conv(self) -> Conv:
        """Its geometry."""
        return Conv((self.stride,) * 2, (self.kernel // 2,) * 4, (1, 1), 1)


STEM = Layer(3, 64, 7, 2, 224)


def _layers() -> Iterator[Layer]:
    channels, side = 64, 56
    for planes, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        outs = 4 * planes
        yield Layer(channels, planes, 1, 1, side)
        yield Layer(channels, outs, 1, stride, side, relu=False)  # the shortcut
        yield Layer(planes, planes, 3, stride, side)
        side //= stride
        yield Layer(planes, planes, 3, 1, side)
        yield Layer(planes, outs, 1, 1, side, residual=True)
        yield Layer(outs, planes, 1, 1, side)
        channels = outs


LAYERS = (STEM, *_layers())


def act(layer: Layer, batch: int, dtype: torch.dtype, frames: bool = False) -> None:
    """One call of conv_act, if `frames` on a camera's uint8."""
    x = torch.empty(batch, layer.side, layer.side, layer.channels, dtype=dtype).permute(0, 3, 1, 2)
    weight = torch.empty(layer.outs, layer.channels, layer.kernel, layer.kernel, dtype=dtype)
    y = output_shape(x.shape, weight.shape, layer.conv)
    residual = None
    if layer.residual:
        residual = torch.empty(y, dtype=dtype, memory_format=torch.channels_last)
    vector = torch.empty(layer.outs, dtype=stat_dtype(dtype))
    normalize = (torch.empty(layer.channels),) * 2 if frames else None
    if frames:
        x = torch.empty(x.permute(0, 2, 3, 1).shape, dtype=torch.uint8)
    own = (vector, vector, residual, layer.relu)
    conv_act(x, weight, layer.conv, *own, normalize=normalize)


def inference_step(batch: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """All convolutions of a ResNet-50, the stem from a tensor and from frames."""
    for layer in LAYERS:
        act(layer, batch, dtype)
    act(STEM, batch, dtype, frames=True)


# a product and a window by one program a tile, and by several; all that an epilogue may hold
SWEPT = (
    (Layer(256, 512, 1, 1, 14, residual=True), 1),
    (Layer(256, 256, 3, 2, 28, residual=True), 1),
    (Layer(256, 512, 1, 2, 28), 4),
    (Layer(256, 256, 3, 1, 14), 4),
    (STEM, 1),
)


def every_configuration(arch: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Each candidate for a target."""
    for layer, programs in SWEPT:
        name = "act_stem" if layer is STEM else "act"
        kernel, stride = (layer.kernel,) * 2, (layer.stride,) * 2
        shape = Shape(layer.channels, layer.outs, kernel, stride)
        for config in _configs.candidates(name, shape, arch):
            with _configs.trying({name: replace(config, programs=programs)}):
                act(layer, 8, dtype)


def rare_inference(dtype: torch.dtype) -> None:
    """What no ResNet-50 launches: odd sizes, few channels, other kernels."""
    for layer in (
        Layer(5, 11, 1, 1, 9),
        Layer(24, 40, 3, 1, 9, residual=True),
        Layer(5, 11, 3, 2, 9),
        Layer(1, 1, 5, 1, 9),
        Layer(4, 64, 4, 4, 64),  # patches
        Layer(4, 96, 11, 4, 64, residual=True),
        Layer(64, 64, 1, 3, 28),
        Layer(96, 96, 5, 1, 28, residual=True),
    ):
        act(layer, 4, dtype)
