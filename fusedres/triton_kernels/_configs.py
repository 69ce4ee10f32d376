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

from fusedres._conv import STEM_CHANNELS
from fusedres._plan_table import Shape, lookup, remembered

HIP = 0  # the arch of what is not CUDA
ENOUGH = 128  # tiles, about as many as large GPUs have multiprocessors
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
    programs: int = 0  # on a multiprocessor, of a persistent grid; 0: it is not. Of act: those that
    # divide a reduction; 0: as many as a rule says


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
    kernel: str,  # "fwd", "dgrad", "wgrad"; "fwd_plain" and "wgrad_plain" without a prologue; "bwd"
    # for the last two in one; "stem_wgrad"; "act" and "act_stem" of inference
    device: str,
    dtype: torch.dtype,
    shape: Shape,
    residual: int,  # 0 none, 1 a tensor, 2 one that is normalised too
    arch: int,
) -> Config:
    """The configuration of one launch."""
    tried = _tried.get(kernel) or _tried.get(kernel.removesuffix("_plain"))
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


@remembered
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
    if kernel == "act":
        return _act_rule(itemsize, shape, residual, arch)
    if kernel == "act_stem":
        return _stem_rule("fwd", itemsize, shape.out_channels, arch)
    if shape.kernel != (1, 1):
        if kernel == "dgrad":
            return _spatial_dgrad_rule(itemsize, shape, residual, arch)
        if shape.in_channels <= STEM_CHANNELS and not kernel.endswith("_plain"):
            return _stem_rule(kernel, itemsize, shape.out_channels, arch)
        return _spatial_rule(kernel, itemsize, shape, residual, arch)
    kernel = kernel.removesuffix("_plain")  # a padded 1x1 convolution's
    channels = (shape.in_channels, shape.out_channels)
    return _pointwise_rule(kernel, itemsize, *channels, residual, arch)


def _pointwise_rule(
    kernel: str, itemsize: int, in_channels: int, out_channels: int, residual: int, arch: int
) -> Config:
    wgmma = 90 <= arch < 120  # or its successor; consumer Blackwell has neither
    depth = 64 if wgmma else 32  # of operands that live in registers, beside the result
    if itemsize == 8:
        return Config(32, 32, 16, 4, 1)
    if in_channels % 16 or out_channels % 16:  # Triton knows of multiples of 16 alone
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
        warps = 8 if 100 <= arch < 120 else 4  # a mask of g beside the rest spills four there
        return Config(64, 128 if wide else 64, 64, warps, 2)
    wide = in_channels > 64 and not residual and wgmma
    if arch >= 120:  # three stages spill
        return Config(64, 64, 64, 4, 2)
    return Config(64, 128, 64, 4, 3) if wide else Config(64, 64, 64, 4, 3)


def _spatial_rule(kernel: str, itemsize: int, shape: Shape, residual: int, arch: int) -> Config:
    """Of the implicit GEMMs; "fwd_plain" and "wgrad_plain" have no prologue."""
    wgmma = 90 <= arch < 120
    wide = shape.out_channels > 64
    if itemsize == 8:
        return Config(32, 32, 16, 4, 1)
    if shape.in_channels % 16 or shape.out_channels % 16:  # Triton knows of multiples of 16 alone
        return Config(64 if kernel.startswith("fwd") else 32, 32, 32, 4, 1)
    if itemsize == 4:
        return Config(64, 64, 32, 4, 2)
    if arch == HIP:
        return Config(64, 64, 64, 4, 2)
    if not wgmma:
        return Config(128, 64, 32, 8, 3) if kernel.startswith("fwd") else Config(64, 64, 32, 4, 3)
    if arch >= 100:
        return Config(64, 64, 64, 4, 3)
    if kernel == "fwd_plain":
        return Config(128, 128 if wide else 64, 64, 4, 3)
    if kernel == "fwd":
        if residual:
            return Config(128, 64, 64, 8, 3)
        if shape.out_channels >= 256:
            return Config(128, 256, 64, 8, 2)
        return Config(128, 128, 64, 8, 3) if wide else Config(128, 64, 64, 4, 3)
    if wide and shape.in_channels > 64 and not residual:
        return Config(64, 128, 128, 8, 3)
    return Config(64, 64, 64, 4, 3)


def _spatial_dgrad_rule(itemsize: int, shape: Shape, residual: int, arch: int) -> Config:
    channels = (shape.in_channels, shape.out_channels)
    if itemsize != 2 or channels[0] % 16 or channels[1] % 16 or arch == HIP:
        return _pointwise_rule("dgrad", itemsize, *channels, residual, arch)
    columns = 64 if shape.in_channels <= 64 else 128
    if 100 <= arch < 120:  # a thread holds whole rows of dy, and all of the vectors beside them
        return Config(64, columns, 32, 8, 3)
    if residual == 2:  # eight warps: the epilogue's operands beside each other
        return Config(64, 64, 64, 8, 2)
    return Config(64, columns, 64 if arch == 90 else 32, 4, 3)


