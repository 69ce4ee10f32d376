"""What nn.SyncBatchNorm adds to conv_bn: statistics of the batches of a whole group of processes.

Forward gathers one row a process, (count, mean, biased variance), and every process merges the same
rows by the same arithmetic, so all have the same bits. Backward adds up the pairs of sums. A
process knows no count but its own, and batches may differ or be empty: counts stay on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedres import _norm
from fusedres.ops import _contract as contract

if TYPE_CHECKING:  # not there in every build of torch
    from torch.distributed import ProcessGroup


def active(group: ProcessGroup | None) -> ProcessGroup | None:
    """The group, for None the world, if there are processes in it to share statistics with."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None  # -1 for who is not in it


def check_sync(op: str, sync: object, training: bool) -> ProcessGroup | None:
    """The group that statistics are taken over; None where they are this process's own."""
    if sync is None:
        return None
    if not dist.is_available() or not isinstance(sync, dist.ProcessGroup):
        raise TypeError(
            f"{op}: sync must be a torch.distributed.ProcessGroup or None, got "
            f"{type(sync).__name__}"
        )
    group = active(sync) if training else None
    if group is not None and (torch.compiler.is_compiling() or contract.exporting()):
        raise RuntimeError(f"{op}: sync cannot be recorded in a graph; call nn.SyncBatchNorm there")
    return group


class Shared(NamedTuple):
    """The statistics of all processes' batches."""

    mean: Tensor  # [K]
    var: Tensor  # [K], biased
    total: Tensor  # [], values per channel, of all processes
    share: Tensor  # [], this process's part of them


def share(mean: Tensor, var: Tensor, count: int, group: ProcessGroup) -> Shared:
    """The statistics of a group from those of this process's batch, which are 0 where it is empty.

    Args:
        mean, var: [K], var biased, fp32 or fp64; ordinary autograd goes through them.
        count: values per channel that they are of. In fp32 exact up to 2**24.
        group: all of its processes call this at the same time.
    """
    row = torch.cat((mean.new_full((1,), count), mean, var))
    mean, var, total = merge(_Gather.apply(row, group))
    return Shared(mean, var, total, count / total.clamp(min=1))


def merge(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean [K], biased var [K] and count [] of what rows [W, 1 + 2K] are the (count, mean, biased
    var) of: Chan's formula for all rows at once, in their order.
    """
    channels = rows.size(1) // 2
    counts, means, variances = rows.split((1, channels, channels), 1)
    total = counts.sum()
    weights = counts / total.clamp(min=1)
    # from the first mean on: they lie close together, and weights add up to 1 but for rounding
    mean = means[0] + ((means - means[0]) * weights).sum(0)
    var = ((variances + (means - mean).square()) * weights).sum(0)
    return mean, var, total


class _Gather(torch.autograd.Function):
    """row [L], group -> the rows of all processes [W, L], in the order of their ranks."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        size = dist.get_world_size(group)
        rows = row.new_empty(size * row.numel())  # gloo takes no [W, L]
        # the second name is what torch before 2.13 has for it
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(rows, row, group)
        return rows.view(size, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return add_up(grad, ctx.group)[dist.get_rank(ctx.group)], None


def add_up(local: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over a group; `local` stays as it is."""
    total = local.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


@torch.no_grad()
def update_running(
    running_mean: Tensor | None,  # [K], moved in place
    running_var: Tensor | None,  # [K], moved in place
    momentum: float | Tensor,
    shared: Shared,
) -> None:
    """Moves the running statistics, if there are any; not where every batch is empty."""
    if running_mean is None or running_var is None:
        return
    total = shared.total
    amount = (total > 0).to(total.dtype) * momentum
    _norm.move(running_mean, shared.mean, amount)
    _norm.move(running_var, shared.var * (total / (total - 1).clamp(min=1)), amount)
