"""conv_bn: a convolution, the activation in front of it and the statistics behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from fusedres import backends
from fusedres._conv import Conv, output_shape
from fusedres._plans import base_of, without
from fusedres._tensors import elements_per_channel, memory_format_of
from fusedres.deferred import Deferred, Sampled
from fusedres.ops import _contract as contract
from fusedres.ops import _sync
from fusedres.ops._conv_bn_node import ConvBNFunction, NodeConfig
from fusedres.ops._packed import packed_weights
from fusedres.ops.bn_act import ValueFunction, flatten, reference_value, settle
from fusedres.reference.batch_norm import affine_map
from fusedres.reference.conv_bn import conv_bn as reference_conv_bn

if TYPE_CHECKING:  # not there in every build of torch
    from torch.distributed import ProcessGroup

_PADDING_LIMIT = 2**16  # far from it, libraries overflow or ask for all memory


def check_conv(
    op: str,
    x: Tensor,
    weight: object,
    stride: object,
    padding: object,
    dilation: object,
    groups: object,
) -> tuple[Tensor, Conv]:
    """The weight and the geometry, against an input of x's shape."""
    w = contract.check_tensor(op, "weight", weight)
    contract.check_same_device(op, "weight", w, x, "the activation")
    count = contract.check_int(op, "groups", groups, 1)
    if x.size(1) != w.size(1) * count:
        raise ValueError(
            f"{op}: weight has {w.size(1)} input channels"
            + (f" in each of {count} groups" if count > 1 else "")
            + f" (shape {list(w.shape)}), the activation has {x.size(1)} (shape {list(x.shape)})"
        )
    if w.size(0) % count:
        raise ValueError(
            f"{op}: groups must divide weight's {w.size(0)} output channels, got {count}"
        )
    if 0 in w.shape:
        raise ValueError(f"{op}: weight must not be empty, got shape {list(w.shape)}")
    if isinstance(padding, tuple | list) and len(padding) == 4:
        top, bottom, left, right = (
            contract.check_int(op, "padding", p, 0, _PADDING_LIMIT) for p in padding
        )
    else:
        top, left = contract.check_pair(op, "padding", padding, 0, _PADDING_LIMIT)
        bottom, right = top, left
    conv = Conv(
        contract.check_pair(op, "stride", stride, 1),
        (top, bottom, left, right),
        contract.check_pair(op, "dilation", dilation, 1),
        count,
    )
    shape = output_shape(x.shape, w.shape, conv)
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(
            f"{op}: weight's kernel {list(w.shape[2:])} does not fit the padded input "
            f"(shape {list(x.shape)}, padding {list(conv.padding)}, dilation {list(conv.dilation)})"
        )
    return w, conv.reduced(x.shape, w.shape)


class _Options(TypedDict, total=False):
    """Arguments that say nothing of what conv_bn returns."""

    stride: int | tuple[int, int]
    padding: int | tuple[int, int] | tuple[int, int, int, int]
    dilation: int | tuple[int, int]
    groups: int
    training: bool
    momentum: float | Tensor
    eps: float
    residual: Tensor | Deferred | None
    relu: bool
    sync: ProcessGroup | None


