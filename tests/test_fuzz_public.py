"""Calls of the public functions with wrong and with odd arguments.

A call is made right, with up to three of its arguments then replaced (fuzz_ways.py). It raises a
TypeError, ValueError or RuntimeError that names an argument which was replaced, before anything was
written; or it gives what the backend "reference" makes of the same arguments, forward and backward.
Arguments that are only stored or owned in an odd way, or hold NaN and Inf, have to be served.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from fuzz_ways import is_legal
from fuzzing import (
    SETTINGS,
    Call,
    Plan,
    Setting,
    run,
    same,
    setting,
)
from test_fuzz import BACKENDS, amounts, seed
from torch import Tensor

import fusedres
from fusedres import ops
from fusedres._tensors import stat_dtype
from fusedres.deferred import Deferred, Sampled

QUICK = {"cpp": 6_000, "cuda": 3_000, "triton": 300}
FULL = 55_000
pytestmark = pytest.mark.skipif(not BACKENDS, reason="the extension is not built")

Arguments = list[tuple[str, str, Any]]  # name, role, value


@dataclass
class Public(Call):
    """A call of a public function; `sources`: leaves behind what it is given."""

    sources: dict[str, Tensor] = field(default_factory=dict)


# --- right arguments ------------------------------------------------------------------------------


def leaf(t: Tensor) -> Tensor:
    return t.requires_grad_()


def half(s: Setting) -> bool:
    """Whether the call computes in bf16."""
    return s.dtype == torch.bfloat16 or (s.mixed and s.dtype == torch.float32)


def norm(s: Setting, shape: tuple[int, ...]) -> Arguments:
    """BatchNorm's arguments for an activation of this shape."""
    c = shape[1]
    mean, var = s.running(20, shape)
    return [
        ("bn_weight", "tensor", leaf(s.vector(22, 0.25, c))),
        ("bn_bias", "tensor", leaf(s.vector(23, 0.25, c))),
        ("running_mean", "running", mean),
        ("running_var", "running", var),
        ("training", "bool", s.trains_on(shape)),
        ("momentum", "number", 0.25),
        ("eps", "number", 0.125),
    ]


def conv(s: Setting, more: bool = True) -> Arguments:
    """A convolution's arguments."""
    top, _, left, _ = s.conv.padding
    padding: Any = s.conv.padding
    if s.conv.even_padding():
        padding = top if top == left else (top, left)
    given = [
        ("weight", "tensor", leaf(s.weight(12))),
        ("stride", "steps", s.conv.stride),
        ("padding", "steps", padding),
    ]
    if more:
        given += [("dilation", "steps", s.conv.dilation), ("groups", "int", s.conv.groups)]
    return given


def plain(s: Setting) -> Setting:
    """Without groups and dilation, for functions that have none."""
    geometry = s.conv._replace(groups=1, dilation=(1, 1))
    return replace(s, conv=geometry, filters=5)


