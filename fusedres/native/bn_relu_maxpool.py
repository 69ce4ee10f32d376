"""The stem's maxpool(relu(bn(y))) and its backward (csrc/cpu/bn_relu_maxpool.cpp,
csrc/cuda/bn_relu_maxpool_*.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres._checks import check_dense
from fusedres._norm import parameter_gradients
from fusedres._tensors import stored_format
from fusedres.native import require
from fusedres.native._args import check, head, like, on_cpu, pointers, vectors, workspace
from fusedres.native.batch_norm import batch_norm_bwd


def _pooled(extent: int, kernel_size: int, stride: int, padding: int) -> int:
    return max(0, (extent + 2 * padding - kernel_size) // stride + 1)


def _check_window(op: str, kernel_size: int, stride: int, padding: int) -> None:
    largest = 2**31 - 1
    if not (1 <= kernel_size <= 15 and 1 <= stride <= largest and 0 <= padding <= kernel_size // 2):
        raise ValueError(
            f"{op}: no window of kernel_size {kernel_size}, stride {stride}, padding {padding}"
        )


def bn_relu_maxpool_fwd(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
    kernel_size: int,
    stride: int,
    padding: int,
) -> Tensor:
    """p = maxpool(relu((y - mean)*scale + bias)), in y's memory format."""
    _check_window("bn_relu_maxpool_fwd", kernel_size, stride, padding)
    check("bn_relu_maxpool_fwd", y, {}, {"mean": mean, "scale": scale, "bias": bias})
    height, width = (_pooled(extent, kernel_size, stride, padding) for extent in y.shape[2:])
    p = torch.empty(
        (*y.shape[:2], height, width),
        dtype=y.dtype,
        device=y.device,
        memory_format=stored_format(y),
    )
    window = (kernel_size, stride, padding)
    require().bn_relu_maxpool_fwd(head(y), window, pointers(y, mean, scale, bias, p))
    return p


def bn_relu_maxpool_bwd(
    grad: Tensor,  # of p
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
    kernel_size: int,
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor]:
    """(g, sums [2, C]): the gradient of (y - mean)*scale + bias and its sums."""
    op = "bn_relu_maxpool_bwd"
    _check_window(op, kernel_size, stride, padding)
    check(op, y, {}, {"mean": mean, "scale": scale, "bias": bias})
    height, width = (_pooled(extent, kernel_size, stride, padding) for extent in y.shape[2:])
    check_dense(op, "grad", grad, (*y.shape[:2], height, width), y)
    c = require()
    args = head(y)
    g, sums = like(y), vectors(y, 2)
    window = (kernel_size, stride, padding)
    winners = None
    if on_cpu(args):
        winners = torch.empty(grad.numel(), dtype=torch.uint8, device=y.device)
    tensors = pointers(grad, y, mean, scale, bias, g, sums, winners)
    work = workspace(c.bn_relu_maxpool_bwd_workspace(args, window, (*tensors, 0)), y)
    c.bn_relu_maxpool_bwd(args, window, (*tensors, work.data_ptr()))
    return g, sums


def bn_relu_maxpool_winners(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
    window: tuple[int, int, int],  # kernel_size, stride, padding
) -> tuple[Tensor, None]:
    """bn_relu_maxpool_fwd's p; its backward finds the winners itself."""
    return bn_relu_maxpool_fwd(y, mean, scale, bias, *window), None


def batch_norm_relu_maxpool_bwd(
    grad: Tensor,  # of p
    winners: None,
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C], as are the next three
    scale: Tensor,
    bias: Tensor,
    rstd: Tensor,
    window: tuple[int, int, int],  # kernel_size, stride, padding
    training: bool,
    need_dy: bool,
    weight_dtype: torch.dtype | None,  # of dweight; None: there is none
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dy, dweight, dbias): bn_relu_maxpool_bwd and batch_norm_bwd."""
    g, sums = bn_relu_maxpool_bwd(grad, y, mean, scale, bias, *window)
    types = (weight_dtype, bias_dtype)
    if not need_dy:
        return None, *parameter_gradients(sums, rstd, *types)
    return batch_norm_bwd(g, y, mean, scale, rstd, sums, training, *types)
