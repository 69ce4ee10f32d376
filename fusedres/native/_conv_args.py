"""What conv_bn's kernels of every device ask of their operands."""

from __future__ import annotations

from torch import Tensor

from fusedres._checks import check_reach
from fusedres._conv import Source
from fusedres.native._args import check


def check_source(op: str, source: Source) -> None:
    """The input and what belongs to it."""
    x, mean, scale, bias, residual, res_mean, res_scale, res_bias, _ = source
    own = {"mean": mean, "scale": scale, "bias": bias}
    joined = {"res_mean": res_mean, "res_scale": res_scale, "res_bias": res_bias}
    given = {n: v for n, v in own.items() if v is not None}  # of a Tensor there are none
    check(op, x, {"residual": residual}, given | joined, name="x")
    if len(given) not in (0, 3) or (mean is None and residual is not None):
        raise ValueError(f"{op}: mean, scale and bias come together, a residual only with them")
    together = {v is None for v in joined.values()}
    if len(together) > 1 or (res_mean is not None and residual is None):
        raise ValueError(f"{op}: res_mean, res_scale and res_bias come together, with a residual")


def filters_of(op: str, weight: Tensor) -> Tensor:
    """A weight [K, C, 1, 1] as [K, C] lies without gaps."""
    check_reach(op, weight=weight)
    weight = weight.detach().resolve_neg()
    if weight.stride()[:2] == (weight.size(1), 1):
        return weight
    return weight.reshape(weight.shape[:2]).contiguous()
