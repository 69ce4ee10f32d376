"""conv_bn's registered ops: schema, kernel look-up, fake."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres import backends
from fusedres._checks import check_packed, check_reach
from fusedres._conv import Conv, Source, Upstream, output_shape
from fusedres._plans import Plan
from fusedres._tensors import memory_format_of
from fusedres.library import conv_bn as split
from fusedres.ops._contract import library, register_fake
from fusedres.ops.batch_norm import normalization, statistics_fake

_SOURCE = (
    "Tensor x, Tensor? mean, Tensor? scale, Tensor? bias, Tensor? residual, Tensor? res_mean,"
    " Tensor? res_scale, Tensor? res_bias, bool relu"
)
# `packed` is the weight in the compute dtype, where it was cast together with others already
_CONV = "Tensor weight, Tensor? packed, int[2] stride, int[4] padding, int[2] dilation, int groups"
library.define(
    f"conv_bn_fwd({_SOURCE}, {_CONV}, bool emit, Tensor? bn_weight, Tensor? bn_bias,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum,"
    " Tensor? momentum_tensor, float eps, str backend, str plan) -> (Tensor y, Tensor y_mean,"
    " Tensor y_var, Tensor y_rstd, Tensor y_scale, Tensor y_bias, Tensor a, Tensor bits)"
)
library.define(
    f"conv_bn_bwd({_SOURCE}, {_CONV}, Tensor? a, Tensor? bits, Tensor g, Tensor sums,"
    " Tensor? grad_a, Tensor y, Tensor y_mean, Tensor y_scale, Tensor y_rstd, Tensor? y_bias,"
    " bool training, bool need_input, bool need_weight, ScalarType? bn_weight_dtype,"
    " ScalarType? bn_bias_dtype, str backend, str plan) -> (Tensor g_in, Tensor in_sums,"
    " Tensor res_sums, Tensor dw, Tensor dweight, Tensor dbias)"
)


class _Operands(NamedTuple):
    """What both directions start with."""

    source: Source
    weight: Tensor
    packed: Tensor | None
    conv: Conv

    @classmethod
    def of(cls, args: tuple[Any, ...]) -> tuple[_Operands, tuple[Any, ...]]:
        """An op's arguments, in the order of its schema, and what follows these."""
        source, rest = Source(*args[:9]), args[9:]
        stride, padding, dilation, groups = rest[2:6]
        conv = Conv(tuple(stride), tuple(padding), tuple(dilation), groups)
        return cls(source, rest[0], rest[1], conv.reduced(source.x.shape, rest[0].shape)), rest[6:]

    def check(self, op: str, **others: Tensor | None) -> None:
        """What the library's convolution reads, and nothing of ours checks."""
        self.conv.check(op)
        check_reach(op, x=self.source.x, weight=self.weight, packed=self.packed, **others)
        check_packed(op, self.weight, self.packed)

    def cast_weight(self, backend: str, plan: Plan) -> Tensor:
        """The weight in the compute dtype; as it is stored, where the kernel casts it itself."""
        if self.packed is not None:
            return self.packed
        casts = (backend, plan.base) == ("cpp", "fused")
        return self.weight if casts else self.weight.to(self.source.x.dtype)


class _Forward(NamedTuple):
    """What the forward op takes beside its operands."""

    emit: bool
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    momentum_tensor: Tensor | None
    eps: float
    backend: str
    plan: str


class _Backward(NamedTuple):
    """What the backward op takes beside its operands."""

    a: Tensor | None  # [N, C, H, W], the activation, where it was emitted or kept
    bits: Tensor | None  # [N*H*W, C/8], where an emitted one lets a gradient through
    g: Tensor
    sums: Tensor
    grad_a: Tensor | None  # of the emitted activation, or of every second row and column of it
    y: Tensor
    y_mean: Tensor
    y_scale: Tensor
    y_rstd: Tensor
    y_bias: Tensor | None  # g is still to be masked
    training: bool
    need_input: bool
    need_weight: bool
    bn_weight_dtype: torch.dtype | None
    bn_bias_dtype: torch.dtype | None
    backend: str
    plan: str


