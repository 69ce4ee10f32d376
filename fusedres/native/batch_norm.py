"""Statistics of a BatchNorm, the gradient of its input, and BatchNorm with its activation at once
(csrc/cpu/batch_norm.cpp, csrc/cuda/batch_norm.cu, csrc/cuda/batch_norm_act.cu).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres._checks import check_norm
from fusedres._norm import normalizers, parameter_gradients, update_running
from fusedres._tensors import elements_per_channel, stat_dtype
from fusedres.native import require
from fusedres.native._args import (
    DTYPES,
    Head,
    check,
    head,
    like,
    numbered,
    on_cpu,
    pointers,
    vectors,
    workspace,
)
from fusedres.native.bn_act import bn_act_bwd, bn_act_fwd, masked_sums

# mean, biased var, rstd, scale, bias: [C] each
Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _stored(v: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """A vector as a kernel reads it: contiguous, in a dtype (None: its own)."""
    if v is None or (v.is_contiguous() and dtype in (None, v.dtype)):
        return v
    return v.detach().to(v.dtype if dtype is None else dtype).contiguous()


class Forward:
    """What a forward kernel takes of a BatchNorm, and what follows it."""

    def __init__(
        self,
        y: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | Tensor,
        eps: float,
        args: Head,
    ) -> None:
        dtype, running = stat_dtype(y.dtype), (running_mean, running_var)
        mean = vectors(y)
        others = (torch.empty_like(mean) for _ in range(4))
        self.statistics: Statistics = (mean, *others)  # type: ignore[assignment]
        self.given = (*running, momentum)
        amount = momentum if isinstance(momentum, Tensor) else None
        self.in_torch = False
        only = dtype if on_cpu(args) else None  # kernels there take vectors of one dtype
        if only is not None:
            self.in_torch = running_mean is not None and (
                running_mean.dtype != dtype or running_var.dtype != dtype  # type: ignore[union-attr]
            )
            running = (None, None) if self.in_torch else running
        elif amount is not None and amount.dtype not in DTYPES:
            amount = amount.float()
        self.running = running
        self.stored = [_stored(v, only) for v in (bn_weight, bn_bias, amount, *running)]
        if not isinstance(eps, int | float):
            raise TypeError(f"batch_norm_fwd: eps must be a number, got {type(eps).__name__}")
        self.numbers = (0.0 if amount is not None else float(momentum), float(eps))
        self.vectors = tuple([numbered(v) for v in self.stored])
        self.results = pointers(*self.statistics)

    def settle(self, count: int) -> Statistics:
        """The statistics; running ones that the kernel could not move in place move too."""
        running_mean, running_var, momentum = self.given
        if self.in_torch and running_mean is not None and running_var is not None:
            mean, var, *_ = self.statistics
            update_running(running_mean, running_var, mean, var, momentum, count)
        for running, moved in zip(self.running, self.stored[3:], strict=True):
            if running is None or moved is None or running.data_ptr() == moved.data_ptr():
                continue
            running.detach().copy_(moved)
        return self.statistics


# numbers, vectors and results of a Forward that is not wanted: the statistics are known
FROZEN = (0.0, 0.0), ((0, 0),) * 5, (0,) * 5


class GradientVectors:
    """dweight and dbias as a backward kernel writes them; on the CPU where they are of the sums'
    dtype.
    """

    def __init__(self, y: Tensor, types: tuple[torch.dtype | None, torch.dtype | None]) -> None:
        for dtype in types:
            if dtype is not None and dtype not in DTYPES:
                raise ValueError(f"batch_norm_bwd: a gradient cannot be {dtype}")
        own = stat_dtype(y.dtype) if y.device.type == "cpu" else None
        self._left = [None if own in (None, t) else t for t in types]
        kernels = (t if left is None else None for t, left in zip(types, self._left, strict=True))
        self._made = [
            None if t is None else torch.empty(y.size(1), dtype=t, device=y.device) for t in kernels
        ]
        self.vectors = tuple([numbered(t) for t in self._made])

    def settle(self, sums: Tensor, rstd: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """dweight and dbias, each None where there is none."""
        dweight, dbias = self._made
        if self._left != [None, None]:
            others = parameter_gradients(sums, rstd, *self._left)
            dweight, dbias = (
                o if m is None else m for m, o in zip(self._made, others, strict=True)
            )
        return dweight, dbias


def batch_norm_fwd(
    y: Tensor,  # [N, C, H, W]
    bn_weight: Tensor | None,  # [C], of any floating dtype, as are the next three
    bn_bias: Tensor | None,
    running_mean: Tensor | None,  # moved in place if training, else read
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
) -> Statistics:
    """mean, biased var, rstd, scale and bias: fresh [C] tensors, copies where they are frozen."""
    norm = (bn_weight, bn_bias, running_mean, running_var)
    check("batch_norm_fwd", y)
    check_norm("batch_norm_fwd", y, *norm, training, momentum)
    args = head(y)
    if on_cpu(args) and not training:
        assert running_mean is not None and running_var is not None  # checked
        dtype = stat_dtype(y.dtype)
        mean, var = running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True)
        return mean, var, *normalizers(mean, var, bn_weight, bn_bias, eps)
    c, f = require(), Forward(y, *norm, momentum, eps, args)
    given = (args, training, *f.numbers, f.vectors)
    tensors = (y.data_ptr(), *f.results)
    work = workspace(c.batch_norm_fwd_workspace(*given, (*tensors, 0)), y)
    c.batch_norm_fwd(*given, (*tensors, work.data_ptr()))
    return f.settle(elements_per_channel(y)) if training else f.statistics


def batch_norm_act_fwd(
    y: Tensor,  # [N, C, H, W]
    bn_weight: Tensor | None,  # [C], of any floating dtype, as are the next three
    bn_bias: Tensor | None,
    running_mean: Tensor | None,  # moved in place if training, else read
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    residual: Tensor | None,  # [N, C, H, W]
    relu: bool,
) -> tuple[Tensor, Statistics]:
    """batch_norm_fwd and bn_act_fwd; on a GPU in one kernel where y fits on the chip."""
    norm = (bn_weight, bn_bias, running_mean, running_var)
    check("batch_norm_act_fwd", y, {"residual": residual})
    check_norm("batch_norm_act_fwd", y, *norm, training, momentum)
    args = head(y)
    if training and not on_cpu(args):
        c, f = require(), Forward(y, *norm, momentum, eps, args)
        a = like(y)
        act = pointers(y, None, None, None, residual, None, None, None, a)
        given: tuple[Any, ...] = (args, *f.numbers, f.vectors)
        tensors = (y.data_ptr(), *f.results)
        size = c.batch_norm_act_fwd_cuda_workspace(*given, (*tensors, 0), relu, act)
        if size > 0:
            work = workspace(size, y)
            if c.batch_norm_act_fwd_cuda(*given, (*tensors, work.data_ptr()), relu, act):
                return a, f.settle(elements_per_channel(y))
    statistics = batch_norm_fwd(y, *norm, training, momentum, eps)
    mean, _, _, scale, bias = statistics
    return bn_act_fwd(y, mean, scale, bias, residual, None, None, None, relu), statistics


def batch_norm_bwd(
    g: Tensor,  # [N, C, H, W]
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    rstd: Tensor,  # [C]
    sums: Tensor,  # [2, C]: sum g, sum g*(y - mean)
    training: bool,
    weight_dtype: torch.dtype | None,  # of dweight; None: there is none
    bias_dtype: torch.dtype | None,
    mask_bias: Tensor | None = None,  # [C], on a GPU: g is yet to be masked by relu, bias included
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy = scale*g + c0 + c1*(y - mean) with c0 = c1 = 0 unless training, dweight and dbias."""
    per_channel: dict[str, Tensor | None] = {"mean": mean, "scale": scale, "rstd": rstd}
    per_channel |= {"sums": sums, "mask_bias": mask_bias}
    check("batch_norm_bwd", y, {"g": g}, per_channel)
    types = (weight_dtype, bias_dtype)
    dy, args, found = like(y), head(y), GradientVectors(y, types)
    if y.numel() == 0 and not on_cpu(args):
        return dy, *parameter_gradients(sums, rstd, *types)
    if mask_bias is not None and on_cpu(args):
        raise ValueError("batch_norm_bwd: mask_bias is for a GPU")
    work = vectors(y, 2) if on_cpu(args) else None
    inputs = pointers(g, y, mean, scale, rstd, sums, mask_bias, dy, work)
    require().batch_norm_bwd(args, training, inputs, *found.vectors)
    return dy, *found.settle(sums, rstd)


def batch_norm_act_bwd(
    grad: Tensor,  # [N, C, H, W]
    out: Tensor | None,  # [N, C, H, W], the activation; None: no ReLU
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C], as are the next three
    scale: Tensor,
    bias: Tensor,
    rstd: Tensor,
    residual: bool,  # whether one joined, whose gradient g is
    training: bool,
    weight_dtype: torch.dtype | None,  # of dweight; None: there is none
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """(g or None, dy, dweight, dbias): bn_act_bwd and batch_norm_bwd.

    On a GPU without a residual both passes take the mask from y, and g is never written.
    """
    rest = (training, weight_dtype, bias_dtype)
    if out is not None and not residual and not on_cpu(head(y)):
        sums = masked_sums(grad, y, mean, scale, bias)
        return None, *batch_norm_bwd(grad, y, mean, scale, rstd, sums, *rest, mask_bias=bias)
    g, sums, _ = bn_act_bwd(grad, None, out, y, mean, None, None)
    return g, *batch_norm_bwd(g, y, mean, scale, rstd, sums, *rest)
