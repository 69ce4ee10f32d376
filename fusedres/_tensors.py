"""What every room agrees on about tensors: memory format, accumulation dtype, per-channel shapes.

A leaf: it imports torch only, and any module of the package may import it.
"""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor

# Under Triton's interpreter a CPU stands in for the GPU. Read once, as Triton does.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

CHANNEL_DIMS = (0, 2, 3)  # what a per-channel reduction of an NCHW-shaped tensor sums over


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of mean, rstd, scale, bias and sums beside activations of `dtype`: fp64 for fp64, else
    fp32.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def stored_format(x: Tensor) -> torch.memory_format:
    """channels_last or contiguous (NCHW), by x's strides, so that an image of one channel keeps its
    format.
    """
    if x.stride(1) == 1:
        dense = x.is_contiguous(memory_format=torch.channels_last)
        if dense or (x.stride(3) >= x.size(1) > 1 and x.stride(2) >= x.stride(3)):  # a crop is not
            return torch.channels_last
    return torch.contiguous_format


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The dense format in which ops handle x: its own; on a GPU always channels_last."""
    on_gpu = x.device.type == "cuda" or INTERPRETED
    return torch.channels_last if on_gpu else stored_format(x)


@torch.compiler.assume_constant_result
def conv_allows_tf32() -> bool:
    """Whether torch's convolutions may compute fp32 products in TF32, by its new or old setting."""
    for holder in (getattr(torch.backends.cudnn, "conv", None), torch.backends.cudnn):
        precision = getattr(holder, "fp32_precision", "none")
        if precision != "none":  # which inherits
            return precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def per_channel(v: Tensor) -> Tensor:
    """A [C] vector as [1, C, 1, 1], ready to broadcast against [N, C, H, W]."""
    return v.view(1, -1, 1, 1)


def elements_per_channel(x: Tensor) -> int:
    """N*H*W of an [N, C, H, W] tensor."""
    return x.size(0) * x.size(2) * x.size(3)


def autocast(
    device: str | torch.device, dtype: torch.dtype
) -> contextlib.AbstractContextManager[object]:
    """Autocast to the half type `dtype`; nothing for float32 and float64."""
    if dtype in (torch.float32, torch.float64):
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype)