def fwd(*args: Any) -> tuple[Tensor, ...]:
    """conv_bn_fwd; `a` also where the plan keeps it, and empty tensors for what there is not."""
    operands, rest = _Operands.of(args)
    operands.check("conv_bn_fwd")
    o = _Forward(*rest)
    norm, plan = normalization(*o[1:9]), Plan.of(o.plan)
    source, conv, weight = operands.source, operands.conv, operands.cast_weight(o.backend, plan)
    a = bits = None
    product = _product(o.backend, plan)
    if product and source.x.numel() == 0:
        plan = Plan("split")
    if plan.base == "fused":
        kernel = backends.kernels(o.backend, "conv_bn").conv_bn_fwd
        more = {"product": product} if product else {}
        y, statistics, a, bits = kernel(source, weight, conv, o.emit, plan.masks, *norm, **more)
    else:
        a = split.materialise(backends.kernels(o.backend, "bn_act"), source)
        if plan.base == "epilogue":
            kernel = backends.kernels(o.backend, "conv_bn").conv_bn_fwd
            y, statistics, *_ = kernel(Source.plain(a), weight, conv, False, False, *norm)
        else:
            y = split.convolution(a, weight, conv, memory_format_of(source.x))
            statistics = backends.kernels(o.backend, "batch_norm").batch_norm_fwd(y, *norm)
        if not (o.emit or (plan.keep and source.mean is not None)):
            a = None
    a = y.new_empty(0) if a is None else a
    return y, *statistics, a, y.new_empty(0, dtype=torch.uint8) if bits is None else bits


