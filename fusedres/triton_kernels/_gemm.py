"""What the hosts of conv_bn's kernels share: their configuration, how a GEMM's rows are divided
among programs, and what dgrad hands on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fusedres._conv import Conv, Source
from fusedres._plan_table import Shape, device_name
from fusedres._tensors import INTERPRETED, conv_allows_tf32, stat_dtype
from fusedres.triton_kernels._configs import HIP, MOST_PARTIALS, Config, arch_of, config_of
from fusedres.triton_kernels._launch import multiprocessors

LEAST_STEPS = 4  # of a split of a reduction


class Dgrad(NamedTuple):
    """What a dgrad kernel leaves."""

    g_in: Tensor  # like x
    part: Tensor | None  # [chunks, 2 or 3, C]: partial rows of the sums, where x is a Deferred's
    dy: Tensor | None  # like y: what wgrad reads, where it is wanted


def shape_of(x: Tensor, weight: Tensor, conv: Conv, m: int) -> Shape:
    """The convolution as the plan table knows it."""
    kernel = (weight.size(2), weight.size(3))
    return Shape(x.size(1), weight.size(0), kernel, conv.stride, m)


def config_for(
    kernel: str, x: Tensor, weight: Tensor, conv: Conv, m: int, residual: int = 0
) -> Config:
    """The configuration of a launch over m rows of the output."""
    shape = shape_of(x, weight, conv, m)
    return config_of(kernel, device_name(x.device), x.dtype, shape, residual, arch_of(x.device))


def residual_kind(source: Source) -> int:
    """0 none, 1 a tensor, 2 one that is normalised too."""
    return 2 if source.res_mean is not None else int(source.residual is not None)


def empty(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised and contiguous, in the dtype of x's per-channel vectors or another."""
    return torch.empty(shape, dtype=dtype or stat_dtype(x.dtype), device=x.device)


def sampling(grad: Tensor, x: Tensor) -> tuple[int, int]:
    """(GH, GW): grad is there for every GH-th row of x's pixels and every GW-th column."""
    return tuple(1 if g == e else 2 for g, e in zip(grad.shape[2:], x.shape[2:], strict=True))  # type: ignore[return-value]


def all_ones(device: torch.device) -> Tensor:
    """[1] int32 with all bits set: what kernels load where an element is to be kept, and zeros
    elsewhere. A mask that is loaded, not computed, lets Triton feed tensor cores from registers.

    Made anew each time: kept, it could lie in the memory of a CUDA graph.
    """
    return torch.full((1,), -1, dtype=torch.int32, device=device)


def chunks(m: int, config: Config, device: torch.device, across: int = 1) -> tuple[int, int]:
    """Tiles of rows in a chunk, and chunks, each of them `across` programs: as many as may leave a
    partial row or, if the grid is persistent, as run at once.

    On HIP a tile each: its barrier orders local memory alone, and a program's tiles meet in global
    memory.
    """
    most = MOST_PARTIALS
    if config.programs:
        most = min(most, max(1, config.programs * multiprocessors(device) // across))
    tiles = max(1, triton.cdiv(triton.cdiv(m, config.BM), most))
    if arch_of(device) == HIP:
        tiles = 1
    return tiles, triton.cdiv(m, tiles * config.BM)


def splits(
    m: int, config: Config, programs: int, device: torch.device, each: int = 2
) -> tuple[int, int]:
    """Tiles of rows in a split of wgrad, and splits: with `programs` programs to a split, `each`
    for a multiprocessor.
    """
    wanted = max(1, each * multiprocessors(device) // programs)
    tiles = max(1, triton.cdiv(triton.cdiv(m, config.BM), wanted))
    return tiles, triton.cdiv(m, tiles * config.BM)


def divided(steps: int, programs: int, config: Config, device: torch.device) -> tuple[int, int]:
    """Steps of a split of a reduction, and splits: as many as the configuration says, else so many
    that `programs` to each of them do not outnumber the multiprocessors. A split of fewer than
    LEAST_STEPS is not worth the second stage.
    """
    wanted = config.programs
    if not wanted:
        wanted = min(multiprocessors(device) // programs, steps // LEAST_STEPS)
    each = max(1, triton.cdiv(steps, max(1, wanted)))
    return each, max(1, triton.cdiv(steps, each))


def precision(dtype: torch.dtype) -> str:
    """How fp32 products run: as torch's convolutions do."""
    wide = dtype != torch.float32 or INTERPRETED or not conv_allows_tf32()
    return "ieee" if wide else "tf32"
