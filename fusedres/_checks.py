"""What stands between a caller of torch.ops.fusedres and a bare pointer, the same in every room.

A leaf beside _tensors. Messages for people come from fusedres.ops, which checks first; these checks
are what a kernel's addresses rest on. All raise ValueError, before anything has run. A schema's
Tensor lets None through, so that nothing is taken for a tensor here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fusedres._tensors import elements_per_channel, stat_dtype, stored_format

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# names of those that may be None
OPTIONAL = {"residual", "res_mean", "res_scale", "res_bias", "grad_extra", "a", "grad_a", "res_y"}
OPTIONAL |= {"out", "own_scale", "own_bias", "mask_bias", "y_bias"}
NOTHING: Mapping[str, Any] = MappingProxyType({})


def described(t: object) -> str:
    """An argument as errors name it."""
    if not isinstance(t, Tensor):
        return type(t).__name__
    if t.is_nested:
        return f"{t.dtype} nested on {t.device}"
    if t.layout != torch.strided:
        return f"{t.dtype} {list(t.shape)}, {t.layout} on {t.device}"
    flaw = ", still to be negated" if t.is_neg() else out_of_reach(t)
    return f"{t.dtype} {list(t.shape)} with strides {list(t.stride())} on {t.device}{flaw}"


def out_of_reach(t: Tensor) -> str:
    """What keeps a kernel from the memory of a strided tensor; "" where nothing does."""
    address = t.data_ptr()
    if address and not address & 7:  # a multiple of every element's size, as it nearly always is
        return ""
    if not address:  # freed, as FSDP frees storage, or zeros that nobody has made yet
        return ", without memory" if t.numel() > 0 else ""
    return "" if address % t.element_size() == 0 else ", at no multiple of its element's size"


def check_reach(op: str, **tensors: Tensor | None) -> None:
    """Tensors that a library reads or casts: it trusts their memory, and drops imaginary parts."""
    for name, t in tensors.items():
        if t is not None and t.layout == torch.strided and (t.is_complex() or out_of_reach(t)):
            raise ValueError(f"{op}: {name} cannot be read, got {described(t)}")


def check_packed(op: str, weight: Tensor, packed: Tensor | None) -> None:
    """A cast of the weight, where there is one."""
    if packed is not None and packed.shape != weight.shape:
        raise ValueError(
            f"{op}: packed must be a cast of weight {list(weight.shape)}, got {described(packed)}"
        )


def _is(t: object, shape: tuple[int, ...], dtype: torch.dtype, y: Tensor) -> bool:
    """A strided tensor of this shape and dtype on y's device, whose memory holds its values."""
    return (
        isinstance(t, Tensor)
        and t.layout == torch.strided
        and tuple(t.shape) == shape
        and (t.dtype, t.device) == (dtype, y.device)
        and not t.is_neg()
        and not out_of_reach(t)
    )


def check(
    op: str,
    y: Tensor,
    full: Mapping[str, Tensor | None] = NOTHING,
    per_channel: Mapping[str, Tensor | None] = NOTHING,
    *,
    devices: Collection[str],
    memory_format: torch.memory_format | None = None,
    name: str = "y",
) -> None:
    """y, called `name`, [N, C, H, W], dense in memory_format (None: channels_last or NCHW).

    `full` tensors are to be stored exactly as y is, `per_channel` ones [C] or, if sums, [2, C], in
    the dtype of y's statistics.
    """
    if _fits(y, full, per_channel, devices, memory_format):
        return
    strided = isinstance(y, Tensor) and y.layout == torch.strided
    if not strided or y.dim() != 4 or y.device.type not in devices or y.dtype not in DTYPES:
        places = " or ".join(devices)
        raise ValueError(f"{op}: {name} must be [N, C, H, W] on {places}, got {described(y)}")
    for label, t in {name: y, **full}.items():
        if t is not None or label not in OPTIONAL:
            check_dense(op, label, t, tuple(y.shape), y, memory_format)
    dtype = stat_dtype(y.dtype)
    for label, v in per_channel.items():
        shape = (2, y.size(1)) if "sums" in label else (y.size(1),)
        if v is None and label in OPTIONAL:
            continue
        if v is None or not _is(v, shape, dtype, y) or not v.is_contiguous():
            raise ValueError(
                f"{op}: {label} must be contiguous {dtype} {list(shape)} on {y.device}, got "
                f"{described(v)}"
            )


