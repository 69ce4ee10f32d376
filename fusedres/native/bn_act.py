"""Normalise, add a residual, apply ReLU, and its backward (csrc/cpu/bn_act.cpp,
csrc/cuda/bn_act.cu)."""

from __future__ import annotations

from torch import Tensor

from fusedres.native import require
from fusedres.native._args import check, head, like, pointers, vectors, workspace


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(g, sums [2, C], res_sums [2, C] or None).

    g is grad itself where there is nothing to change (neither `a` nor `grad_extra`) and no `out`.
    """
    if (res_y is None) != (res_mean is None):
        raise ValueError("bn_act_bwd: res_y and res_mean come together")
    full = {"grad": grad, "grad_extra": grad_extra, "a": a, "res_y": res_y, "out": out}
    check("bn_act_bwd", y, full, {"mean": mean, "res_mean": res_mean})
    c = require()
    args = head(y)
    if a is not None or grad_extra is not None:
        g = like(y) if out is None else out
    elif out is None or out is grad:
        g = grad
    else:
        grad = g = out.copy_(grad)
    sums = vectors(y, 2)
    res_sums = None if res_y is None else vectors(y, 2)
    tensors = pointers(grad, grad_extra, a, y, mean, res_y, res_mean, g, sums, res_sums)
    work = workspace(c.bn_act_bwd_workspace(args, (*tensors, 0)), y)
    c.bn_act_bwd(args, (*tensors, work.data_ptr()))
    return g, sums, res_sums
