"""Block sizes of the convolution kernels: from the table where it has them, else by these rules.

The rules come from compiling, not from timing: no spills with Triton 3.6 and 3.9, and room for two
programs on an SM of a Hopper where the GEMM's depth is one or two steps, so that one's epilogue
hides behind the other's loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fusedres._plan_table import Shape, lookup

HIP = 0  # the arch of what is not CUDA
MOST_PARTIALS = 1024  # rows of partial results that a second stage has to merge


@dataclass(frozen=True)
class Config:
    """BM rows by BN columns of the result; wgrad and bwd: BM rows in a step, BN by BK of dw, which
    bwd needs to be all of K.
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


@cache
def arch_of(device: torch.device) -> int:
    """80 for sm_80 and so on, HIP for AMD's; the interpreter stands in for a Hopper."""
    if torch.version.hip is not None:
        return HIP
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def config_of(
    kernel: str,  # "fwd", "dgrad", "wgrad"; "bwd" for the last two in one
    device: str,
    dtype: torch.dtype,
    shape: Shape,
    residual: int,  # 0 none, 1 a tensor, 2 one that is normalised too
    arch: int,
) -> Config:
    """The configuration of one launch."""
    tried = _tried.get(kernel)
    return tried or _config_of(kernel, device, dtype, shape, residual, arch)


_tried: dict[str, Config] = {}


@contextlib.contextmanager
def trying(configs: Mapping[str, Config]) -> Iterator[None]:
    """Within the block these kernels take these configurations, whatever their shape."""
    before = dict(_tried)
    _tried.update(configs)
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


@cache
def _config_of(
    kernel: str, device: str, dtype: torch.dtype, shape: Shape, residual: int, arch: int
) -> Config:
    entry: dict[str, Any] = lookup(device, dtype, shape) or {}
    measured = entry.get("configs", {}).get(kernel)
    if measured is not None:
        return Config(**measured)
    return rule(kernel, dtype.itemsize, shape, residual, arch)


def rule(kernel: str, itemsize: int, shape: Shape, residual: int, arch: int) -> Config:
    """What is taken where nothing was measured."""
    if kernel == "bwd":
        return _merged_rule(itemsize, shape, residual, arch)
    channels = (shape.in_channels, shape.out_channels)
    return _pointwise_rule(kernel, itemsize, *channels, residual, arch)


def _pointwise_rule(
    kernel: str, itemsize: int, in_channels: int, out_channels: int, residual: int, arch: int
) -> Config:
    wgmma = 90 <= arch < 120  # or its successor; consumer Blackwell has neither
    depth = 64 if wgmma else 32  # of operands that live in registers, beside the result
    if itemsize == 8:
        return Config(32, 32, 16, 4, 1)
    if in_channels % 8 or out_channels % 8:  # element by element: no access is of 16 bytes
        return Config(64, 32, 32, 4, 1)
    if itemsize == 4:
        return Config(64, 64, 32, 4, 2)
    if arch == HIP:  # 64 KiB of LDS
        return Config(64, 64, 64, 4, 2)
    if kernel == "fwd":
        if out_channels <= 64:
            small = residual or arch >= 100
            return Config(64, 64, depth, 4, 3) if small else Config(128, 64, 64, 4, 3)
        if not wgmma:
            return Config(64, 64, depth, 4, 3) if residual else Config(64, 128, depth, 4, 3)
        if arch >= 100 and not residual:
            return Config(128, 128, 64, 8, 3)
        if in_channels <= 128 or residual:
            return Config(64, 128, 64, 4, 3)
        return Config(128, 128, 64, 8, 3)
    if kernel == "dgrad":
        wide = in_channels > 64 and residual < 2
        return Config(64, 128, 64, 4, 2) if wide else Config(64, 64, 64, 4, 2)
    wide = in_channels > 64 and not residual and wgmma
    return Config(64, 128, 64, 4, 3) if wide else Config(64, 64, 64, 4, 3)


def _merged_rule(itemsize: int, shape: Shape, residual: int, arch: int) -> Config:
    """For dgrad and wgrad in one: dw, BN by K, takes a quarter of the registers of 8 warps at most,
    and leaves a tile of g and y the rest, hence BM. With 3 stages a tile is on its way while
    another is worked on; with 2, none.
    """
    depth = max(16, 1 << (shape.out_channels - 1).bit_length())
    if itemsize > 2 or shape.in_channels % 8 or shape.out_channels % 8:
        return Config(32, 32, depth, 4, 1)
    wide = depth == 128 and shape.in_channels > 64  # fewer tiles of C read g and y again
    columns = 128 if wide else 64
    # below: two programs of 4 warps, so that one's epilogue hides behind the other's products
    warps = 8 if depth > 64 else 4
    return Config(32 if depth > 64 or residual else 64, columns, depth, warps, 3)


def candidates(kernel: str, shape: Shape | None = None) -> list[Config]:
    """What is worth timing for half types; tests on a GPU hold each of them against fp64."""
    if kernel == "fwd":
        blocks = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)]
        return [Config(m, n, k, w, s) for m, n, w in blocks for k, s in ((64, 3), (64, 2), (32, 3))]
    if kernel == "dgrad":
        blocks = [(64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 8)]
        return [Config(m, n, k, w, s) for m, n, w in blocks for k, s in ((64, 2), (32, 3))]
    if kernel == "bwd":
        outs = shape.out_channels if shape else 64
        if outs <= 64:
            tiles = [(64, 64, 4, 3), (32, 64, 4, 3), (64, 64, 4, 2), (32, 128, 8, 3)]
        elif outs <= 128:
            tiles = [(32, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 2), (32, 64, 4, 3)]
        else:
            tiles = [(32, 64, 8, 3), (32, 64, 8, 2), (64, 64, 8, 2), (16, 64, 4, 2)]
        return [Config(m, n, outs, w, s) for m, n, w, s in tiles]
    blocks = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8)]
    return [Config(m, n, k, w, 3) for m, n, w in blocks for k in (64, 128) if n * k <= 8192]
