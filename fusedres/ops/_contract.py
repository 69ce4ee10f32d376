"""The checks every op makes before anything runs, and the dtype, format and running-statistics
rules they share.

A check that fails raises TypeError (what a thing is: type, dtype, layout) or ValueError (its value:
shape, device, range) and names the op, the argument, what came and what is accepted.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres import _norm
from fusedres._checks import DTYPES, check_reach
from fusedres._tensors import elements_per_channel, memory_format_of, stat_dtype
from fusedres.deferred import Deferred

library = torch.library.Library("fusedres", "FRAGMENT")
_LARGEST = sys.float_info.max  # an int may be larger


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """torch.library.register_fake, for tensors of one kind.

    torch also calls a fake where one real tensor of several is on meta: it would answer for the
    others with uninitialised memory of theirs.
    """

    def checked(*args: Any) -> Any:
        real = {t.is_meta for t in args if type(t) in (Tensor, torch.nn.Parameter)}
        if len(real) > 1:
            raise ValueError(f"{name}: some of the tensors are on meta, others are not")
        return fake(*args)

    torch.library.register_fake(f"fusedres::{name}", checked)


class BatchNorm(NamedTuple):
    """BatchNorm's arguments, checked: vectors [K], and what the statistics come from."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float | Tensor
    eps: float


def check_tensor(op: str, name: str, value: object, ndim: int | None = 4) -> Tensor:
    """A dense floating-point tensor of `ndim` dimensions (None: any)."""
    if not isinstance(value, Tensor):
        accepted = "a Tensor or a Deferred" if name == "input" else "a Tensor"
        raise TypeError(f"{op}: {name} must be {accepted}, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{op}: {name} must be dense (torch.strided), got {layout}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, float16, bfloat16 or float64, got {value.dtype}"
        )
    if ndim is not None and value.dim() != ndim:
        shape = "[N, C, H, W]" if ndim == 4 else f"{ndim}-dimensional"
        raise ValueError(f"{op}: {name} must be {shape}, got shape {list(value.shape)}")
    # of others memory is not known, or not there yet
    if type(value) in _WITH_MEMORY and value.device.type == "cpu" and _is_real():
        address = value.data_ptr()
        if not address or address & 7:  # maybe: nearly all are multiples of every element's size
            check_reach(op, **{name: value})
    return value


_WITH_MEMORY = (Tensor, torch.nn.Parameter)


def _is_real() -> bool:
    """Whether tensors have memory here, rather than being traced or transformed."""
    return (
        not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
    )


def check_savable(op: str, **arguments: Tensor | Deferred | None) -> None:
    """Where autograd will run nothing was made in inference mode, which it refuses to save; known
    here before running statistics move.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    tensors = dict(_tensors_of(arguments))
    made = [name for name, t in tensors.items() if t.is_inference()]
    if made and any(t.requires_grad for t in tensors.values()):
        raise RuntimeError(
            f"{op}: {made[0]} was made in inference mode and cannot be saved for backward; clone it"
        )


def _tensors_of(arguments: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Deferred):
            fields = ("y", "mean", "scale", "bias", "residual", "sums")
            yield from _tensors_of({f"{name}.{f}": getattr(value, f) for f in fields})


def check_same_device(op: str, name: str, value: Tensor, other: Tensor, other_name: str) -> None:
    """Both on one device."""
    if value.device != other.device:
        raise ValueError(
            f"{op}: {name} is on {value.device}, {other_name} on {other.device}; move one of them"
        )


def check_vector(op: str, name: str, value: object, channels: int, x: Tensor) -> Tensor | None:
    """None, or a floating-point [channels] tensor on x's device."""
    if value is None:
        return None
    vector = check_tensor(op, name, value, ndim=1)
    if vector.size(0) != channels:
        raise ValueError(f"{op}: {name} must have shape [{channels}], got {list(vector.shape)}")
    check_same_device(op, name, vector, x, "the activation")
    return vector


