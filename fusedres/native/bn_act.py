"""Normalise, add a residual, apply ReLU, and its backward (csrc/cpu/bn_act.cpp,
csrc/cuda/bn_act.cu)."""

from __future__ import annotations

from torch import Tensor

from fusedres._checks import described
from fusedres.native import require
from fusedres.native._args import (
    Head,
    check,
    head,
    like,
    on_cpu,
    pointers,
    vectors,
    workspace,
)


def bn_act_fwd(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
    residual: Tensor | None,  # [N, C, H, W]
    res_mean: Tensor | None,  # [C], as are the next two; None: the residual is added as it is
    res_scale: Tensor | None,
    res_bias: Tensor | None,
    relu: bool,
) -> Tensor:
    """a = act((y - mean)*scale + bias + residual), [N, C, H, W] in y's memory format."""
    joined = (residual is not None, *(v is not None for v in (res_mean, res_scale, res_bias)))
    if joined not in ((False,) * 4, (True, False, False, False), (True,) * 4):
        raise ValueError("bn_act_fwd: res_mean, res_scale, res_bias come together, with residual")
    own = {"mean": mean, "scale": scale, "bias": bias}
    per_channel = {**own, "res_mean": res_mean, "res_scale": res_scale, "res_bias": res_bias}
    check("bn_act_fwd", y, {"residual": residual}, per_channel)
    a = like(y)
    tensors = (y, mean, scale, bias, residual, res_mean, res_scale, res_bias, a)
    require().bn_act_fwd(head(y), relu, pointers(*tensors))
    return a


def bn_act_bwd(
    grad: Tensor,  # [N, C, H, W]
    grad_extra: Tensor | None,  # [N, C, H, W], added to grad
    a: Tensor | None,  # [N, C, H, W], the activation; None: no ReLU
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    res_y: Tensor | None,  # [N, C, H, W], of a residual that is normalised too
    res_mean: Tensor | None,  # [C]
    out: Tensor | None = None,  # receives g; may be grad
    affine: tuple[Tensor, Tensor] | None = None,  # scale, bias: `a` is their round(relu(...)) of y
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(g, sums [2, C], res_sums [2, C] or None).

    g is grad itself where there is nothing to change (neither `a` nor `grad_extra`) and no `out`.
    An activation that follows from y alone is not read, but computed anew; `a` may be None then.
    """
    if (res_y is None) != (res_mean is None):
        raise ValueError("bn_act_bwd: res_y and res_mean come together")
    full = {"grad": grad, "grad_extra": grad_extra, "a": a, "res_y": res_y, "out": out}
    scale, bias = affine or (None, None)
    vectors_given = {"mean": mean, "res_mean": res_mean, "own_scale": scale, "own_bias": bias}
    check("bn_act_bwd", y, full, vectors_given)
    args = head(y)
    if a is not None or affine is not None or grad_extra is not None:
        g = like(y) if out is None else out
    elif out is None or out is grad:
        g = grad
    else:
        grad = g = out.copy_(grad)
    sums = vectors(y, 2)
    res_sums = None if res_y is None else vectors(y, 2)
    if res_y is not None:
        scale = bias = None
    masks = (a, None, None) if scale is None else (None, scale, bias)
    _run(args, y, grad, grad_extra, masks, mean, res_y, res_mean, g, sums, res_sums)
    return g, sums, res_sums


def masked_sums(
    grad: Tensor,  # [N, C, H, W]
    y: Tensor,  # [N, C, H, W], on a GPU
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
) -> Tensor:
    """bn_act_bwd's sums [2, C] for a = round(relu((y - mean)*scale + bias)), without g."""
    check("masked_sums", y, {"grad": grad}, {"mean": mean, "scale": scale, "bias": bias})
    args, sums = head(y), vectors(y, 2)
    if on_cpu(args):
        raise ValueError(f"masked_sums: y must be on a GPU, got {described(y)}")
    masks = (None, scale, bias)
    _run(args, y, grad, None, masks, mean, None, None, None, sums, None)
    return sums


def _run(
    args: Head,
    y: Tensor,
    grad: Tensor,
    grad_extra: Tensor | None,
    masks: tuple[Tensor | None, Tensor | None, Tensor | None],  # a; scale, bias
    mean: Tensor,
    res_y: Tensor | None,
    res_mean: Tensor | None,
    g: Tensor | None,
    sums: Tensor,
    res_sums: Tensor | None,
) -> None:
    c, (a, scale, bias) = require(), masks
    tensors = pointers(
        grad, grad_extra, a, y, mean, scale, bias, res_y, res_mean, g, sums, res_sums
    )
    work = workspace(c.bn_act_bwd_workspace(args, (*tensors, 0)), y)
    c.bn_act_bwd(args, (*tensors, work.data_ptr()))
