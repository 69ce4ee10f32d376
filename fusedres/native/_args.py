"""How tensors become arguments of fusedres._C."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fusedres._tensors import stat_dtype, stored_format
from fusedres.native import require

# enum class DType and Layout in csrc/include/fusedres/types.h
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
NHWC, NCHW = 0, 1
OPTIONAL = {"residual", "res_mean", "res_scale", "res_bias", "grad_extra", "a", "res_y", "out"}
OPTIONAL |= {"own_scale", "own_bias", "mask_bias"}

# dtype, sizes, layout, device (-1: the CPU), threads or stream: how every kernel's arguments begin
Head = tuple[int, tuple[int, ...], int, int, int]


def pointers(*tensors: Tensor | None) -> tuple[int, ...]:
    """Addresses of the first elements; 0 for None."""
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def numbered(vector: Tensor | None) -> tuple[int, int]:
    """A vector of a dtype of its own: its dtype's code and its address."""
    return (0, 0) if vector is None else (DTYPES[vector.dtype], vector.data_ptr())


def check(
    op: str,
    y: Tensor,
    full: Mapping[str, Tensor | None] = MappingProxyType({}),
    per_channel: Mapping[str, Tensor | None] = MappingProxyType({}),
) -> None:
    """What stands between a caller of torch.ops.fusedres and a bare pointer.

    `full` tensors are to be stored exactly as y is, `per_channel` ones [C] or, if sums, [2, C].
    Those of the names in OPTIONAL may be None. (A schema's Tensor lets None through.)

    Raises:
        ValueError: one of them is not; nothing has run.
    """
    on_device = y.device.type in ("cpu", "cuda") and y.layout == torch.strided
    if y.dim() != 4 or not on_device or y.dtype not in DTYPES:
        raise ValueError(f"{op}: y must be [N, C, H, W] on a CPU or GPU, got {described(y)}")
    memory_format = stored_format(y)
    for name, t in {"y": y, **full}.items():
        if not (t is None and name in OPTIONAL) and not (
            isinstance(t, Tensor)
            and t.shape == y.shape
            and (t.dtype, t.device, t.layout) == (y.dtype, y.device, y.layout)
            and t.is_contiguous(memory_format=memory_format)
        ):
            raise ValueError(
                f"{op}: {name} must be {y.dtype} {list(y.shape)}, dense in {memory_format} on "
                f"{y.device}, got {described(t)}"
            )
    for name, v in per_channel.items():
        shape = (2, y.size(1)) if "sums" in name else (y.size(1),)
        if not (v is None and name in OPTIONAL) and not (
            isinstance(v, Tensor)
            and tuple(v.shape) == shape
            and (v.dtype, v.device, v.layout) == (stat_dtype(y.dtype), y.device, y.layout)
            and v.is_contiguous()
        ):
            raise ValueError(
                f"{op}: {name} must be contiguous {stat_dtype(y.dtype)} {list(shape)} on "
                f"{y.device}, got {described(v)}"
            )


def check_parameters(op: str, y: Tensor, **vectors: Tensor | None) -> None:
    """BatchNorm's own [C] vectors, of any floating dtype and stride.

    Raises:
        ValueError: one of them is none; nothing has run.
    """
    for name, v in vectors.items():
        if v is not None and not (
            isinstance(v, Tensor)
            and tuple(v.shape) == (y.size(1),)
            and v.dtype in DTYPES
            and (v.device, v.layout) == (y.device, y.layout)
        ):
            raise ValueError(
                f"{op}: {name} must be floating-point [{y.size(1)}] on {y.device}, got "
                f"{described(v)}"
            )


def described(t: object) -> str:
    """An argument as errors name it."""
    if not isinstance(t, Tensor):
        return type(t).__name__
    strides = f" with strides {list(t.stride())}" if t.layout == torch.strided else f", {t.layout}"
    return f"{t.dtype} {list(t.shape)}{strides} on {t.device}"


def where(t: Tensor) -> tuple[int, int]:
    """Where a kernel runs on t: -1 and a number of threads, or a GPU's index and a stream."""
    if t.device.type == "cpu":
        return -1, torch.get_num_threads()
    if not require().cuda_built:
        raise RuntimeError(
            "fusedres: got CUDA tensors, but the extension was built without CUDA kernels; "
            "rebuild it with nvcc on PATH, or with FUSEDRES_CUDA=wheel"
        )
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream


def head(y: Tensor) -> Head:
    """What a kernel must know of y besides its address."""
    layout = NHWC if stored_format(y) == torch.channels_last else NCHW
    return DTYPES[y.dtype], tuple(y.shape), layout, *where(y)


def on_cpu(args: Head) -> bool:
    """Whether CPU kernels run."""
    return args[3] < 0


def like(y: Tensor) -> Tensor:
    """An uninitialised tensor of y's shape and dtype, dense in y's memory format."""
    return torch.empty_like(y, memory_format=stored_format(y))


def vectors(y: Tensor, *leading: int) -> Tensor:
    """An uninitialised [*leading, C] tensor in the dtype of y's per-channel vectors."""
    return torch.empty(*leading, y.size(1), dtype=stat_dtype(y.dtype), device=y.device)


def workspace(size: int, y: Tensor) -> Tensor:
    """Room for the partial results of a reduction, so many bytes."""
    return torch.empty(size, dtype=torch.uint8, device=y.device)