def check_bool(op: str, name: str, value: object) -> bool:
    """A plain bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")
    return value


def check_int(op: str, name: str, value: object, minimum: int, limit: int = 2**31) -> int:
    """An int of at least `minimum`, below `limit`."""
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value}")
    if value >= limit:
        raise ValueError(f"{op}: {name} must be below {limit}, got {value}")
    return value  # type: ignore[return-value]


def check_pair(
    op: str, name: str, value: object, minimum: int, limit: int = 2**31
) -> tuple[int, int]:
    """An int for both dimensions, or a pair (height, width)."""
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ValueError(f"{op}: {name} must be an int or a pair, got {value!r}")
        first, second = (check_int(op, name, v, minimum, limit) for v in value)
        return first, second
    both = check_int(op, name, value, minimum, limit)
    return both, both


def check_batch_norm(
    op: str,
    x: Tensor,
    channels: int,
    weight: object,
    bias: object,
    running_mean: object,
    running_var: object,
    training: object,
    momentum: object,
    eps: object,
) -> BatchNorm:
    """BatchNorm's arguments for an output of `channels` channels beside activation x."""
    check_bool(op, "training", training)
    mean = check_vector(op, "running_mean", running_mean, channels, x)
    var = check_vector(op, "running_var", running_var, channels, x)
    if (mean is None) != (var is None):
        raise ValueError(f"{op}: running_mean and running_var must be given together, or neither")
    for name, running in (("running_mean", mean), ("running_var", var)):
        if running is not None and training and running.numel() > 1 and running.stride(0) == 0:
            raise ValueError(f"{op}: {name} is expanded, it cannot be moved in place; clone it")
        if running is not None and training and _cannot_move(running):
            raise RuntimeError(
                f"{op}: {name} was made in inference mode and cannot be moved outside; clone it"
            )
        if running is not None and _is_negated(running):  # in place torch moves no such view
            raise ValueError(f"{op}: {name} is a negated view, as of conj().imag; clone it")
    if not training and mean is None:
        raise ValueError(f"{op}: training=False needs running_mean and running_var, got None")
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0:
            raise ValueError(
                f"{op}: momentum must be a number or a 0-d tensor, got shape {list(momentum.shape)}"
            )
        check_tensor(op, "momentum", momentum, ndim=0)
        check_same_device(op, "momentum", momentum, x, "the activation")
    elif isinstance(momentum, bool) or not isinstance(momentum, int | float):
        raise TypeError(f"{op}: momentum must be a number, got {type(momentum).__name__}")
    elif not -_LARGEST <= momentum <= _LARGEST:  # Dynamo traces no math.isfinite
        raise ValueError(f"{op}: momentum must be finite, got {momentum}")
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not 0 <= eps <= _LARGEST:
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")
    if training and recomputing():
        mean = var = None
    return BatchNorm(
        check_vector(op, "bn_weight", weight, channels, x),
        check_vector(op, "bn_bias", bias, channels, x),
        mean,
        var,
        bool(training),
        momentum,
        float(eps),
    )


def _is_negated(running: Tensor) -> bool:
    return not torch.compiler.is_compiling() and running.is_neg()