def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, rest = _Operands.of(args)
    x, o = operands.source.x, _Forward(*rest)
    plan = Plan.of(o.plan)
    shape = output_shape(x.shape, operands.weight.shape, operands.conv)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    kept = o.emit or (plan.keep and operands.source.mean is not None)
    bits = x.new_empty(0, dtype=torch.uint8)
    if o.emit and plan.masks and x.size(1) % 8 == 0:
        bits = x.new_empty(x.size(0) * x.size(2) * x.size(3), x.size(1) // 8, dtype=torch.uint8)
    return y, *statistics_fake(y), torch.empty_like(x) if kept else x.new_empty(0), bits


def bwd(*args: Any) -> tuple[Tensor, ...]:
    """conv_bn_bwd; empty tensors for what there is not."""
    operands, rest = _Operands.of(args)
    o = _Backward(*rest)
    operands.check("conv_bn_bwd", a=o.a, grad_a=o.grad_a)
    plan = Plan.of(o.plan)
    source, conv, weight = operands.source, operands.conv, operands.cast_weight(o.backend, plan)
    out = output_shape(source.x.shape, weight.shape, conv)
    if tuple(o.y.shape) != out:  # the library would believe it
        raise ValueError(f"conv_bn_bwd: y must have shape {list(out)}, got {list(o.y.shape)}")
    own = (o.y, o.y_mean, o.y_scale, o.y_rstd)
    up = Upstream(o.g, o.sums, *own, o.y_bias, o.training)
    needs = (o.need_input, o.need_weight)
    types = (o.bn_weight_dtype, o.bn_bias_dtype)
    outputs: tuple[Tensor | None, ...]
    product = _product(o.backend, plan)
    if product and source.x.numel() == 0:
        outputs = _library_bwd(operands, weight, up, o, Plan("split", compact=plan.compact))
    elif product:
        outputs = _product_bwd(operands, weight, up, o, product)
    elif plan.base == "fused":
        kernel = backends.kernels(o.backend, "conv_bn").conv_bn_bwd
        outputs = kernel(
            source, weight, operands.weight, conv, o.a, o.bits, up, o.grad_a, plan, *needs, *types
        )
    else:
        outputs = _library_bwd(operands, weight, up, o, plan)
    return tuple(o.g.new_empty(0) if t is None else t for t in outputs)


def _product(backend: str, plan: Plan) -> str:
    """By which of _plans.PRODUCTS the backend "cuda" runs it; "" where it does not."""
    product = plan.product or ("mma" if (backend, plan.base) == ("cuda", "fused") else "")
    if product and backend != "cuda":
        raise ValueError(f"conv_bn: backend {backend!r} has no plan {str(plan)!r}")
    return product


def _product_bwd(
    operands: _Operands, weight: Tensor, up: Upstream, o: _Backward, product: str
) -> tuple[Tensor | None, ...]:
    """dgrad by the backend "cuda", wgrad by Triton or the library."""
    source, conv, a = operands.source, operands.conv, o.a
    light, types = backends.kernels("cuda", "bn_act"), (o.bn_weight_dtype, o.bn_bias_dtype)
    if a is None and source.residual is not None:
        a = split.materialise(light, source)
    g_in = sums = res_sums = dw = None
    if o.need_input:
        kernel = backends.kernels("cuda", "conv_bn").conv_bn_dgrad
        found = kernel(source, weight, conv, a, up, o.grad_a, product, o.need_weight, *types)
        g_in, sums, res_sums, dy, *gradients = found
    else:
        own = (up.y, up.mean, up.scale, up.rstd, up.sums, up.training)
        apply = backends.kernels("cuda", "batch_norm").batch_norm_bwd
        dy, *gradients = apply(up.g, *own, *types, mask_bias=up.bias)
    if o.need_weight:
        ready, x = source if a is None else Source.plain(a), source.x
        if backends.unavailable("triton", "conv_bn", x.device.type, x.dtype) is None:
            wgrad = backends.kernels("triton", "conv_bn").conv_bn_wgrad
            dw = wgrad(ready, dy, weight, operands.weight, conv)
        else:
            a = split.materialise(light, ready)
            _, library_dw = split.convolution_backward(dy, a, weight, conv, False, True)
            assert library_dw is not None
            dw = split.stored_as(library_dw, operands.weight)
    return g_in, sums, res_sums, dw, *gradients


def _library_bwd(
    operands: _Operands, weight: Tensor, up: Upstream, o: _Backward, plan: Plan
) -> tuple[Tensor | None, ...]:
    """By light passes and the library; by our own dgrad in the plan "epilogue"."""
    source, conv, parameter = operands.source, operands.conv, operands.weight
    light, a, grad_a = backends.kernels(o.backend, "bn_act"), o.a, o.grad_a
    # an activation that was emitted may hold a residual, which is not saved then
    from_x = source.residual is None and (a is None or plan.keep)
    apply = backends.kernels(o.backend, "batch_norm").batch_norm_bwd
    masked = {} if o.y_bias is None else {"mask_bias": o.y_bias}
    types = (o.bn_weight_dtype, o.bn_bias_dtype)
    own = (up.y, up.mean, up.scale, up.rstd, up.sums)
    dy, *gradients = apply(up.g, *own, up.training, *types, **masked)
    dw = None
    if plan.base == "epilogue" and o.need_input:
        if grad_a is not None and grad_a.shape != source.x.shape:
            grad_a = split.spread(grad_a, source.x)
        kernel = backends.kernels(o.backend, "conv_bn").conv_bn_dgrad
        g_in, sums, res_sums = kernel(source, weight, conv, a, up, dy, grad_a)
        if plan.compact:
            step_h, step_w = conv.stride
            g_in = g_in[:, :, ::step_h, ::step_w].contiguous(memory_format=memory_format_of(g_in))
        if o.need_weight:
            a = split.materialise(light, source) if a is None else a
            _, dw = split.convolution_backward(dy, a, weight, conv, False, True)
            dw = None if dw is None else split.stored_as(dw, parameter)
    else:
        wgrad = None
        if o.backend == "cpp":
            kernels = backends.kernels("cpp", "conv_bn")
            ready = source if a is None else Source.plain(a)
            served = kernels.serves_wgrad(ready, parameter, conv)
            wgrad = kernels.conv_bn_wgrad if served and not kernels.outrun(weight.dtype) else None
        g_in, sums, res_sums, dw = split.conv_bn_bwd(
            light, wgrad, dy, grad_a, source, a, weight, parameter, conv, from_x, plan,
            o.need_input, o.need_weight, memory_format_of(source.x),
        )  # fmt: skip
    return g_in, sums, res_sums, dw, *gradients


def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, rest = _Operands.of(args)
    x, mean, res_mean = (getattr(operands.source, name) for name in ("x", "mean", "res_mean"))
    o = _Backward(*rest)
    none = x.new_empty(0)
    g_in = torch.empty_like(x) if o.need_input else none
    if o.need_input and Plan.of(o.plan).compact:
        shape = (*x.shape[:2], *o.y.shape[2:])
        g_in = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    sums = none if mean is None or not o.need_input else mean.new_empty(2, mean.size(0))
    res_sums = none if res_mean is None or not o.need_input else torch.empty_like(sums)
    dw = torch.empty_like(operands.weight) if o.need_weight else none
    types = (o.bn_weight_dtype, o.bn_bias_dtype)
    vectors = (none if t is None else o.y_mean.new_empty(o.y.size(1), dtype=t) for t in types)
    return g_in, sums, res_sums, dw, *vectors


library.impl("conv_bn_fwd", fwd, "CompositeExplicitAutograd")
library.impl("conv_bn_bwd", bwd, "CompositeExplicitAutograd")
register_fake("conv_bn_fwd", _fwd_fake)
register_fake("conv_bn_bwd", _bwd_fake)
