"""BatchNorm's arithmetic on [C] vectors, in plain torch: what follows a reduction over activations.

A leaf beside _tensors. Rooms whose kernels end before it use it; Triton's second stages have their
own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalizers(
    mean: Tensor,  # [C]
    var: Tensor,  # [C], biased
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """rstd, scale = weight * rstd, and a copy of bias, in mean's dtype; None: ones and zeros."""
    rstd = torch.rsqrt(var + eps)
    scale = rstd.clone() if weight is None else rstd * weight.detach().to(mean.dtype)
    shift = torch.zeros_like(mean) if bias is None else bias.detach().to(mean.dtype, copy=True)
    return rstd, scale, shift


@torch.no_grad()
def update_running(
    running_mean: Tensor,  # [C], moved in place
    running_var: Tensor,  # [C], moved in place
    mean: Tensor,  # [C]
    var: Tensor,  # [C], biased
    momentum: float | Tensor,
    count: int,
) -> None:
    """Moves the running statistics towards a batch's mean and unbiased variance, on the device."""
    if count == 0:
        return
    move(running_mean, mean, momentum)
    move(running_var, var * (count / (count - 1)), momentum)


def move(running: Tensor, new: Tensor, momentum: float | Tensor) -> None:
    """running += momentum * (new - running), without leaving the device."""
    amount = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
    running.lerp_(new.detach().to(running.dtype), amount)


def parameter_gradients(
    sums: Tensor,  # [2, C]
    rstd: Tensor,  # [C]
    weight: torch.dtype | None,
    bias: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """dweight and dbias in these dtypes, from the sums alone: no pass over memory."""
    dweight = None if weight is None else (sums[1] * rstd).to(weight)
    dbias = None if bias is None else sums[0].to(bias, copy=True)
    return dweight, dbias