def _cannot_move(running: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return running.is_inference() and not torch.is_inference_mode_enabled()


def check_deferred(op: str, name: str, d: Deferred) -> None:
    """The fields of a Deferred fit together."""
    y = check_tensor(op, f"{name}.y", d.y)
    check_bool(op, f"{name}.relu", d.relu)
    for field, vector in (("mean", d.mean), ("scale", d.scale), ("bias", d.bias)):
        label = f"{name}.{field}"
        if check_vector(op, label, vector, y.size(1), y) is None:
            raise TypeError(f"{op}: {label} must be a Tensor, got None")
        if vector.dtype != stat_dtype(y.dtype):
            raise TypeError(
                f"{op}: {label} must be {stat_dtype(y.dtype)} beside {y.dtype}, got {vector.dtype}"
            )
    if d.sums is not None:
        sums = check_tensor(op, f"{name}.sums", d.sums, ndim=2)
        if tuple(sums.shape) != (2, y.size(1)) or sums.dtype != stat_dtype(y.dtype):
            raise ValueError(
                f"{op}: {name}.sums must be {stat_dtype(y.dtype)} [2, {y.size(1)}], got "
                f"{sums.dtype} {list(sums.shape)}"
            )
        check_same_device(op, f"{name}.sums", sums, y, f"{name}.y")
        if any(v.requires_grad for v in (d.mean, d.scale, d.bias)):
            raise ValueError(
                f"{op}: {name} carries its gradient in sums, so its mean, scale and bias cannot "
                "require one; go on from .value() instead of replacing them"
            )
    if d.unmasked is not None:
        unmasked = check_tensor(op, f"{name}.unmasked", d.unmasked)
        check_same_device(op, f"{name}.unmasked", unmasked, y, f"{name}.y")
        if (unmasked.shape, unmasked.dtype) != (y.shape, y.dtype):
            raise ValueError(
                f"{op}: {name}.unmasked must be {y.dtype} {list(y.shape)} as {name}.y, got "
                f"{unmasked.dtype} {list(unmasked.shape)}"
            )
    check_residual(op, f"{name}.residual", d.residual, y, tuple(y.shape), y.dtype)


def check_residual(
    op: str, name: str, residual: object, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """None, or what can join a value of this shape and dtype on x's device."""
    if residual is None:
        return
    if isinstance(residual, Deferred):
        if residual.relu or residual.residual is not None:
            raise ValueError(
                f"{op}: {name} is a Deferred with "
                f"{'a ReLU' if residual.relu else 'a residual of its own'}; "
                "only one without either joins, pass its .value() instead"
            )
        check_deferred(op, name, residual)
        r = residual.y
    else:
        r = check_tensor(op, name, residual, len(shape))
    if tuple(r.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(r.shape)}")
    if r.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype} as what it is added to, got {r.dtype}")
    check_same_device(op, name, r, x, "what it is added to")


def check_join(
    op: str, residual: object, x: Tensor, shape: tuple[int, ...]
) -> Tensor | Deferred | None:
    """An op's residual argument, cast where autocast is on, against the shape it joins."""
    if isinstance(residual, Tensor) and autocast_on(x):
        residual = check_tensor(op, "residual", residual, len(shape))
        residual = residual.to(compute_dtype(residual))
    check_residual(op, "residual", residual, x, shape, compute_dtype(x))
    return residual  # type: ignore[return-value]


def recomputing() -> bool:
    """Whether this forward runs within a backward: activation checkpointing computes again what it
    did not keep, and the running statistics have moved already.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of autograd that has none of its own, and says so.

    torch's once_differentiable lets a gradient through as a constant where what it came from needs
    none, as that of a plain sum.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fusedres: fused ops have no double backward (create_graph=True); for it run the "
                "forward under fusedres.use_backend('reference'), or fusedres.unfuse(model)"
            )
        with torch.no_grad():
            return backward(ctx, *grads)

    return checked


def exporting() -> bool:
    """Whether a graph is recorded for elsewhere: plain torch then, with no op of ours in it."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A scope in which torch computes in the dtypes it is given: the op has already cast."""
    if not autocast_on(x):
        return _AS_IT_IS
    if torch.compiler.is_compiling():
        return torch.autocast(x.device.type, enabled=False)
    return torch._C._DisableAutocast()  # the same, at a tenth of the cost


_AS_IT_IS = contextlib.nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on (float64 excepted, as in torch), else x's own."""
    if x.dtype != torch.float64 and autocast_on(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def check_count(op: str, y_shape: tuple[int, ...], training: bool) -> None:
    """Batch statistics need more than one value per channel, as in torch."""
    if training and y_shape[0] * y_shape[2] * y_shape[3] == 1:
        raise ValueError(
            f"{op}: expected more than 1 value per channel when training, got an output of shape "
            f"{list(y_shape)}"
        )


def update_running(bn: BatchNorm, mean: Tensor, var: Tensor, y: Tensor) -> None:
    """Move the running statistics of a BatchNorm in training, where no kernel did."""
    if bn.training and bn.running_mean is not None and bn.running_var is not None:
        _norm.update_running(
            bn.running_mean, bn.running_var, mean.detach(), var.detach(), bn.momentum,
            elements_per_channel(y),
        )  # fmt: skip


def stored_alike(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """All dense, the 4-d ones in the first's format, as a kernel takes them.

    Saved tensors are so already, unless a saved-tensor hook gave them back stored otherwise. Under
    torch.compile, which runs no such hook on them, Dynamo cannot trace converting an output.
    """
    if torch.compiler.is_compiling():
        return first, *others
    memory_format = memory_format_of(first)
    return tuple(
        t if t is None else dense(t, memory_format) if t.dim() == 4 else t.contiguous()
        for t in (first, *others)
    )


def dense(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """x stored densely in `memory_format` (differentiable; x itself where it is already, and within
    the transforms of torch.func, of which vmap has strides of its own).
    """
    traced = torch.compiler.is_compiling()  # Dynamo does not know the question
    if not traced and torch._C._functorch.is_functorch_wrapped_tensor(x):
        return x
    return x.contiguous(memory_format=memory_format)
