"""bn_act: materialise a Deferred, normalisation, residual add and ReLU in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres import backends
from fusedres._tensors import memory_format_of
from fusedres.deferred import Deferred
from fusedres.ops import _contract as contract
from fusedres.ops._contract import library, register_fake
from fusedres.reference.bn_act import bn_act as reference_bn_act

# --- the ops: schema, kernel look-up, fake --------------------------------------------------------

library.define(
    "bn_act_fwd(Tensor y, Tensor mean, Tensor scale, Tensor bias, Tensor? residual,"
    " Tensor? res_mean, Tensor? res_scale, Tensor? res_bias, bool relu, str backend) -> Tensor"
)
library.define(
    "bn_act_bwd(Tensor grad, Tensor? a, Tensor y, Tensor mean, Tensor? res_y, Tensor? res_mean,"
    " str backend) -> (Tensor g, Tensor sums, Tensor res_sums)"
)


def _fwd(
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    res_mean: Tensor | None,
    res_scale: Tensor | None,
    res_bias: Tensor | None,
    relu: bool,
    backend: str,
) -> Tensor:
    kernel = backends.kernels(backend, "bn_act").bn_act_fwd
    return kernel(y, mean, scale, bias, residual, res_mean, res_scale, res_bias, relu)


def _bwd(
    grad: Tensor,
    a: Tensor | None,
    y: Tensor,
    mean: Tensor,
    res_y: Tensor | None,
    res_mean: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = backends.kernels(backend, "bn_act").bn_act_bwd
    g, sums, res_sums = kernel(grad, None, a, y, mean, res_y, res_mean)
    if a is None:
        g = grad.new_empty(0)  # grad itself is g: an op may not return its input
    return g, sums, mean.new_empty(0) if res_sums is None else res_sums


def _bwd_fake(
    grad: Tensor, a: Tensor | None, y: Tensor, mean: Tensor, res_y: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    sums = mean.new_empty(2, mean.size(0))
    g = grad.new_empty(0) if a is None else torch.empty_like(y)
    return g, sums, mean.new_empty(0) if res_y is None else torch.empty_like(sums)


library.impl("bn_act_fwd", _fwd, "CompositeExplicitAutograd")
library.impl("bn_act_bwd", _bwd, "CompositeExplicitAutograd")
register_fake("bn_act_fwd", lambda y, *_: torch.empty_like(y))
register_fake("bn_act_bwd", _bwd_fake)


# --- autograd -------------------------------------------------------------------------------------


class BnActFunction(torch.autograd.Function):
    """Inputs: the fields of a Deferred, then the backend. Saves y, mean, and the output where ReLU
    is on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        sums: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        res_sums: Tensor | None,
        res_mean: Tensor | None,
        res_scale: Tensor | None,
        res_bias: Tensor | None,
        relu: bool,
        backend: str,
    ) -> Tensor:
        a = torch.ops.fusedres.bn_act_fwd(
            y, mean, scale, bias, residual, res_mean, res_scale, res_bias, relu, backend
        )
        res_y = None if res_mean is None else residual
        ctx.save_for_backward(y, mean, a if relu else None, res_y, res_mean)
        ctx.backend = backend
        ctx.has_residual = residual is not None
        return a

    @staticmethod
    @contract.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, mean, a, res_y, res_mean = ctx.saved_tensors
        y, mean, a, res_y, res_mean = contract.stored_alike(y, mean, a, res_y, res_mean)
        grad = contract.dense(grad, memory_format_of(y))
        g, sums, res_sums = torch.ops.fusedres.bn_act_bwd(
            grad, a, y, mean, res_y, res_mean, ctx.backend
        )
        if a is None:
            g = grad
        g_residual = g if ctx.has_residual else None
        res_sums = None if res_y is None else res_sums
        return g, sums, None, None, None, g_residual, res_sums, None, None, None, None, None


