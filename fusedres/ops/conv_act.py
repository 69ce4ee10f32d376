"""conv_act: a convolution with scale, bias, residual add and ReLU behind it, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres import backends
from fusedres._checks import check_dense, check_reach
from fusedres._conv import Conv, output_shape
from fusedres._tensors import memory_format_of, stat_dtype
from fusedres.library import conv_act as split
from fusedres.ops import _contract as contract
from fusedres.ops._contract import library, register_fake
from fusedres.ops.conv_bn import check_conv
from fusedres.reference.conv_act import conv_act as reference_conv_act

OP = "conv_act"

# --- the op: schema, kernel look-up, fake ---------------------------------------------------------

library.define(
    "conv_act_fwd(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, bool"
    " relu, int[2] stride, int[4] padding, int[2] dilation, int groups, str backend, str plan)"
    " -> Tensor"
)


def _fwd(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    plan: str,
) -> Tensor:
    op, conv = f"{OP}_fwd", _conv(stride, padding, dilation, groups)
    conv.check(op)
    check_reach(op, x=x, weight=weight, scale=scale, bias=bias, residual=residual)
    check_conv(op, x, weight, *conv)
    conv, shape = conv.reduced(x.shape, weight.shape), output_shape(x.shape, weight.shape, conv)
    if weight.dtype != x.dtype:
        raise ValueError(f"{op}: weight must be {x.dtype} as x, got {weight.dtype}")
    for name, v in (("scale", scale), ("bias", bias)):
        contract.check_vector(op, name, v, weight.size(0), x)
    order = memory_format_of(x)
    check_dense(op, "x", x, tuple(x.shape), x, order)
    if residual is not None:
        contract.check_residual(op, "residual", residual, x, shape, x.dtype)
        check_dense(op, "residual", residual, shape, x, order)
    if plan == "split":
        if backend not in backends.BACKENDS:
            raise ValueError(f"{op}: no backend {backend!r}")
        y = split.conv_act(x, weight, conv, scale, bias, residual, relu)
        return y.contiguous(memory_format=order)
    vectors = (None if v is None else v.to(stat_dtype(x.dtype)) for v in (scale, bias))
    kernel = backends.kernels(backend, OP).conv_act
    y = kernel(x, weight, conv, *vectors, residual, relu)
    return y


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    *geometry: object,
) -> Tensor:
    shape = output_shape(x.shape, weight.shape, _conv(*geometry[:4]))  # type: ignore[arg-type]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def _conv(stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Conv:
    return Conv(tuple(stride), tuple(padding), tuple(dilation), groups)  # type: ignore[arg-type]


library.impl("conv_act_fwd", _fwd, "CompositeExplicitAutograd")
register_fake("conv_act_fwd", _fake)


# --- the public function --------------------------------------------------------------------------


def way_of(
    choice: backends.Choice,
    x: Tensor,
    dtype: torch.dtype,
    weight: Tensor,
    conv: Conv,
    out_shape: tuple[int, ...] | None = None,
) -> tuple[str, str]:
    """Backend and plan ("fused": our kernel, "split": the library's) of one convolution of x, or of
    any tensor on its device and of its dtype; out_shape None: not known yet, taken as large.
    """
    fuses = split.cudnn_serves(x, conv)
    plan = backends.inference_plan_of(choice, dtype, weight, conv, out_shape, fuses)
    backend = choice.backend if plan == "fused" else choice.light or choice.backend
    return backend, plan


class Bound(NamedTuple):
    """A convolution that is bound to its weights and to inputs of one shape.

    Attributes:
        run: of x and the residual, both dense as the one it was bound for; gives the result.
        backend, plan: what runs.
        keeps_nan: whether NaN goes through its ReLU; else it becomes zero.
        makes_nan: whether a weight is infinite or NaN, where somebody had to ask.
        of_frames: whether `run` takes uint8 [N, H, W, C] in x's place, and normalises it.
    """

    run: Callable[[Tensor, Tensor | None], Tensor]
    backend: str
    plan: str
    keeps_nan: bool
    makes_nan: bool = False
    of_frames: bool = False


def bind(
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    bias: Tensor | None,
    *,
    joined: bool,
    relu: bool,
    into: bool,
    packs: dict[Any, Any],
    frames: tuple[Tensor, Tensor] | None = None,
) -> Bound:
    """conv_act with all that depends on weights, shapes and settings done beforehand; arguments are
    right, as nothing is checked.

    Args:
        x: [N, C, H, W], dense: its shape, dtype and device.
        weight: [K, C / groups, R, S], cast to x's dtype here.
        conv: the geometry.
        bias: [K], or None.
        joined: whether there is a residual.
        relu: whether to end in ReLU.
        into: the result may take the residual's memory.
        packs: by what they depend on, weights in the order a kernel wants them; takes new ones.
        frames: [C] each, what x was made with from uint8 images: a scale and a shift. Given, a
            kernel that can take the images themselves does.
    """
    choice = backends.choose(OP, x.device.type, x.dtype)
    if choice.backend == "reference":
        cast = weight.to(x.dtype)

        def plain(x: Tensor, residual: Tensor | None) -> Tensor:
            return reference_conv_act(x, cast, conv, None, bias, residual, relu)

        return Bound(plain, "reference", "split", True)
    shape = output_shape(x.shape, weight.shape, conv)
    backend, plan = way_of(choice, x, x.dtype, weight, conv, shape)
    own = (
        None if bias is None else bias.data_ptr()
    )  # tied weights may have a bias and a stride each
    key = (plan, weight.data_ptr(), own, conv, x.shape[2:], min(2, x.size(0)))
    if plan == "split":
        packed = packs.get(key)
        if packed is None:
            packed = packs[key] = split.pack(x, weight.to(x.dtype), conv, None, bias)
        run = split.bound(x, packed, joined, relu, into)
        keeps_nan = not relu or packed.fused != "onednn"
        return Bound(run, backend, plan, keeps_nan, not packed.finite)
    room, cast = backends.kernels(backend, OP), weight.to(x.dtype)
    if key not in packs:
        packs[key] = room.pack(cast, conv)
    vector = None if bias is None else bias.to(stat_dtype(x.dtype))
    normalize = frames if room.reads_image(cast, conv) else None
    more = {"packed": packs[key], "normalize": normalize}

    def fused(x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = room.conv_act(x, cast, conv, None, vector, residual, relu, **more)
        return y

    return Bound(fused, backend, plan, True, of_frames=normalize is not None)


def conv_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[int, int, int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """act(conv2d(x, weight)*scale + bias [+ residual]) by one kernel, for inference: a BatchNorm
    with frozen statistics is a scale and a bias.

    Args:
        x: [N, C, H, W] in fp32, fp16, bf16 or fp64; autocast's dtype is used where autocast is on.
        weight: [K, C / groups, R, S], without autocast of x's dtype.
        scale, bias: [K], any floating dtype; None stands for ones and zeros.
        residual: [N, K, OH, OW] in x's dtype, added before the ReLU.
        relu: whether to end in ReLU; NaN stays NaN.
        stride, dilation: int or (height, width).
        padding: int, (height, width), or (top, bottom, left, right); zeros.
        groups: number of groups of channels.

    Returns:
        [N, K, OH, OW] in the compute dtype, in x's memory format (channels_last on a GPU).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named; a
            kernel larger than the padded input.
        RuntimeError: a gradient is wanted of an argument, but by backend "reference"; the backend
            or plan asked for by name cannot serve these tensors.
    """
    x = contract.check_tensor(OP, "x", x)
    weight, conv = check_conv(OP, x, weight, stride, padding, dilation, groups)
    scale = contract.check_vector(OP, "scale", scale, weight.size(0), x)
    bias = contract.check_vector(OP, "bias", bias, weight.size(0), x)
    contract.check_bool(OP, "relu", relu)
    shape, dtype = output_shape(x.shape, weight.shape, conv), contract.compute_dtype(x)
    joined = contract.check_join(OP, residual, x, shape)
    if joined is not None and not isinstance(joined, Tensor):
        raise TypeError(f"{OP}: residual must be a Tensor, got {type(joined).__name__}")
    if weight.dtype != dtype and not contract.autocast_on(x):
        raise TypeError(f"{OP}: weight must be {dtype} as x, got {weight.dtype}; or use autocast")
    choice = backends.choose(OP, x.device.type, dtype)
    plain = choice.backend == "reference" or contract.exporting()
    given = {"x": x, "weight": weight, "scale": scale, "bias": bias, "residual": joined}
    if not plain and torch.is_grad_enabled():
        for name, t in given.items():
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    f"{OP}: it has no backward, and {name} requires a gradient; call it under "
                    "torch.no_grad() or torch.inference_mode(), or train by conv_bn"
                )
    order = memory_format_of(x)
    with contract.without_autocast(x):
        x, weight = contract.dense(x.to(dtype), order), weight.to(dtype)
        if joined is not None:
            joined = contract.dense(joined, order)
        if plain:
            y = reference_conv_act(x, weight, conv, scale, bias, joined, relu)
            return contract.dense(y, order)
        backend, plan = way_of(choice, x, dtype, weight, conv, shape)
        y = torch.ops.fusedres.conv_act_fwd(
            x, weight, scale, bias, joined, relu, *conv, backend, plan
        )
        return y
