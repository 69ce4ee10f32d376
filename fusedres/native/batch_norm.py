"""Statistics of a BatchNorm and the gradient of its input (csrc/cpu/batch_norm.cpp)."""

from __future__ import annotations

from torch import Tensor

from fusedres.native import require
from fusedres.native._args import check, head, like, pointer, vectors, workspace


def batch_norm_stats(
    y: Tensor,  # [N, C, H, W]
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, [C] each; 0 for an empty y."""
    check("batch_norm_stats", y)
    c = require()
    args = head(y)
    mean, var = vectors(y), vectors(y)
    work = workspace(c.partial_rows(args[1], args[2]), 2, y)
    c.batch_norm_stats(*args, y.data_ptr(), mean.data_ptr(), var.data_ptr(), work.data_ptr())
    return mean, var


def batch_norm_bwd(
    g: Tensor,  # [N, C, H, W]
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    rstd: Tensor,  # [C]
    sums: Tensor,  # [2, C]: sum g, sum g*(y - mean)
    training: bool,
) -> Tensor:
    """dy = scale*g + c0 + c1*(y - mean), [N, C, H, W]; c0 = c1 = 0 unless training."""
    per_channel = {"mean": mean, "scale": scale, "rstd": rstd, "sums": sums}
    check("batch_norm_bwd", y, {"g": g}, per_channel)
    dy = like(y)
    work = vectors(y, 2)
    inputs = (g, y, mean, scale, rstd, sums, dy, work)
    require().batch_norm_bwd(*head(y), training, *map(pointer, inputs))
    return dy