def window(s: Setting, shape: tuple[int, ...], prefix: str = "") -> Arguments:
    small = min(shape[2:]) < 2
    values = (3, 2, 1) if small else [(3, 2, 1), (2, 2, 0), (5, 1, 2)][s.seed // 7 % 3]
    names = ("kernel_size", f"{prefix}stride", f"{prefix}padding")
    return [(n, "int", v) for n, v in zip(names, values, strict=True)]


def deferred(s: Setting, relu: bool, residual: bool) -> tuple[Arguments, dict[str, Tensor]]:
    """The fields of a Deferred, and the leaves it came from: one built by hand, or batch_norm's.

    In bf16 its value is on the grid, as all that goes into a convolution.
    """
    c = s.shape[1]
    ones = torch.ones(c, dtype=stat_dtype(s.dtype))
    joined = s.full(4) if residual else None
    if s.seed // 11 % 2:
        vectors = (s.vector(1), s.vector(2, 0.25), s.vector(3))
        if half(s):
            vectors = (ones * 2, ones * -1, ones)
        d = Deferred(*map(leaf, (s.full(0), *vectors)), joined, relu)
        if joined is not None:
            leaf(joined)
        sources, role = {}, "tensor"
    else:
        sources = {"x": s.full(0), "w": s.vector(2, 0.25), "b": s.vector(3)}
        training = s.trains_on(s.shape) and not half(s)
        if half(s):
            sources |= {"w": ones * -1, "b": ones.clone()}
        leaves = [leaf(t) for t in sources.values()]
        running = (ones * 2, ones * 0.875)
        with torch.autocast("cpu", enabled=False):
            d = ops.batch_norm(
                *leaves, *running, training=training, eps=0.125, residual=joined, relu=relu
            )
        role = "field"
    names = ("y", "mean", "scale", "bias", "residual", "sums", "unmasked")
    fields = [(f"input.{n}", role, getattr(d, n)) for n in names]
    return [*fields, ("input.relu", "bool", relu)], sources


def whole(function: Callable[..., Any], kind: type = Deferred) -> Callable[..., Any]:
    """The function with the fields of its input one by one."""

    def call(**arguments: Any) -> Any:
        fields = {n.removeprefix("input."): v for n, v in arguments.items() if "input." in n}
        others = {n: v for n, v in arguments.items() if "input." not in n}
        return function(kind(**fields), **others)

    return call


Built = tuple[Callable[..., Any], Arguments, dict[str, Tensor]]


def conv_act(s: Setting) -> Built:
    """Without gradients, for it has none."""
    k = s.filters
    given: Arguments = [("x", "tensor", s.full(0)), ("scale", "tensor", s.vector(16, 0.25, k))]
    given += [("bias", "tensor", s.vector(17, count=k)), ("residual", "tensor", s.full(4, s.out))]
    weight, *others = conv(s)
    weight = (*weight[:2], weight[2].detach())
    call = torch.no_grad()(ops.conv_act)
    return call, [*given, weight, *others, ("relu", "bool", s.relu)], {}


def conv_bn(s: Setting) -> Built:
    residual = ("residual", "tensor", leaf(s.full(4, s.out)))
    last = [residual, ("relu", "bool", s.relu), ("emit", "emit", s.mixed)]
    given: Arguments = [("input", "tensor", leaf(s.full(0)))]
    return ops.conv_bn, [*given, *conv(s), *norm(s, s.out), *last], {}


def conv_bn_of_deferred(s: Setting) -> Built:
    fields, sources = deferred(s, True, s.tracked)
    pointwise = s.kernel == (1, 1) and s.conv.stride == (1, 1)
    last = [("relu", "bool", s.relu), ("emit", "emit", pointwise)]
    return whole(ops.conv_bn), [*fields, *conv(s), *norm(s, s.out), *last], sources


def conv_bn_of_sampled(s: Setting) -> Built:
    x, c = leaf(s.full(0)), s.shape[1]
    _, sampled = ops.conv_bn(
        x,
        s.full(11, (3, c, 1, 1)),
        training=False,
        emit=(2, 2),
        **{"running_mean": torch.zeros(3), "running_var": torch.ones(3)},
    )
    given: Arguments = [
        ("input.value", "field", sampled.value),
        ("input.carrier", "field", sampled.carrier),
        ("input.stride", "steps", sampled.stride),
        ("weight", "tensor", leaf(s.full(12, (5, c, 1, 1)))),
        ("stride", "steps", 2),
    ]
    n, _, h, w = s.shape
    out = (n, 5, (h + 1) // 2, (w + 1) // 2)
    return whole(ops.conv_bn, Sampled), [*given, *norm(s, out)], {"x": x}


def conv_bn_relu(s: Setting) -> Built:
    s = plain(s)
    given: Arguments = [("x", "tensor", leaf(s.full(0))), *conv(s, False), *norm(s, s.out)]
    residual = ("residual", "tensor", leaf(s.full(4, s.out)))
    return fusedres.conv_bn_relu, [*given, residual, ("relu", "bool", s.relu)], {}


def bn_add_relu(s: Setting) -> Built:
    given: Arguments = [("y", "tensor", leaf(s.full(0))), *norm(s, s.shape)]
    return fusedres.bn_add_relu, [*given, ("residual", "tensor", leaf(s.full(4)))], {}


def batch_norm(s: Setting) -> Built:
    _, given, _ = bn_add_relu(s)
    return ops.batch_norm, [*given, ("relu", "bool", s.relu)], {}


def bn_act(s: Setting) -> Built:
    return whole(ops.bn_act), *deferred(s, s.relu, s.tracked)


def value(s: Setting) -> Built:
    return whole(Deferred.value), *deferred(s, s.relu, not s.tracked)


def add_relu(s: Setting) -> Built:
    shape = [s.shape, s.shape[1:], s.shape[1:2]][s.seed // 7 % 3]
    given = [(name, "tensor", leaf(s.full(i, shape))) for i, name in enumerate(("x", "residual"))]
    return fusedres.add_relu, given, {}


def bn_relu_maxpool(s: Setting) -> Built:
    fields, sources = deferred(s, True, False)
    return whole(ops.bn_relu_maxpool), [*fields, *window(s, s.shape)], sources


def conv_bn_relu_maxpool(s: Setting) -> Built:
    given: Arguments = [("x", "tensor", leaf(s.full(0))), *conv(s), *norm(s, s.out)]
    return ops.conv_bn_relu_maxpool, [*given, *window(s, s.out, "pool_")], {}


# --- modules: built and called --------------------------------------------------------------------


def used(module: Callable[..., torch.nn.Module]) -> Callable[..., Tensor]:
    """Builds the module, always with the same weights, and calls it on x."""

    def call(*, x: Any, **arguments: Any) -> Tensor:
        torch.manual_seed(0)
        return module(**arguments).double()(x)

    return call


def image(s: Setting, channels: int) -> Arguments:
    """In fp64: what random weights make of it is not on the grid."""
    s = replace(s, dtype=torch.float64)
    x = s.full(0, (2, channels, *((8, 6), (5, 7), (4, 4))[s.seed // 7 % 3]))
    return [("x", "tensor", leaf(x))]


def conv_bn_relu_module(s: Setting) -> Built:
    given = [("in_channels", "count", 3), ("out_channels", "count", 5), ("kernel_size", "count", 3)]
    given += [("stride", "count", 2), ("padding", "count", 1), ("relu", "bool", s.relu)]
    return used(fusedres.ConvBNReLU), [*image(s, 3), *given], {}


def block(s: Setting) -> Arguments:
    given: Arguments = [
        *image(s, 8),
        ("in_channels", "count", 8),
        ("filters", "filters", (4, 4, 8)),
    ]
    given += [("kernel_size", "count", 3), ("eps", "number", 0.125), ("momentum", "number", 0.25)]
    given += [("groups", "count", 1), ("dilation", "count", 1)]
    return [*given, ("initializer", "initializer", "kaiming_normal")]


def identity_block(s: Setting) -> Built:
    return used(fusedres.IdentityBlock), block(s), {}


def conv_block(s: Setting) -> Built:
    given = [("stride", "count", 2), ("stride_in_1x1", "bool", s.tracked)]
    return used(fusedres.ConvBlock), [*block(s), *given], {}


def resnet(s: Setting) -> Built:
    """Its arguments: what it computes is tested elsewhere, and takes seconds."""
    given = [("num_classes", "count", 3), ("variant", "variant", "torchvision")]
    given += [("zero_init_residual", "bool", False), ("in_channels", "count", 3)]
    given += [("memory", "variant", "exact"), ("eps", "number", 0.1), ("momentum", "number", 0.1)]
    given += [("stem_pool_padding", "count", 1), ("stride_in_1x1", "bool", True)]
    given += [("groups", "count", 1), ("width_per_group", "count", 64)]

    def call(**arguments: Any) -> list[Tensor]:
        with torch.device("meta"):
            return list(fusedres.FusedResNet50(**arguments).parameters())[:3]

    return call, given, {}


FUNCTIONS = (
    add_relu,
    batch_norm,
    bn_act,
    bn_add_relu,
    bn_relu_maxpool,
    conv_act,
    conv_bn,
    conv_bn_of_deferred,
    conv_bn_of_sampled,
    conv_bn_relu,
    conv_bn_relu_maxpool,
    value,
    conv_bn_relu_module,
    identity_block,
    conv_block,
    resnet,
)


# --- what comes of a call -------------------------------------------------------------------------


@contextlib.contextmanager
def scope(backend: str, s: Setting) -> Iterator[None]:
    """The backend, and autocast where the setting has it."""
    with fusedres.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=s.mixed):
        yield


def made(
    build: Callable[[Setting], Built], backend: str, plan: Plan
) -> tuple[Public, dict[str, Any]]:
    """The call of a plan, and the arguments it had before they were replaced."""
    function, arguments, sources = build(setting(plan.setting, backend == "triton"))
    base = {n: v for n, _, v in arguments}
    call = Public(function, base, {n: role for n, role, _ in arguments}, sources)
    return call.replace(plan.replaced), base  # type: ignore[return-value]


def flat(results: Any) -> list[Tensor]:
    """Results as tensors in a row."""
    if isinstance(results, Deferred):
        return [results.value()]
    if isinstance(results, Sampled):
        return [results.value]
    return [results] if isinstance(results, Tensor) else [t for r in results for t in flat(r)]


def leaves(call: Public) -> dict[str, Tensor]:
    """What gets a gradient, by name."""
    found = {n: t for n, t in call.arguments.items() if call.roles[n] == "tensor"}
    found = {n: t for n, t in found.items() if isinstance(t, Tensor) and t.requires_grad}
    return found | call.sources


def gradients(outputs: list[Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """By name, under upstream gradients on the grid."""
    outputs = [t for t in outputs if t.requires_grad]
    if not outputs or not wanted:
        return {}
    upstream = [
        torch.arange(t.numel()).mul(7).remainder(5).sub(2).to(t.dtype).view(t.shape)
        for t in outputs
    ]
    found = torch.autograd.grad(outputs, list(wanted.values()), upstream, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


# what an error says where it is about more than one argument, or about what follows from them
SHAPED = ("bn_weight", "bn_bias", "running_mean", "running_var", "residual", "scale")
FIRST = ("input", "the activation", "what it is added to", "output of shape", "backend '", *SHAPED)
ALIASES = {
    "x": (*FIRST, "weight"),
    "y": FIRST,
    "input": (*FIRST, "weight"),
    "weight": ("kernel", "output of shape", *SHAPED),
    "stride": ("output of shape", "residual", "emit", "does not fit"),
    "padding": ("output of shape", "residual", "emit"),
    "dilation": ("output of shape", "residual", "does not fit"),
    "groups": ("weight",),
    "in_channels": ("weight",),
    "kernel_size": ("kernel",),
    "out_channels": ("output of shape",),
    "filters": ("weight", "output of shape", *SHAPED),
}


def names(message: str, argument: str) -> bool:
    """Whether an error is about the argument."""
    first = argument.partition(".")[0]
    words = {argument, first, *ALIASES.get(argument, ()), *ALIASES.get(first, ())}
    return any(re.search(rf"(?<![\w.]){re.escape(w)}", message) for w in words)


def check(build: Callable[[Setting], Built], backend: str, plan: Plan) -> None:
    """One call: refused by name and before anything was written, or right."""
    s = setting(plan.setting, backend == "triton")
    if backend == "cpp" and s.seed // 13 % 4 == 0:
        backend = "auto"
    with scope(backend, s):
        call, base = made(build, backend, plan)
        before = {n: t.clone() for n, t in call.tensors().items()}
        there = [(n, way) for n, way in plan.replaced if n in base]
        legal = all(
            isinstance(base[n], Tensor) and is_legal(call.roles[n], way) for n, way in there
        )
        try:
            outputs = flat(call.function(**call.arguments))
        except Exception as error:
            assert not legal, error
            assert type(error) in (TypeError, ValueError, RuntimeError), repr(error)
            assert any(names(str(error), n) for n, _ in plan.replaced), error
            for argument, now in call.tensors().items():
                torch.testing.assert_close(
                    now, before[argument], rtol=0, atol=0, equal_nan=True, msg=argument
                )
            return
        fields = any(
            call.roles.get(n) == "field" or n.startswith("input.") for n, _ in plan.replaced
        )
        found = {} if fields else gradients(outputs, leaves(call))
    # carriers of gradients, whose values nobody reads
    carriers = ("input.sums", "input.unmasked")
    plan = plan._replace(replaced=tuple(r for r in plan.replaced if r.argument not in carriers))
    with scope("reference", s):
        again, _ = made(build, backend, plan)
        wanted = flat(again.function(**again.arguments))
        true = {} if fields else gradients(wanted, leaves(again))
    dtype = torch.bfloat16 if half(s) else s.dtype
    infinite = plan.puts("inf")
    # oneDNN multiplies in bf16 what no window holds, by 0: a NaN then wins windows of a pool
    lost = half(s) and "weight" in call.roles and plan.puts("inf", "nan")
    if lost:
        found, true = {}, {}
    loose = lost or plan.scales_by_inf()
    assert len(outputs) == len(wanted)
    for i, (ours, theirs) in enumerate(zip(outputs, wanted, strict=True)):
        same(f"result {i}", ours, theirs, dtype, 0, infinite, loose)
    for argument, role in call.roles.items():
        if role == "running" and isinstance(again.arguments[argument], Tensor):
            ours, theirs = call.arguments[argument], again.arguments[argument]
            same(argument, ours, theirs, dtype, 0, infinite, loose)
    assert found.keys() == true.keys()
    count = max((t.numel() for t in outputs), default=0)
    for argument, ours in found.items():
        # the one convolution multiplies padding, the other knows where it is
        padded = argument == "weight" and plan.puts("inf", "nan")
        theirs = true[argument]
        same(f"gradient of {argument}", ours, theirs, dtype, count, infinite, loose or padded)


FUZZED = [(build, backend) for build in FUNCTIONS for backend in BACKENDS]


def named(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("build", "backend"), FUZZED, ids=named)
def test_right_calls_of_the_fuzzer_are_right(
    build: Callable[[Setting], Built], backend: str
) -> None:
    for i in range(6 if backend == "triton" else 60):
        check(build, backend, Plan(i * 7919 % SETTINGS, ()))


@pytest.mark.parametrize(
    ("build", "backend", "amount"),
    [pytest.param(*call, a, marks=m) for call in FUZZED for a, m in amounts(call[1])],
    ids=named,
)
def test_wrong_calls_are_refused_by_name_and_odd_ones_are_right(
    build: Callable[[Setting], Built], backend: str, amount: str
) -> None:
    with scope(backend, setting(0)):
        roles = made(build, backend, Plan(0, ()))[0].roles
    total = QUICK[backend] if amount == "some" else FULL
    examples = total // len(FUNCTIONS) // (20 if build is resnet else 1)
    run(lambda plan: check(build, backend, plan), roles, examples, seed(build.__name__, amount))