def _stem_rule(kernel: str, itemsize: int, out_channels: int, arch: int) -> Config:
    """Of the kernels for images; fwd's BK is a row of its window, whatever stands here."""
    wgmma = 90 <= arch < 120
    if itemsize == 8:
        return Config(32, 32, 32, 4, 1)
    if kernel == "fwd":
        return Config(128, 64, 32, 4, 1 if arch == HIP else 2 if itemsize == 4 else 4)
    if out_channels % 8:  # element by element
        return Config(16, 64, 32, 4, 1)
    if itemsize == 4 or arch == HIP:
        return Config(16 if kernel == "stem_wgrad" else 32, 128, 64, 8, 1)
    if kernel == "stem_wgrad":  # a pool's winners beside the accumulator: one program at a time
        return Config(32, 256, 64, 8, 2) if wgmma else Config(16, 256, 64, 8, 1)
    return Config(32, 256, 64, 8, 3) if wgmma else Config(32, 128, 64, 8, 2)


def _act_rule(itemsize: int, shape: Shape, residual: int, arch: int) -> Config:
    """Of conv_act's implicit GEMM: large tiles, unless they would be too few."""
    wgmma = 90 <= arch < 120
    if itemsize == 8:
        return Config(32, 32, 16, 4, 1)
    if shape.in_channels % 16 or shape.out_channels % 16:  # Triton knows of multiples of 16 alone
        return Config(64, 32, 32, 4, 1)
    if itemsize == 4:
        return Config(64, 64, 32, 4, 2)
    if arch == HIP:
        return Config(64, 64, 64, 4, 2)
    columns = 128 if shape.out_channels > 64 else 64
    tiles = -(-shape.rows // 128) * -(-shape.out_channels // columns) if shape.rows else ENOUGH
    if tiles < ENOUGH:
        return Config(64, 64, 64, 4, 4 if wgmma else 3)
    if not wgmma:
        return Config(128, 64, 32, 4, 3)
    return Config(128, columns, 64, 8 if columns == 128 else 4, 3)


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


def candidates(kernel: str, shape: Shape | None = None, arch: int = 90) -> list[Config]:
    """What is worth timing for half types; tests on a GPU hold each of them against fp64."""
    if kernel == "act":
        return _act_candidates(arch)
    if kernel == "act_stem":
        return _stem_candidates("fwd")
    if shape is not None and shape.kernel != (1, 1) and kernel != "dgrad":
        of_image = shape.in_channels <= STEM_CHANNELS
        return _stem_candidates(kernel) if of_image else _spatial_candidates(kernel)
    if kernel == "fwd":
        blocks = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)]
        found = [
            Config(m, n, k, w, s) for m, n, w in blocks for k, s in ((64, 3), (64, 2), (32, 3))
        ]
        return [*found, Config(64, 128, 64, 4, 3, 2), Config(128, 128, 64, 8, 3, 1)]
    if kernel == "dgrad" and shape is not None and shape.kernel != (1, 1):
        blocks = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8)]
        return [Config(m, n, k, w, s) for m, n, w in blocks for k, s in ((64, 2), (64, 3), (32, 3))]
    if kernel == "dgrad":
        blocks = [(64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 8)]
        found = [Config(m, n, k, w, s) for m, n, w in blocks for k, s in ((64, 2), (32, 3))]
        return [*found, Config(64, 128, 64, 4, 2, 2), Config(64, 64, 64, 4, 2, 3)]
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


def _stem_candidates(kernel: str) -> list[Config]:
    if kernel == "fwd":
        blocks = [(64, 4), (128, 4), (128, 8), (256, 8)]
        return [Config(m, 64, 32, w, s) for m, w in blocks for s in (3, 4)]
    return [Config(m, n, 64, 8, s) for m in (32, 64) for n in (128, 256) for s in (2, 3)]


def _act_candidates(arch: int) -> list[Config]:
    """Those that spill on no target of their kind, with a divided reduction or without."""
    if arch == HIP:
        blocks = [(64, 64, 64, 4), (128, 64, 32, 4), (64, 128, 32, 4), (128, 128, 32, 8)]
        return [Config(m, n, k, w, s) for m, n, k, w in blocks for s in (1, 2)]
    if not 90 <= arch < 120:
        blocks = [(64, 64, 64, 4), (128, 64, 32, 4), (128, 64, 64, 8), (128, 128, 32, 8)]
        found = [Config(m, n, k, w, s) for m, n, k, w in blocks for s in (3, 4)]
        return [*found, Config(64, 128, 32, 4, 3)]
    tiles = [(64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 64, 4), (128, 64, 8), (128, 128, 4)]
    tiles += [(128, 128, 8), (128, 256, 8), (256, 64, 8)]
    if arch < 100:  # beside a residual they spill on its successor
        tiles += [(64, 128, 4), (256, 128, 8)]
    return [Config(m, n, 64, w, s) for m, n, w in tiles for s in (3, 4)]


def _spatial_candidates(kernel: str) -> list[Config]:
    if kernel.startswith("fwd"):
        blocks = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)]
        if kernel == "fwd_plain":
            blocks += [(128, 128, 4), (256, 64, 8), (256, 128, 8), (128, 256, 8)]
            return [Config(m, n, 64, w, s) for m, n, w in blocks for s in (3, 4)]
        found = [Config(m, n, 64, w, s) for m, n, w in blocks for s in (3, 2)]
        return [*found, Config(128, 256, 64, 8, 2), Config(64, 256, 32, 4, 3)]
    blocks = [(64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8), (64, 256, 8)]
    return [Config(64, n, k, w, s) for n, k, w in blocks for s in (3, 4)]
