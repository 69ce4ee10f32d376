"""From plain nn.Conv2d and nn.BatchNorm2d children to the ops: arguments, state, and when not to
fuse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fusedres import backends
from fusedres._conv import Conv
from fusedres.deferred import Deferred, Sampled
from fusedres.ops import _contract as contract
from fusedres.ops import _sync, bn_relu_maxpool, conv_bn, conv_bn_relu_maxpool
from fusedres.ops._contract import compute_dtype, recomputing

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ALL_HOOKS = [(name, f"_global{name}") for name in _HOOKS]  # of one module, of all


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward or backward hook sits on the module, or on all modules."""
    own, shared = module.__dict__, torch_module.__dict__
    return any(own[name] or shared.get(name_of_all) for name, name_of_all in _ALL_HOOKS)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else."""
    return "forward" not in module.__dict__ and not has_hooks(module)


def touched(name: str) -> str:
    """The reason for a child that a hook or a replaced forward sits on."""
    return f"{name} {_TOUCHED}"


def by_hook(reason: str) -> bool:
    """Whether a reason is that of `touched`."""
    return reason.endswith(_TOUCHED)


_TOUCHED = "has a hook or a forward of its own"


def sync_group(bn: nn.Module) -> Any:
    """The process group over which a BatchNorm takes its statistics now; None for its own batch."""
    if type(bn) is nn.SyncBatchNorm and bn.training:
        return _sync.active(bn.process_group)
    return None


def plain_reason(module: nn.Module, name: str, expected: type[nn.Module]) -> str | None:
    """Why the child `name` must be called as a module, so that its block cannot fuse, or None."""
    reason = kind_reason(module, name, expected)
    return touched(name) if reason is None and not is_untouched(module) else reason


def kind_reason(
    module: nn.Module, name: str, expected: type[nn.Module], biased: bool = False
) -> str | None:
    """The same, whoever looks on; a convolution may be `biased` where that is served."""
    if type(module) is nn.SyncBatchNorm and expected is nn.BatchNorm2d:
        recorded = torch.compiler.is_compiling() or contract.exporting()
        if recorded and sync_group(module) is not None:
            return f"{name} synchronises its statistics, which no graph of ours can record"
        expected = nn.SyncBatchNorm
    if not isinstance(module, expected):
        return f"{name} is a {type(module).__name__}"
    if type(module) is not expected:
        return f"{name} is a {type(module).__name__}, a subclass whose forward may differ"
    if isinstance(module, nn.Conv2d):
        if module.bias is not None and not biased:
            return f"{name} has a bias"
        if module.padding_mode != "zeros":
            return f"{name} pads by {module.padding_mode!r}"
    if isinstance(module, nn.MaxPool2d) and (
        not isinstance(module.kernel_size, int)
        or not isinstance(module.stride, int)
        or not isinstance(module.padding, int)
        or module.kernel_size > 15
        or module.dilation != 1
        or module.ceil_mode
        or module.return_indices
    ):
        return f"{name} is not a plain square max pool of at most 15"
    return None


def same_padding(kernel_size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of Keras's 'same' at stride 1: k - 1 in all, the odd one after."""
    (top, bottom), (left, right) = (((k - 1) // 2, k - 1 - (k - 1) // 2) for k in kernel_size)
    return top, bottom, left, right


def geometry(conv: nn.Conv2d) -> Conv:
    """Stride, padding, dilation and groups as ops take them."""
    stride, dilation = conv.stride, conv.dilation
    return Conv(stride, padding_of(conv), dilation, conv.groups)  # type: ignore[arg-type]


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether it can write its input's value on the way: 1x1, stride 1, no padding."""
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and not any(padding_of(conv))


def sampling(x: Tensor | Deferred, conv: nn.Conv2d) -> tuple[int, int] | None:
    """The stride of a shortcut that is to give no gradient for the pixels of x that it does not
    read.
    """
    if torch.compiler.is_compiling():
        return None  # Dynamo makes zeros of the gradients that do not come
    if not isinstance(x, Tensor | Deferred):
        return None  # type: ignore[unreachable]  # conv_bn will say so
    stored = x.y if isinstance(x, Deferred) else x
    choice = backends.choose("conv_bn", x.device.type, compute_dtype(stored))
    pointwise = conv.kernel_size == (1, 1) and not any(padding_of(conv)) and conv.groups == 1
    if not (pointwise and max(conv.stride) == 2 and backends.samples_shortcuts(choice)):
        return None
    height, width = conv.stride
    return height, width


def taps_of(conv: nn.Conv2d) -> tuple[int, ...]:
    """Rows and columns that a window spans, the gaps of its dilation among them."""
    return tuple(d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))


def padding_of(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a convolution, also where it says "same" or "valid"."""
    if conv.padding == "valid":
        return 0, 0, 0, 0
    if isinstance(conv.padding, str):
        return same_padding(taps_of(conv))
    height, width = conv.padding
    return height, height, width, width


def apply_conv_bn(
    input: Tensor | Deferred | Sampled,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    *,
    relu: bool = True,
    residual: Tensor | Deferred | None = None,
    padding: tuple[int, int, int, int] | None = None,
    emit: bool | tuple[int, int] = False,
    recompute: bool = False,
) -> Any:
    """conv_bn with the parameters, statistics and mode of two modules, as if called; its result."""
    options = _options(conv, bn, padding) | {"residual": residual, "relu": relu}
    options |= {"emit": emit, "recompute": recompute}
    result = conv_bn(input, conv.weight, **options)
    _count(bn)
    return result


def apply_stem(
    x: Tensor | Deferred, conv: nn.Conv2d, bn: nn.BatchNorm2d, pool: nn.MaxPool2d
) -> Tensor:
    """conv_bn_relu_maxpool with the parameters, statistics and mode of three modules, as if called
    with a ReLU among them.
    """
    if isinstance(x, Deferred):
        h = apply_conv_bn(x, conv, bn)
        return bn_relu_maxpool(h, pool.kernel_size, pool.stride, pool.padding)  # type: ignore[arg-type]
    p = conv_bn_relu_maxpool(
        x,
        conv.weight,
        **_options(conv, bn),
        kernel_size=pool.kernel_size,  # type: ignore[arg-type]
        pool_stride=pool.stride,  # type: ignore[arg-type]
        pool_padding=pool.padding,  # type: ignore[arg-type]
    )
    _count(bn)
    return p


def _options(
    conv: nn.Conv2d, bn: nn.BatchNorm2d, padding: tuple[int, int, int, int] | None = None
) -> dict[str, Any]:
    """The arguments that an op takes from two modules, beside the weight."""
    counts = _counts(bn)
    momentum: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
    if counts and bn.momentum is None and bn.num_batches_tracked is not None:
        # the cumulative average, without leaving the device
        momentum = 1.0 / (bn.num_batches_tracked + 1).to(torch.float64)
    uses_running = counts or not bn.training
    return {
        "bn_weight": bn.weight,
        "bn_bias": bn.bias,
        "running_mean": bn.running_mean if uses_running else None,
        "running_var": bn.running_var if uses_running else None,
        "stride": conv.stride,
        "padding": padding_of(conv) if padding is None else padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "training": bn.training or bn.running_mean is None,
        "momentum": momentum,
        "eps": bn.eps,
        "sync": sync_group(bn),
    }


def _counts(bn: nn.BatchNorm2d) -> bool:
    return bn.training and bn.track_running_stats and not recomputing()


def _count(bn: nn.BatchNorm2d) -> None:
    """As a call of the module counts its batch."""
    if _counts(bn) and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
