"""Plans by reasoning, for GPUs on which nothing was measured: from bytes, arithmetic and rates.

Every 1x1 layer of a ResNet-50 at many batch sizes, its two plans as lists of kernels: a kernel
takes the longer of the time for its bytes and that for its arithmetic, and a launch. The plan with
the smaller sum gets the entry, by pixels of the output. What is assumed beside the rates:

- the library's products reach the peak; Triton's reach GEMM of it, and less where their tiles of
  TILE x TILE are fewer than the device's multiprocessors;
- what the kernel before has just written is read from the L2 cache, for nothing, where it is no
  more than HELD of that cache: so small tensors lose little by passes of their own;
- every launch costs LAUNCH seconds, as in a CUDA graph.

Layers of other kernel sizes stay split: nothing is known about fused kernels there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fusedres._plan_table import MODELLED, is_modelled
from fusedres.bench import roofline
from fusedres.bench.convolutions import Site
from fusedres.bench.roofline import Layer
from fusedres.bench.tune import spans_of

GEMM = 0.8  # of the library's rate: an assumption, as the next two are
HELD = 0.5  # of the L2 cache
LAUNCH = 2e-6  # seconds
TILE = 128
BATCHES = tuple(2**i for i in range(11))
DTYPES = ("bfloat16", "float16")
ITEMSIZE = 2


class Device(NamedTuple):
    """A GPU: what it reaches, not what its data sheet says."""

    bandwidth: float  # bytes/s of a copy, read and written
    peak: float  # FLOP/s of a large product in a half type, dense
    cache: float  # bytes of L2
    multiprocessors: int


# Of what its data sheet says a large copy reaches 0.9 and a large product 0.8, on an H200: the
# others are taken to do the same.
_COPY, _PRODUCT = 0.9, 0.8
DEVICES = {
    # a copy and a product as measured; the data sheet has 4.8 TB/s and 989 TFLOP/s. L2 and SMs:
    # NVIDIA's H100 architecture white paper, whose chip it is
    "NVIDIA H200": Device(4.3e12, 790e12, 50e6, 132),
    # NVIDIA H100 data sheet: 3.35 TB/s; the chip is the same
    "NVIDIA H100 80GB HBM3": Device(_COPY * 3.35e12, 790e12, 50e6, 132),
    # NVIDIA A100 data sheet: 2,039 GB/s (80 GB) and 1,555 GB/s (40 GB), 312 TFLOP/s; L2 and SMs:
    # NVIDIA's A100 architecture white paper
    "NVIDIA A100-SXM4-80GB": Device(_COPY * 2.039e12, _PRODUCT * 312e12, 40e6, 108),
    "NVIDIA A100-SXM4-40GB": Device(_COPY * 1.555e12, _PRODUCT * 312e12, 40e6, 108),
    # NVIDIA HGX B200 data sheet, of eight: 8 TB/s and 2,250 TFLOP/s each; L2 and SMs: as its driver
    # reports them
    "NVIDIA B200": Device(_COPY * 8e12, _PRODUCT * 2250e12, 126e6, 148),
}


class Kernel(NamedTuple):
    """One launch."""

    moved: float  # bytes, but for `near`
    near: float = 0.0  # bytes of what the kernel before has written
    flops: float = 0.0
    tiles: int | None = None  # of the result, for a product of ours; None for the library's


def entries_by_model(device: str) -> list[dict[str, Any]]:
    """Entries of the plan table for a device of DEVICES, in both half types: every convolution of a
    ResNet-50.

    Raises:
        ValueError: another device.
    """
    if device not in DEVICES:
        raise ValueError(f"device: got {device!r}, accepted: {', '.join(map(repr, DEVICES))}")
    found = []
    for dtype in DTYPES:
        for layer, _ in roofline.distinct(roofline.layers()):
            winners = {b * layer.out_size**2: likely_plan(layer, b, device) for b in BATCHES}
            about: dict[str, Any] = {"device": device, "dtype": dtype}
            about |= {"in_channels": layer.in_channels, "out_channels": layer.out_channels}
            about |= {"kernel": [layer.kernel] * 2, "stride": [layer.stride] * 2}
            spans = spans_of(winners)
            spans[0][0][0] = 0  # smaller ones are as the smallest
            found += [
                {**about, "rows": span, "plan": plan, "source": MODELLED} for span, plan in spans
            ]
    return found


def with_model(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A table with the model's entries anew, behind what was measured."""
    measured = [entry for entry in table if not is_modelled(entry)]
    return measured + [entry for device in DEVICES for entry in entries_by_model(device)]


