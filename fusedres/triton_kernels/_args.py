"""How tensors become arguments of kernels: checks, allocation, and the matrix they are seen as."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton.language as tl
from torch import Tensor

from fusedres._tensors import INTERPRETED, stat_dtype

DEVICE = "cpu" if INTERPRETED else "cuda"
OPTIONAL = {"residual", "res_mean", "res_scale", "res_bias"}  # what may be None
OPTIONAL |= {"grad_extra", "a", "grad_a", "res_y", "out"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check(
    op: str,
    y: Tensor,
    full: Mapping[str, Tensor | None] = MappingProxyType({}),
    per_channel: Mapping[str, Tensor | None] = MappingProxyType({}),
    name: str = "y",
) -> None:
    """What stands between a caller of torch.ops.fusedres and a bare pointer.

    `full` tensors are to be like y [N, C, H, W], dense in channels_last; `per_channel` ones [C] or,
    if sums, [2, C], in the dtype of y's statistics. Those of the names in OPTIONAL may be None. (A
    schema's Tensor lets None through.)

    Raises:
        ValueError: one of them is not; nothing has run.
    """
    dense = y.layout == torch.strided
    if y.dim() != 4 or y.device.type != DEVICE or y.dtype not in DTYPES or not dense:
        raise ValueError(f"{op}: {name} must be [N, C, H, W] on {DEVICE}, got {described(y)}")
    for label, t in {name: y, **full}.items():
        if not (t is None and label in OPTIONAL) and not (
            isinstance(t, Tensor)
            and t.shape == y.shape
            and (t.dtype, t.device, t.layout) == (y.dtype, y.device, y.layout)
            and t.is_contiguous(memory_format=torch.channels_last)
        ):
            raise ValueError(
                f"{op}: {label} must be {y.dtype} {list(y.shape)}, dense in channels_last on "
                f"{y.device}, got {described(t)}"
            )
    dtype = stat_dtype(y.dtype)
    for label, v in per_channel.items():
        shape = (2, y.size(1)) if "sums" in label else (y.size(1),)
        if not (v is None and label in OPTIONAL) and not (
            isinstance(v, Tensor)
            and tuple(v.shape) == shape
            and (v.dtype, v.device, v.layout) == (dtype, y.device, y.layout)
            and v.is_contiguous()
        ):
            raise ValueError(
                f"{op}: {label} must be contiguous {dtype} {list(shape)} on {y.device}, got "
                f"{described(v)}"
            )


def described(t: object) -> str:
    """An argument as an error message names it."""
    if not isinstance(t, Tensor):
        return type(t).__name__
    strides = f" with strides {list(t.stride())}" if t.layout == torch.strided else f", {t.layout}"
    return f"{t.dtype} {list(t.shape)}{strides} on {t.device}"


def rows(y: Tensor) -> int:
    """N*H*W: the rows of y [N, C, H, W] seen as a matrix of C columns."""
    return y.size(0) * y.size(2) * y.size(3)


def acc(dtype: torch.dtype) -> tl.dtype:
    """The ACC of kernels over tensors of `dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def like(y: Tensor) -> Tensor:
    """An uninitialised tensor of y's shape and dtype in channels_last."""
    return torch.empty_like(y, memory_format=torch.channels_last)


def vectors(y: Tensor, *leading: int) -> Tensor:
    """An uninitialised [*leading, C] tensor in the dtype of y's per-channel vectors."""
    return torch.empty(*leading, y.size(1), dtype=stat_dtype(y.dtype), device=y.device)
