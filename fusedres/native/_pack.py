"""Weights of a whole model cast to a half type in one launch on a GPU (csrc/cuda/pack.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres._checks import described
from fusedres.native import _args, require
from fusedres.native._args import DTYPES


def pack(
    weights: Sequence[Tensor],  # fp32 [K, C, R, S], dense in NCHW or channels_last, on one GPU
    dtype: torch.dtype,  # float16 or bfloat16
) -> list[Tensor]:
    """Casts of the weights, each dense in channels_last on 16 bytes, all in one buffer.

    Raises:
        ValueError: a weight or the dtype is another; nothing has run.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"pack: dtype must be float16 or bfloat16, got {dtype}")
    device = weights[0].device
    entries, sizes, offset = [], [], 0
    for i, w in enumerate(weights):
        channels_last = not w.is_contiguous()
        if (
            (w.dim(), w.dtype, w.device, w.layout) != (4, torch.float32, device, torch.strided)
            or (channels_last and not w.is_contiguous(memory_format=torch.channels_last))
            or w.numel() >= 2**31
        ):
            raise ValueError(
                f"pack: weight {i} must be float32 [K, C, R, S] on {device}, dense and of less "
                f"than 2**31 elements, got {described(w)}"
            )
        filters, channels, height, width = w.shape
        entries.append((w.data_ptr(), offset, filters, channels, height * width, channels_last))
        sizes.append(-(-w.numel() // 8) * 8)
        offset += sizes[-1]
    buffer = torch.empty(offset, dtype=dtype, device=device)
    index, stream = _args.where(buffer)
    require().pack(DTYPES[dtype], index, stream, buffer.data_ptr(), entries)
    casts = []
    for w, chunk in zip(weights, buffer.split(sizes), strict=True):
        k, c, r, s = w.shape
        casts.append(chunk[: w.numel()].view(k, r, s, c).permute(0, 3, 1, 2))
    return casts
