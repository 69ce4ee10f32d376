"""conv_bn's autograd node: what is saved, and along which tensors gradients come and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedres._conv import Conv
from fusedres._norm import normalizers, parameter_gradients
from fusedres._plans import base_of, has, without
from fusedres._tensors import elements_per_channel, memory_format_of
from fusedres.library import conv_bn as split
from fusedres.ops import _contract as contract
from fusedres.ops import _conv_bn_ops, _sync  # noqa: F401  the registered ops
from fusedres.ops._packed import PackedWeights
from fusedres.ops.batch_norm import dtype_of, momentum_arguments, present, upstream

if TYPE_CHECKING:  # not there in every build of torch
    from torch.distributed import ProcessGroup


class NodeConfig(NamedTuple):
    """What a node needs beside tensors."""

    relu: bool  # of the input
    emit: bool
    sampled: tuple[int, int] | None  # the stride of the one reader of what is emitted
    maskable: bool  # what reads the result may leave the mask to us: it has ReLU, no residual
    conv: Conv
    training: bool
    momentum: float | Tensor
    eps: float
    backend: str
    plan: str
    packed: PackedWeights | None
    recompute: bool  # y again in backward, which then takes the sums itself
    sync: ProcessGroup | None


class ConvBNFunction(torch.autograd.Function):
    """The ten tensors of the input, `unmasked` of a Deferred and the carrier of a Sampled, either
    of which may get the gradient in place of x, weight, BatchNorm's four, config -> y, sums, mean,
    scale, bias, emitted, `unmasked` of the result, the carrier of the sampled activation.

    Saved: the input and its vectors; the activation if and only if it was emitted (the residual is
    then not saved) or the plan keeps it, its bits if the plan has them; a Deferred residual's y and
    mean; own y, mean, scale, bias, rstd, and where statistics are of several processes their share
    of this one; the weight as the parameter holds it, and its cast only where the casts of a whole
    model share one buffer.

    Kernels know their own batch alone. Where statistics are of several processes, the running ones
    are moved here, and backward's kernel, which divides by its own count, gets the sums over all
    processes times the share of this one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_sums: Tensor | None,
        x_mean: Tensor | None,
        x_scale: Tensor | None,
        x_bias: Tensor | None,
        residual: Tensor | None,
        res_sums: Tensor | None,
        res_mean: Tensor | None,
        res_scale: Tensor | None,
        res_bias: Tensor | None,
        x_unmasked: Tensor | None,
        x_sampled: Tensor | None,
        weight: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        config: NodeConfig,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        deferred = x_mean is not None
        source = (x, x_mean, x_scale, x_bias, residual, res_mean, res_scale, res_bias)
        packed = None if config.packed is None else config.packed.get(weight, x.dtype)
        running = (None, None) if config.sync is not None else (running_mean, running_var)
        y, mean, var, rstd, scale, bias, a, bits = torch.ops.fusedres.conv_bn_fwd(
            *source,
            config.relu,
            weight,
            packed,
            *config.conv,
            config.emit and deferred,
            bn_weight,
            bn_bias,
            *running,
            config.training,
            *momentum_arguments(config.momentum),
            config.eps,
            config.backend,
            config.plan,
        )
        share = None
        if config.sync is not None:
            count = elements_per_channel(y)
            if count == 0:  # no kernel ran
                mean, var = torch.zeros_like(mean), torch.zeros_like(var)
            shared = _sync.share(mean, var, count, config.sync)
            mean, share = shared.mean, shared.share
            rstd, scale, bias = normalizers(mean, shared.var, bn_weight, bn_bias, config.eps)
            _sync.update_running(running_mean, running_var, config.momentum, shared)
        emitted = sampled = unmasked = None
        if config.emit:
            # of a plain Tensor an alias: its second reader's gradient joins in our dgrad
            emitted = a if deferred else x.view_as(x)
        if config.sampled is not None:
            sampled = _carrier(x[:, :, :: config.sampled[0], :: config.sampled[1]])
        if config.maskable:
            unmasked = _carrier(y)
        saved_a = a if deferred and (config.emit or has(config.plan, "keep")) else None
        ctx.has_residual = residual is not None
        if saved_a is not None and res_mean is None:
            residual = None
        ctx.save_for_backward(
            x,
            x_mean,
            x_scale,
            x_bias,
            residual,
            res_mean,
            res_scale,
            res_bias,
            weight,
            saved_a,
            bits if bits.numel() > 0 else None,
            None if config.recompute else y,
            mean,
            scale,
            bias,
            rstd,
            share,
            packed,
        )
        constant = [mean, scale, bias]
        if emitted is not None and not (ctx.needs_input_grad[0] or ctx.needs_input_grad[5]):
            constant.append(emitted)  # nothing in front of it wants the gradient
            constant += [] if sampled is None else [sampled]
        ctx.mark_non_differentiable(*constant)
        ctx.memory_format = memory_format_of(y)  # Dynamo cannot tell it in backward
        ctx.config = config._replace(packed=None)  # freed with what is saved, not with the node
        ctx.parameters = dtype_of(bn_weight), dtype_of(bn_bias)
        sums = mean.new_empty(2, mean.size(0))
        return y, sums, mean, scale, bias, emitted, unmasked, sampled

    @staticmethod
    @contract.differentiable_once
    def backward(
        ctx: Any,
        g: Tensor | None,
        sums: Tensor | None,
        _mean: None,
        _scale: None,
        _bias: None,
        grad_a: Tensor | None,
        unmasked: Tensor | None,
        sampled: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        # as the parameter is stored, whose strides its gradient takes, and the cast beside it
        weight, packed = saved[8], saved[-1]
        *source, a, bits, y, mean, scale, bias, rstd, share = contract.stored_alike(
            *saved[:8], *saved[9:-1]
        )
        config: NodeConfig = ctx.config
        x, x_mean, _, _, _, res_mean, _, _ = source
        recorded = torch.compiler.is_compiling()
        memory_format = ctx.memory_format if recorded else memory_format_of(x)
        if config.recompute:
            assert g is not None  # of ValueFunction, which brings no sums
            y, y_bias = _recomputed(source, weight, packed, mean, rstd, config), None
            g = contract.dense(g, memory_format)
            _, sums, _ = torch.ops.fusedres.bn_act_bwd(g, None, y, mean, None, None, config.backend)
        else:
            own = (y, mean, scale, bias)
            g, sums, y_bias = _gradient(g, unmasked, sums, own, memory_format, config.backend)
        grad_a = _of_emitted(grad_a, sampled, x, memory_format, config)
        needs = ctx.needs_input_grad
        need_input, need_weight = any(needs[i] for i in (0, 5, 10, 11)), needs[12]
        g_in = in_sums = res_sums = dw = None
        own_sums, types = sums, ctx.parameters
        if config.sync is not None:  # whatever is needed here: other processes wait for us
            sums, types = _sync.add_up(sums, config.sync) * share, (None, None)
        if need_input or need_weight:
            g_in, in_sums, res_sums, dw, *gradients = torch.ops.fusedres.conv_bn_bwd(
                *source,
                config.relu,
                weight,
                packed,
                *config.conv,
                a,
                bits,
                g,
                sums,
                grad_a,
                y,
                mean,
                scale,
                rstd,
                y_bias,
                config.training,
                need_input,
                need_weight,
                *types,
                config.backend,
                config.plan,
            )
            gradients = present(gradients, *types)
        if config.sync is not None or not (need_input or need_weight):
            gradients = list(parameter_gradients(own_sums, rstd, *ctx.parameters))
        if not need_input or x_mean is None:
            in_sums = None
        if not need_input or res_mean is None:
            res_sums = None
        g_in = g_in if need_input else None
        g_residual = g_in if ctx.has_residual else None
        to_unmasked, to_sampled = has(config.plan, "unmasked"), has(config.plan, "compact")
        return (
            None if to_unmasked or to_sampled else g_in,
            *(in_sums, None, None, None),
            *(g_residual, res_sums, None, None, None),
            g_in if to_unmasked else None,
            g_in if to_sampled else None,
            dw if need_weight else None,
            *gradients,
            *(None, None, None),
        )


def _recomputed(
    source: Sequence[Tensor | None],
    weight: Tensor,
    packed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    config: NodeConfig,
) -> Tensor:
    """y as forward had it, by the same kernel, which takes no statistics now."""
    norm = (None, None, mean, rstd, False, 0.0, None, config.eps)
    conv = (weight, packed, *config.conv, False)
    plan = without(without(config.plan, "compact"), "unmasked")
    return torch.ops.fusedres.conv_bn_fwd(*source, config.relu, *conv, *norm, config.backend, plan)[
        0
    ]


def _carrier(like: Tensor) -> Tensor:
    """A tensor of a shape and dtype, and of one element's memory, that a gradient comes along."""
    return like.new_empty(1, 1, 1, 1).expand(like.shape)


def _gradient(
    g: Tensor | None,
    unmasked: Tensor | None,
    sums: Tensor | None,
    own: tuple[Tensor, Tensor, Tensor, Tensor],  # y, mean, scale, bias
    memory_format: torch.memory_format,  # y's
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient that came along either carrier or both, its sums, and the bias if it is still to
    be masked.
    """
    y, mean, scale, bias = own
    if unmasked is None:
        return *upstream("conv_bn", g, sums, y, memory_format), None
    if g is None:
        return *upstream("conv_bn", unmasked, sums, y, memory_format), bias
    joined = (None,) * 4
    a = torch.ops.fusedres.bn_act_fwd(y, mean, scale, bias, *joined, True, backend)
    g = g + torch.where(a <= 0, 0, unmasked)
    return *upstream("conv_bn", g, sums, y, memory_format), None


def _of_emitted(
    grad_a: Tensor | None,
    sampled: Tensor | None,
    x: Tensor,
    memory_format: torch.memory_format,  # y's
    config: NodeConfig,
) -> Tensor | None:
    """The gradient of what was emitted: of every pixel, or of those that were sampled."""
    if sampled is not None:
        sampled = contract.dense(sampled, memory_format)
        joins = base_of(config.plan) == "fused" or config.backend == "cpp"
        if grad_a is None and config.conv.stride == (1, 1) and joins:
            return sampled
        spread = split.spread(sampled, x)
        grad_a = spread if grad_a is None else grad_a + spread
    return None if grad_a is None else contract.dense(grad_a, memory_format)