@overload
def conv_bn(
    input: Tensor | Deferred | Sampled,
    weight: Tensor,
    bn_weight: Tensor | None = ...,
    bn_bias: Tensor | None = ...,
    running_mean: Tensor | None = ...,
    running_var: Tensor | None = ...,
    *,
    emit: Literal[False] = ...,
    recompute: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Deferred: ...


@overload
def conv_bn(
    input: Tensor | Deferred | Sampled,
    weight: Tensor,
    bn_weight: Tensor | None = ...,
    bn_bias: Tensor | None = ...,
    running_mean: Tensor | None = ...,
    running_var: Tensor | None = ...,
    *,
    recompute: Literal[True],
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def conv_bn(
    input: Tensor | Deferred | Sampled,
    weight: Tensor,
    bn_weight: Tensor | None = ...,
    bn_bias: Tensor | None = ...,
    running_mean: Tensor | None = ...,
    running_var: Tensor | None = ...,
    *,
    emit: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Deferred, Tensor]: ...


@overload
def conv_bn(
    input: Tensor | Deferred | Sampled,
    weight: Tensor,
    bn_weight: Tensor | None = ...,
    bn_bias: Tensor | None = ...,
    running_mean: Tensor | None = ...,
    running_var: Tensor | None = ...,
    *,
    emit: tuple[int, int],
    **options: Unpack[_Options],
) -> tuple[Deferred, Sampled]: ...


def conv_bn(
    input: Tensor | Deferred | Sampled,
    weight: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[int, int, int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    residual: Tensor | Deferred | None = None,
    relu: bool = True,
    emit: bool | tuple[int, int] = False,
    recompute: bool = False,
    sync: ProcessGroup | None = None,
) -> Deferred | Tensor | tuple[Deferred, Tensor | Sampled]:
    """Convolution of an activation and the BatchNorm of its output, deferred.

    The input's own normalisation, residual add and ReLU run on the way in, the statistics of the
    output on the way out (cuDNN calls the parts scale-bias-activation-convolution and genstats);
    what the Deferred stands for is computed by whatever reads it.

    Args:
        input: Tensor [N, C, H, W], or a Deferred of that shape, or a Sampled; fp32, fp16, bf16 or
            fp64. Where autocast is on, its dtype is used and weight is cast on the way.
        weight: [K, C / groups, R, S]; without autocast of the input's dtype.
        bn_weight, bn_bias: [K], any floating dtype; None stands for ones and zeros.
        running_mean, running_var: [K], moved in place by `momentum` if training; read if not.
        stride, dilation: int or (height, width).
        padding: int, (height, width), or (top, bottom, left, right); zeros.
        groups: number of groups of channels.
        training: normalise by this batch's mean and biased variance.
        momentum: a number, or a 0-d tensor on the input's device.
        eps: added to the variance.
        residual: what joins before the activation of the result: a Tensor of its shape, or a
            Deferred without ReLU and without a residual of its own.
        relu: whether the activation that the result stands for ends in ReLU.
        emit: also return the input's value, which a shortcut reads; for a Deferred only with a 1x1
            kernel, stride 1 and no padding, where one kernel can write it exactly once. The stride
            (1 or 2 each) of the one 1x1 convolution that reads it, instead of True: returns a
            Sampled, which that convolution takes as its input, so that no gradient is made for the
            pixels between.
        recompute: return the value as a Tensor, and keep y for it neither here nor in what reads
            it: backward runs the convolution again, to the same bits (backend "reference", under
            ordinary autograd, keeps what it keeps).
        sync: a torch.distributed.ProcessGroup over whose batches the statistics are taken in
            training, as nn.SyncBatchNorm has it; batches may differ in size or be empty. All its
            processes call, and run backward through the result, in the same order. The gradients
            of bn_weight and bn_bias are of this process's batch. None: of this batch alone.

    Returns:
        Deferred over y [N, K, OH, OW]; with `recompute` its value; with `emit` the pair (Deferred,
        input's value [N, C, H, W], or a Sampled that holds it). All in the input's memory format
        (channels_last on a GPU).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named; a
            kernel larger than the padded input; one value per channel in training without `sync`.
        RuntimeError: the backend or plan asked for by name cannot serve these tensors; a graph is
            recorded with `sync`; torch.distributed's own.
    """
    op, source = "conv_bn", input if isinstance(input, Sampled) else None
    if isinstance(input, Sampled):
        input = contract.check_tensor(op, "input.value", input.value)
    if isinstance(input, Deferred):
        contract.check_deferred(op, "input", input)
        x = input.y
    else:
        x = contract.check_tensor(op, "input", input)
    weight, conv = check_conv(op, x, weight, stride, padding, dilation, groups)
    if source is not None:
        _check_sampled(op, source, weight, conv)
    bn = contract.check_batch_norm(
        op,
        x,
        weight.size(0),
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
    )
    sync = _sync.check_sync(op, sync, bn.training)
    contract.check_bool(op, "relu", relu)
    pointwise = (
        tuple(weight.shape[2:]) == (1, 1) and conv.stride == (1, 1) and not any(conv.padding)
    )
    sampled = None
    if isinstance(emit, tuple):
        sampled, emit = contract.check_pair(op, "emit", emit, 1), True
        if max(sampled) > 2:
            raise ValueError(f"{op}: emit must be True, False or strides of 1 and 2, got {sampled}")
    if contract.check_bool(op, "emit", emit) and isinstance(input, Deferred) and not pointwise:
        raise ValueError(
            f"{op}: emit of a Deferred needs a 1x1 kernel, stride 1 and no padding, got kernel "
            f"{list(weight.shape[2:])}, stride {list(conv.stride)}, padding {list(conv.padding)}; "
            "pass input.value() instead"
        )
    if contract.check_bool(op, "recompute", recompute) and emit:
        raise ValueError(f"{op}: recompute gives a Tensor and nothing beside it, not with emit")
    if recompute and isinstance(residual, Deferred):
        residual = residual.value()
    shape = output_shape(x.shape, weight.shape, conv)
    contract.check_count(op, shape, training and sync is None)
    residual = contract.check_join(op, residual, x, shape)
    joined = {"input": input, "residual": residual}
    contract.check_savable(op, weight=weight, bn_weight=bn.weight, bn_bias=bn.bias, **joined)
    dtype = contract.compute_dtype(x)
    if weight.dtype != dtype and not contract.autocast_on(x):
        raise TypeError(
            f"{op}: weight must be {dtype} as the input, got {weight.dtype}; or use autocast"
        )
    choice = backends.choose(op, x.device.type, dtype)
    backend = "reference" if contract.exporting() else choice.backend
    if isinstance(input, Deferred):
        input = settle(op, input, backend)
        if input.dtype != dtype:
            input = input.value().to(dtype)
        elif backend == "reference" or input.is_ordinary():
            input = reference_value(input)
    else:
        input = contract.dense(x.to(dtype), memory_format_of(x))

    with contract.without_autocast(x):
        if backend == "reference":
            assert isinstance(input, Tensor)
            y, mean, var, scale, bias = reference_conv_bn(
                input, weight, *conv, bn.weight, bn.bias, bn.running_mean, bn.running_var,
                bn.training, bn.eps,
            )  # fmt: skip
            if sync is None:
                contract.update_running(bn, mean, var, y)
            else:
                shared = _sync.share(mean, var, elements_per_channel(y), sync)
                mean = shared.mean
                scale, bias = affine_map(mean, shared.var, bn.weight, bn.bias, bn.eps)
                _sync.update_running(bn.running_mean, bn.running_var, bn.momentum, shared)
            sums, emitted, unmasked = None, input, None
            carrier = input if sampled is None else input[:, :, :: sampled[0], :: sampled[1]]
        else:
            backend, plan = backends.way_of(choice, dtype, weight, conv, shape, memory_format_of(x))
            carriers, plan = _carriers(input, source, emit, backend, plan)
            tensors = flatten(input) if isinstance(input, Deferred) else (input, *(None,) * 9)
            # Dynamo makes zeros of the gradients that do not come: masks and sums of nothing
            carriers_pay = backend in _MASKING and not torch.compiler.is_compiling()
            maskable = relu and residual is None and carriers_pay and not recompute
            plan = without(plan, "keep") if recompute else plan
            config = NodeConfig(
                isinstance(input, Deferred) and input.relu, emit, sampled, maskable, conv,
                bn.training, bn.momentum, bn.eps, backend, plan, packed_weights(), recompute, sync,
            )  # fmt: skip
            y, sums, mean, scale, bias, emitted, unmasked, carrier = ConvBNFunction.apply(
                *tensors, *carriers, weight, bn.weight, bn.bias, bn.running_mean, bn.running_var,
                config,
            )  # fmt: skip
            if recompute:
                if isinstance(residual, Tensor):
                    residual = contract.dense(residual, memory_format_of(y))
                return ValueFunction.apply(y, mean, scale, bias, residual, relu, backend)
    result = Deferred(y, mean, scale, bias, residual, relu, sums, unmasked)
    if recompute:
        return reference_value(result)
    if sampled is not None:
        return result, Sampled(emitted, carrier, sampled)
    return (result, emitted) if emit else result


_MASKING = ("cuda", "triton")  # backends whose backward can mask the gradient that it gets


def _carriers(
    input: Tensor | Deferred, sampled: Sampled | None, emit: bool, backend: str, plan: str
) -> tuple[tuple[Tensor | None, Tensor | None], str]:
    """The carriers along which the input's gradient goes instead of along its own tensor, and the
    plan that says so.
    """
    if sampled is not None:
        return (None, sampled.carrier), f"{plan}+compact"
    plain = not isinstance(input, Deferred) or input.residual is not None or emit
    if plain:  # kept beside what is emitted, or with a residual, it would be read as that
        return (None, None), without(plan, "keep")
    assert isinstance(input, Deferred)
    carrier = input.unmasked
    of_one_node = carrier is not None and carrier.grad_fn is input.y.grad_fn  # y was not replaced
    if of_one_node and input.relu and base_of(plan) == "split" and backend in _MASKING:
        return (carrier, None), f"{plan}+unmasked"
    return (None, None), plan


def _check_sampled(op: str, sampled: Sampled, weight: Tensor, conv: Conv) -> None:
    """What takes a Sampled reads just the pixels that its gradient is there for."""
    value = sampled.value
    carrier = contract.check_tensor(op, "input.carrier", sampled.carrier)
    contract.check_same_device(op, "input.carrier", carrier, value, "input.value")
    if carrier.dtype != value.dtype:
        raise TypeError(
            f"{op}: input.carrier must be {value.dtype} as input.value, got {carrier.dtype}"
        )
    steps = contract.check_pair(op, "input.stride", sampled.stride, 1)
    n, channels, *sizes = value.shape
    sizes = [-(-size // step) for size, step in zip(sizes, steps, strict=True)]
    if list(carrier.shape) != [n, channels, *sizes]:
        raise ValueError(
            f"{op}: input.carrier must have shape {[n, channels, *sizes]}, got "
            f"{list(carrier.shape)}"
        )
    pointwise = tuple(weight.shape[2:]) == (1, 1) and not any(conv.padding) and conv.groups == 1
    if not pointwise or conv.stride != steps:
        raise ValueError(
            f"{op}: input is sampled by stride {list(steps)}: it needs a 1x1 kernel of "
            f"this stride, one group and no padding, got kernel {list(weight.shape[2:])}, stride "
            f"{list(conv.stride)}, padding {list(conv.padding)}, groups {conv.groups}"
        )