class ValueFunction(torch.autograd.Function):
    """y, mean, scale, bias, residual [N, C, H, W] or None, relu, backend -> the value, for a y that
    is not kept: saves the output alone, and leaves the sums of g to the node that made y.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        mean: Tensor,
        scale: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        relu: bool,
        backend: str,
    ) -> Tensor:
        a = torch.ops.fusedres.bn_act_fwd(
            y, mean, scale, bias, residual, None, None, None, relu, backend
        )
        ctx.save_for_backward(a if relu else None)
        ctx.backend, ctx.has_residual = backend, residual is not None
        return a

    @staticmethod
    @contract.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (a,) = ctx.saved_tensors
        g = grad
        if a is not None:
            (a,) = contract.stored_alike(a)
            grad = contract.dense(grad, memory_format_of(a))
            g = torch.ops.fusedres.add_relu_bwd(grad, a, ctx.backend)
        return g, None, None, None, g if ctx.has_residual else None, None, None


# --- the public function --------------------------------------------------------------------------


def bn_act(input: Deferred) -> Tensor:
    """The value of a Deferred: act((y - mean) * scale + bias [+ residual]).

    Args:
        input: a Deferred over y [N, C, H, W] in fp32, fp16, bf16 or fp64.

    Returns:
        [N, C, H, W] in y's dtype and memory format (channels_last on a GPU).

    Raises:
        TypeError: input is no Deferred, or a field has the wrong type or dtype.
        ValueError: a field has the wrong shape or device.
        RuntimeError: the backend asked for by name cannot serve these tensors.
    """
    if not isinstance(input, Deferred):
        raise TypeError(f"bn_act: input must be a Deferred, got {type(input).__name__}")
    contract.check_deferred("bn_act", "input", input)
    contract.check_savable("bn_act", input=input)
    backend = backends.backend_for("bn_act", input.y)
    backend = "reference" if contract.exporting() else backend
    input = settle("bn_act", input, backend)
    if backend == "reference" or input.is_ordinary():
        return reference_value(input)
    return BnActFunction.apply(*flatten(input), input.relu, backend)


def reference_value(d: Deferred) -> Tensor:
    """The value by plain torch under ordinary autograd."""
    r = d.residual
    if isinstance(r, Deferred):
        joined = (r.y, r.mean, r.scale, r.bias)
    else:
        joined = (r, None, None, None)  # type: ignore[assignment]
    return reference_bn_act(d.y, d.mean, d.scale, d.bias, *joined, d.relu)


def settle(op: str, d: Deferred, backend: str) -> Deferred:
    """d brought to one memory format and one gradient protocol, as `backend` reads it.

    Raises:
        RuntimeError: plain autograd ("reference") is to read a Deferred that carries the protocol.
    """
    r = d.residual
    carriers = [d.sums, r.sums if isinstance(r, Deferred) else None]
    if backend == "reference" and any(s is not None and s.requires_grad for s in carriers):
        raise RuntimeError(
            f"{op}: backend 'reference' runs under ordinary autograd and cannot read a Deferred "
            "made by another backend; call .value() on it within that backend's scope"
        )
    if isinstance(r, Deferred) and r.is_ordinary() != d.is_ordinary() and backend != "reference":
        r = bn_act(r)  # one side runs through plain autograd: join as a Tensor
    memory_format = memory_format_of(d.y)
    if isinstance(r, Deferred):
        r = _dense(r, memory_format, None)
    elif r is not None:
        r = contract.dense(r, memory_format)
    return _dense(d, memory_format, r)


def _dense(
    d: Deferred, memory_format: torch.memory_format, r: Tensor | Deferred | None
) -> Deferred:
    mean, scale, bias = (v.contiguous() for v in (d.mean, d.scale, d.bias))
    y = contract.dense(d.y, memory_format)
    return Deferred(y, mean, scale, bias, r, d.relu, d.sums, d.unmasked)


def flatten(d: Deferred) -> tuple[Tensor | None, ...]:
    """The ten tensors an autograd Function takes for a settled Deferred; relu goes beside them."""
    r = d.residual
    joined: tuple[Tensor | None, ...]
    if isinstance(r, Deferred):
        joined = (r.y, r.sums, r.mean, r.scale, r.bias)
    else:
        joined = (r, None, None, None, None)
    return d.y, d.sums, d.mean, d.scale, d.bias, *joined