def _fits(
    y: Tensor,
    full: Mapping[str, Tensor | None],
    per_channel: Mapping[str, Tensor | None],
    devices: Collection[str],
    memory_format: torch.memory_format | None,
) -> bool:
    """Whether all is as `check` wants it, found out with little work: this stands in front of every
    kernel, and the long way is for what is odd or wrong.
    """
    try:
        dtype, device, shape, stride = y.dtype, y.device, y.shape, y.stride()
        known = y.layout is torch.strided and device.type in devices and dtype in DTYPES
        if y.data_ptr() & 7 or not y.data_ptr() or y.is_neg():
            return False
        if not known or y.dim() != 4 or not y.is_contiguous(memory_format=torch.channels_last):
            return False
        if memory_format is torch.contiguous_format or stride[1] != 1 or shape[1] == 1:
            return False
        for name, t in full.items():
            if t is None:
                if name not in OPTIONAL:
                    return False
                continue
            if t.dtype is not dtype or t.shape != shape or t.device != device:
                return False
            if t.stride() != stride or t.data_ptr() & 7 or not t.data_ptr() or t.is_neg():
                return False
        dtype = stat_dtype(dtype)
        for name, t in per_channel.items():
            if t is None:
                if name not in OPTIONAL:
                    return False
                continue
            if t.dtype is not dtype or t.device != device or not t.is_contiguous():
                return False
            if t.shape != ((2, shape[1]) if "sums" in name else (shape[1],)):
                return False
            if t.data_ptr() & 7 or not t.data_ptr() or t.is_neg():
                return False
    except (AttributeError, RuntimeError, IndexError):
        return False  # no tensor, or one without strides
    return True


def check_dense(
    op: str,
    name: str,
    t: Tensor | None,
    shape: tuple[int, ...],
    y: Tensor,
    memory_format: torch.memory_format | None = None,
) -> None:
    """A tensor of this shape, stored as y is (or in memory_format)."""
    order = memory_format or stored_format(y)
    if t is None or not _is(t, shape, y.dtype, y) or not t.is_contiguous(memory_format=order):
        raise ValueError(
            f"{op}: {name} must be {y.dtype} {list(shape)}, dense in {order} on {y.device}, got "
            f"{described(t)}"
        )


def check_norm(
    op: str,
    y: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
) -> None:
    """BatchNorm's own [C] vectors, of any floating dtype and stride, beside y; and its momentum."""
    running = {"running_mean": running_mean, "running_var": running_var}
    vectors = {"bn_weight": bn_weight, "bn_bias": bn_bias, **running}
    for name, v in vectors.items():
        if v is None:
            continue
        dtype = getattr(v, "dtype", None)
        if dtype not in DTYPES or not _is(v, (y.size(1),), dtype, y):
            raise ValueError(
                f"{op}: {name} must be floating-point [{y.size(1)}] on {y.device}, got "
                f"{described(v)}"
            )
    if (running_mean is None) != (running_var is None) or (not training and running_mean is None):
        raise ValueError(f"{op}: running_mean and running_var come together, and where frozen")
    if not training or running_mean is None:
        return
    for name, v in running.items():
        if v is not None and v.numel() > 1 and v.stride(0) == 0:
            raise ValueError(f"{op}: {name} is expanded, it cannot be moved in place")
        if v is not None and v.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{op}: {name} was made in inference mode, it cannot be moved outside")
    if elements_per_channel(y) == 1:
        raise ValueError(f"{op}: one value per channel has no unbiased variance to move towards")
    if isinstance(momentum, Tensor) and (
        momentum.is_complex() or not _is(momentum, (), momentum.dtype, y)
    ):
        raise ValueError(
            f"{op}: momentum must be a number or 0-d on {y.device}, got {described(momentum)}"
        )


def check_alike(op: str, first: Tensor, second: Tensor, devices: Collection[str]) -> None:
    """Two tensors of any one shape and dtype on one device, dense in one memory format."""
    strided = isinstance(first, Tensor) and first.layout == torch.strided
    if (
        not strided
        or first.dtype not in DTYPES
        or first.device.type not in devices
        or not _is(first, tuple(first.shape), first.dtype, first)
        or not _is(second, tuple(first.shape), first.dtype, first)
    ):
        raise ValueError(
            f"{op}: needs two tensors alike on {' or '.join(devices)}, got {described(first)} and "
            f"{described(second)}"
        )
    channels_last = torch.channels_last if first.dim() == 4 else torch.contiguous_format
    if not any(
        all(t.is_contiguous(memory_format=order) for t in (first, second))
        for order in (torch.contiguous_format, channels_last)
    ):
        raise ValueError(
            f"{op}: needs two tensors that are dense in one memory format, got {described(first)} "
            f"and {described(second)}"
        )