def likely_plan(layer: Layer, batch: int, device: str) -> str:
    """The plan with the smaller predicted time."""
    if layer.kernel != 1:
        return "split"
    times = {plan: seconds_of(plan, layer, batch, DEVICES[device]) for plan in ("fused", "split")}
    return min(times, key=lambda plan: times[plan])


def seconds_of(plan: str, layer: Layer, batch: int, device: Device) -> float:
    """Forward and backward of a layer, as predicted."""
    kernels = {"fused": fused, "split": split}[plan](layer, batch)
    return sum(_seconds(kernel, device) for kernel in kernels)


def _seconds(kernel: Kernel, device: Device) -> float:
    far = 0.0 if kernel.near <= HELD * device.cache else kernel.near
    peak = device.peak
    if kernel.tiles is not None:
        peak *= GEMM * min(1.0, kernel.tiles / device.multiprocessors)
    at_least = roofline.seconds(kernel.flops, kernel.moved + far, device.bandwidth, peak)
    return LAUNCH + at_least


class _Sizes:
    """Bytes of a layer's activations for a batch, and what is special about its place."""

    def __init__(self, layer: Layer, batch: int) -> None:
        self.read = float(batch * layer.read(ITEMSIZE))  # of the input, what counts
        self.whole = float(batch * layer.input(ITEMSIZE))
        self.out = float(batch * layer.output(ITEMSIZE))
        self.flops = float(batch * layer.flops)
        site = Site(layer, batch, torch.bfloat16, torch.device("cpu"))
        self.deferred, self.joins = site.deferred, site.joins
        self.pixels = batch * layer.out_size**2


def _tiles(rows: int, columns: int) -> int:
    return math.ceil(rows / TILE) * math.ceil(columns / TILE)


def fused(layer: Layer, batch: int) -> list[Kernel]:
    """Forward, dgrad, which leaves dy, and wgrad; a second stage each way."""
    s = _Sizes(layer, batch)
    joined = 2 * s.whole if s.joins else 0.0  # the residual, and the activation that is written
    # x for the sums before it, a for ReLU where it was emitted, and the shortcut's gradient
    before = (3 if s.joins else 1) * s.whole if s.deferred else 0.0
    tiles = _tiles(s.pixels, layer.out_channels)
    back = _tiles(s.pixels, layer.in_channels)
    return [
        Kernel(s.read + joined + s.out, 0, s.flops, tiles),
        Kernel(0),
        Kernel(2 * s.out + before + s.whole + s.out, 0, s.flops, back),
        Kernel(s.read, s.out, s.flops),  # its splits fill the device
        Kernel(0),
    ]


def split(layer: Layer, batch: int) -> list[Kernel]:
    """The library's convolution, dgrad and wgrad, with passes around them."""
    s = _Sizes(layer, batch)
    forward = [Kernel(s.out, s.read if s.deferred else 0.0, s.flops), Kernel(0, s.out), Kernel(0)]
    if s.deferred:  # the activation, with the residual where there is one
        forward.insert(0, Kernel((3 if s.joins else 2) * s.whole))
    else:
        forward[0] = Kernel(s.read + s.out, 0, s.flops)
    backward = [
        Kernel(3 * s.out),  # dy, of g and y
        Kernel(s.whole, s.out, s.flops),
        Kernel(s.read, s.out, s.flops),
    ]
    if s.deferred and not s.joins:  # the activation once more, for wgrad
        backward[2:] = [Kernel(2 * s.whole), Kernel(s.out, s.read, s.flops)]
        backward += [Kernel(2 * s.whole), Kernel(0)]  # da and x, for the sums
    elif s.joins:  # da, the shortcut's gradient, a and x; g is written
        backward += [Kernel(5 * s.whole), Kernel(0)]
    return forward + backward
