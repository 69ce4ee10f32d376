"""conv_bn's plans with options, and the carriers by which gradients come unmasked or compact."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, nop
from test_conv_bn import BACKENDS, PROTOCOL, Chain
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import fusedres
from fusedres import Deferred, use_backend, use_plan
from fusedres import backends as registry
from fusedres._plans import DATAFLOWS, Plan, base_of, has, is_plan, product_of, without
from fusedres.deferred import Sampled
from fusedres.ops import batch_norm, conv_bn
from fusedres.testing import (
    CHANNELS_LAST,
    Inputs,
    Maker,
    check_case,
    eager_batch_norm,
    norm_arguments,
    run,
    serves,
)

OPTIONED = ("split+keep", "fused+masks", "fused+merged", "epilogue", "epilogue+keep")
# that of cpp and cuda is for blocks of channels: test_conv_bn_pointwise, test_conv_bn_tensor_core
FUSING = [b for b in PROTOCOL if "fused" in registry.BACKENDS[b].plans and b not in ("cpp", "cuda")]
WAYS = [(b, p) for b in PROTOCOL for p in OPTIONED if base_of(p) == "split" or b in FUSING]
MASKING = [b for b in PROTOCOL if b in ("cuda", "triton")]

CHAINS = [
    Chain("none", kernel=3, padding=1),
    Chain("none", kernel=3, padding=1, stride=2),
    Chain("none", (3, 5, 6, 7), 7, kernel=3, padding=1, training=False),
    Chain("none", kernel=3, padding=1, relu=False),
    Chain("none", kernel=3, padding=1, groups=2),  # split, whatever was asked for
    Chain("none", kernel=2, padding=1, dilation=2),
    Chain("deferred_residual", kernel=3, padding=1),
    Chain("tensor_residual", (3, 8, 6, 5), kernel=1),
    Chain("tensor_residual", (2, 16, 6, 5), 24, emit=True),
    Chain("deferred_residual", (2, 24, 9, 7), 8, emit=True),
    Chain("tensor_residual", (2, 72, 4, 5), 8, emit=True),  # several tiles of channels
    Chain("tensor_residual", (2, 5, 4, 4), 3, emit=True),  # 8 does not divide its channels
    Chain("none", (2, 16, 5, 5), 8, emit=True, relu=False),
    Chain("tensor", (2, 8, 5, 5), 8, kernel=3, padding=1, emit=True),
]


@pytest.mark.parametrize(("backend", "plan"), WAYS)
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_three_way(chain: Chain, backend: str, plan: str) -> None:
    check_case(chain, backend, torch.float64, CHANNELS_LAST, plan=plan)


@pytest.mark.parametrize(("backend", "plan"), WAYS)
def test_three_way_in_fewer_bits(backend: str, plan: str) -> None:
    dtypes = [d for d in (torch.float32, torch.float16) if serves(backend, "conv_bn", d)]
    for dtype in dtypes:
        for chain in (CHAINS[0], CHAINS[8]):
            if dtype == torch.float16:
                chain = replace(chain, relu=False, out_relu=False)
            check_case(chain, backend, dtype, CHANNELS_LAST, plan=plan)


# --- unmasked gradients ---------------------------------------------------------------------------


def _inputs() -> Inputs:
    """Those of two convolutions, the second one a 3x3, and of the first one's BatchNorm."""
    t = Chain("none", kernel=3).inputs(Maker(torch.float64, CHANNELS_LAST))
    return {name: x for name, x in t.items() if not name.startswith("n.")}


def _eager(t: Inputs, read: Callable[[Tensor], Tensor], training: bool = True) -> Tensor:
    return read(eager_batch_norm(F.conv2d(t["x"], t["w0"]), t, "n0", training).relu())


def _first(t: Inputs, training: bool = True) -> Deferred:
    return conv_bn(t["x"], t["w0"], *norm_arguments(t, "n0"), training=training)


def _compare(t: Inputs, ours: Tensor, theirs: Callable[[Inputs], Tensor]) -> None:
    twin = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in t.items()}
    eager = dict(run(lambda t: {"value": theirs(t)}, twin))
    for name, result in run(lambda _: {"value": ours}, t):
        if "running" not in name:
            torch.testing.assert_close(result, eager[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", MASKING)
def test_a_split_reader_leaves_the_mask_to_whom_it_reads(backend: str, training: bool) -> None:
    t = _inputs()
    came: list[str] = []
    with use_backend(backend):
        d = _first(t, training)
        assert d.unmasked is not None and d.unmasked.untyped_storage().nbytes() == 8
        for name in ("y", "unmasked"):
            getattr(d, name).register_hook(
                lambda grad, name=name: came.append(name) if grad is not None else None
            )
        with use_plan("split"):
            h = conv_bn(d, t["w"], padding=1, relu=False)
            ours = h.value()
    _compare(
        t,
        ours,
        lambda t: F.batch_norm(
            _eager(t, lambda a: F.conv2d(a, t["w"], padding=1), training), None, None, training=True
        ),
    )
    assert came == ["unmasked"]


@pytest.mark.parametrize("first", ["split", "fused"])
@pytest.mark.parametrize("backend", MASKING)
def test_gradients_along_both_carriers_add_up(backend: str, first: str) -> None:
    """One reader masks, another does not; two that do not; and one to whom there is no ReLU."""
    t = _inputs()
    with use_backend(backend), use_plan(first if backend in FUSING else "split"):
        d = _first(t)
    with use_backend(backend), use_plan("split"):
        ours = conv_bn(d, t["w"], padding=1).value() + conv_bn(d, t["w"], padding=1).value()
        linear = replace(d, relu=False)
        ours = ours + linear.value()[:, :6] + d.value()[:, 2:]
        ours = ours + conv_bn(linear, t["w"], padding=1, relu=False).value()

    def theirs(t: Inputs) -> Tensor:
        u = eager_batch_norm(F.conv2d(t["x"], t["w0"]), t, "n0", True)
        y = F.batch_norm(F.conv2d(u.relu(), t["w"], padding=1), None, None, training=True)
        of_linear = F.batch_norm(F.conv2d(u, t["w"], padding=1), None, None, training=True)
        return 2 * y.relu() + u[:, :6] + u.relu()[:, 2:] + of_linear

    _compare(t, ours, theirs)


@pytest.mark.parametrize("backend", MASKING)
def test_a_carrier_goes_with_its_own_y(backend: str) -> None:
    """Where y was replaced, the gradient goes along what it was replaced by."""
    found = []
    for plan in ("split", "fused" if backend in FUSING else "split"):
        t = _inputs()
        with use_backend(backend):
            d = _first(t)
            d = replace(d, y=d.y.flip(0))
            with use_plan(plan):
                h = conv_bn(d, t["w"], padding=1, relu=False).value()
        (h * torch.arange(h.numel()).view_as(h)).sum().backward()
        found.append(t["x"].grad)
    assert found[0].any() and torch.allclose(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_cannot_mask_offers_no_carrier(backend: str) -> None:
    t = Chain("tensor_residual").inputs(Maker(torch.float32, CHANNELS_LAST))
    with use_backend(backend):
        offers = _first(t).unmasked is not None
        assert offers == (backend in MASKING)
        assert conv_bn(t["x"], t["w0"], relu=False).unmasked is None
        assert conv_bn(t["x"], t["w0"], residual=t["r"]).unmasked is None
        assert batch_norm(t["x"]).unmasked is None


@pytest.mark.parametrize("backend", MASKING)
def test_a_frozen_first_layer_gets_its_gradients(backend: str) -> None:
    """Without the weight's gradient, and without the input's."""
    for frozen in ("x", "w0"):
        t = _inputs()
        t[frozen].requires_grad_(False)
        with use_backend(backend):
            d = _first(t)
            with use_plan("split"):
                ours = conv_bn(d, t["w"], padding=1).value()

        def theirs(t: Inputs) -> Tensor:
            y = _eager(t, lambda a: F.conv2d(a, t["w"], padding=1))
            return F.batch_norm(y, None, None, training=True).relu()

        twin = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in t.items()}
        eager = dict(run(lambda t: {"value": theirs(t)}, twin))
        for name, result in run(lambda _, ours=ours: {"value": ours}, t):
            if "running" not in name and name != frozen:
                torch.testing.assert_close(result, eager[name], rtol=1e-9, atol=1e-9, msg=name)


# --- sampled gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("also_whole", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 6, 4), (2, 8, 5, 7), (3, 8, 1, 4), (4, 8, 1, 1)])
@pytest.mark.parametrize(
    ("backend", "plan"), [(b, p) for b in BACKENDS for p in ("split", *OPTIONED[1:3], "fused")]
)
def test_a_sampled_activation(
    backend: str, plan: str, shape: tuple[int, ...], also_whole: bool
) -> None:
    """A strided reader alone, and another one beside it."""
    if base_of(plan) not in registry.BACKENDS[backend].plans:
        plan = "split"
    t = Chain("tensor_residual", shape, 16).inputs(Maker(torch.float64, CHANNELS_LAST))  # type: ignore[arg-type]
    t["wd"] = Maker(torch.float64, CHANNELS_LAST, seed=1).weight(24, 8, 1, 1)
    with use_backend(backend), use_plan(plan):
        d = conv_bn(t["x"], t["w0"], *norm_arguments(t, "n0"), residual=t["r"])
        h, sampled = conv_bn(d, t["w"], *norm_arguments(t, "n"), emit=(2, 2))
        assert isinstance(sampled, Sampled) and sampled.value.shape == d.shape
        small = [-(-e // 2) for e in shape[2:]]
        assert list(sampled.carrier.shape) == [shape[0], 8, *small]
        shortcut = conv_bn(sampled, t["wd"], stride=2, relu=False)
        ours = [h.value().sum((2, 3)), shortcut.value().square().sum((2, 3))]
        ours += [sampled.value.sum((2, 3))] if also_whole else []

    def theirs(t: Inputs) -> Tensor:
        a = (eager_batch_norm(F.conv2d(t["x"], t["w0"]), t, "n0", True) + t["r"]).relu()
        y = eager_batch_norm(F.conv2d(a, t["w"]), t, "n", True).relu()
        s = F.batch_norm(F.conv2d(a, t["wd"], stride=2), None, None, training=True)
        parts = [y.sum((2, 3)), s.square().sum((2, 3))] + [a.sum((2, 3))] * also_whole
        return torch.cat(parts, 1)

    if shape[0] * small[0] * small[1] > 1:
        _compare(t, torch.cat(ours, 1), theirs)


def test_a_sampled_activation_is_for_the_convolution_that_it_was_made_for() -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 1, 1)
    d, sampled = conv_bn(x, w, emit=(2, 2))
    for options in ({}, {"stride": (2, 1)}, {"stride": 2, "padding": 1}):
        with pytest.raises(ValueError, match=r"conv_bn: input is sampled by stride \[2, 2\]"):
            conv_bn(sampled, w, **options)
    with pytest.raises(ValueError, match="input is sampled"):
        conv_bn(sampled, torch.randn(6, 4, 3, 3), stride=2)
    with pytest.raises(ValueError, match="input is sampled"):
        conv_bn(sampled, torch.randn(6, 2, 1, 1), stride=2, groups=2)
    with pytest.raises(ValueError, match=r"input.carrier must have shape \[2, 4, 3, 3\]"):
        conv_bn(sampled._replace(carrier=sampled.value), w, stride=2)
    for emit, error in (((3, 3), ValueError), ((0, 1), ValueError), ((2.0, 2), TypeError)):
        with pytest.raises(error, match="conv_bn: emit must"):
            conv_bn(x, w, emit=emit)  # type: ignore[call-overload]
    assert d.shape == (2, 6, 5, 5)


# --- what is kept ---------------------------------------------------------------------------------


def _saved(plan: str, backend: str, **options: Any) -> tuple[list[Tensor], Deferred, Any]:
    t = Chain("none", (4, 8, 8, 8), 8).inputs(Maker(torch.float32, CHANNELS_LAST))
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with use_backend(backend), use_plan(plan):
        d = _first(t)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            h = conv_bn(d, t["w"], **options)
    return saved, d, h


@pytest.mark.parametrize("backend", PROTOCOL)
def test_keep_saves_the_activation_and_plain_plans_do_not(backend: str) -> None:
    for plan, kept in (("split", 0), ("split+keep", 1)):
        saved, d, h = _saved(plan, backend)
        others = {d.y.data_ptr(), h.y.data_ptr()}
        full = [s for s in saved if s.shape == d.shape and s.data_ptr() not in others]
        assert len(full) == kept
        for a in full:
            torch.testing.assert_close(a, d.value())


@pytest.mark.parametrize("backend", FUSING)
def test_masks_are_kept_in_bits(backend: str) -> None:
    saved, _, (_, a) = _saved("fused+masks", backend, emit=True)
    (bits,) = [s for s in saved if s.dtype == torch.uint8]
    assert bits.shape == (4 * 8 * 8, 1)
    rows = a.permute(0, 2, 3, 1).reshape(-1, 8)
    assert torch.equal((bits >> torch.arange(8, dtype=torch.uint8)) & 1, (rows > 0).byte())


@pytest.mark.parametrize("backend", FUSING)
def test_masks_change_no_bit_of_a_result(backend: str) -> None:
    chain = Chain("deferred_residual", (3, 24, 7, 7), 16, emit=True)
    found = []
    for plan in ("fused", "fused+masks"):
        with use_backend(backend), use_plan(plan):
            t = chain.inputs(Maker(torch.float32, CHANNELS_LAST))
            with torch.no_grad():
                t["x"][0, 3, 1, 1] = float("nan")  # lets its gradient through
            found.append(dict(run(chain.ours, t)))
    for name, result in found[0].items():
        assert torch.equal(result.nan_to_num(), found[1][name].nan_to_num()), name
        assert torch.equal(result.isnan(), found[1][name].isnan()), name


@pytest.mark.parametrize(("backend", "plan"), WAYS)
@pytest.mark.parametrize("emit", [False, True])
def test_opcheck(backend: str, plan: str, emit: bool) -> None:
    make = Maker(torch.float32, CHANNELS_LAST)
    x, r = make.activation(2, 8, 5, 5, grad=False), make.activation(2, 8, 5, 5, grad=False)
    v, w = [torch.rand(8) for _ in range(3)], make.weight(6, 8, 1, 1).detach()
    source = (x, *v, r if emit else None, None, None, None, True)
    conv = (w, None, (1, 1), (0, 0, 0, 0), (1, 1), 1)
    bn = (torch.rand(6), torch.rand(6), torch.rand(6), torch.rand(6), True, 0.1, None, 1e-5)
    if emit:
        plan = without(plan, "keep")
    forward = (*source, *conv, emit, *bn, backend, plan)
    torch.library.opcheck(torch.ops.fusedres.conv_bn_fwd, forward)
    y, mean, _, rstd, scale, bias, a, bits = torch.ops.fusedres.conv_bn_fwd(*forward)
    backward = (
        *source, *conv, a if a.numel() else None, bits if bits.numel() else None,
        torch.randn_like(y), torch.randn(2, 6), torch.randn_like(x) if emit else None, y, mean,
        scale, rstd, bias if backend in MASKING else None, True, True, True, torch.float32,
        torch.float16, backend, plan,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fusedres.conv_bn_bwd, backward)


@pytest.mark.parametrize("backend", FUSING)
def test_wrong_bits_and_gradients_end_in_a_value_error(backend: str) -> None:
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=CHANNELS_LAST)
    v, w, y = torch.ones(8), torch.randn(8, 8, 1, 1), torch.randn_like(x)
    conv = (w, None, (1, 1), (0, 0, 0, 0), (1, 1), 1)

    def call(bits: Any = None, grad_a: Any = None, y_bias: Any = None, plan: str = "fused") -> None:
        torch.ops.fusedres.conv_bn_bwd(
            x, v, v, v, None, None, None, None, True, *conv, x, bits, y, torch.ones(2, 8), grad_a,
            y, v, v, v, y_bias, True, True, True, None, None, backend, plan,
        )  # fmt: skip

    good = torch.zeros(72, 1, dtype=torch.uint8)
    half = torch.zeros(2, 8, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    call(good, half, v, "fused+masks")
    for bad in (
        {"bits": good[:-1]},
        {"bits": good.int()},
        {"bits": torch.zeros(72, 2, dtype=torch.uint8)[:, :1]},
        {"grad_a": half[:, :4]},
        {"grad_a": half[:, :, :2]},
        {"grad_a": half.contiguous()},
        {"grad_a": half.double()},
        {"grad_a": half[0]},
        {"y_bias": v[:4]},
        {"plan": "fused+compact"},  # of a Deferred
        {"plan": "fused+nothing"},
        {"plan": ""},
    ):
        try:
            call(**bad)
        except ValueError:
            continue
        pytest.fail(f"{list(bad)} passed")


# --- names ----------------------------------------------------------------------------------------


def test_plans_are_written_as_they_are_read() -> None:
    texts = ("fused", "split+keep+unmasked", "fused+masks+merged+compact", "epilogue+keep")
    for text in (*texts, "fused+mma", "fused+wgmma", "fused+wgmma+compact"):
        assert str(Plan.of(text)) == text
        asked_for = "unmasked" not in text and "compact" not in text
        assert is_plan(text) == asked_for  # the others are for ops to add
    assert Plan.of("fused+merged+masks") == Plan.of("fused+masks+merged")
    assert has("split+keep", "keep") and not has("split", "keep") and not has("keep", "keep")
    assert without("split+keep+compact", "keep") == "split+compact"
    for text, product in (("fused+mma", "mma"), ("fused+wgmma+compact", "wgmma"), ("fused", "")):
        assert product_of(text) == Plan.of(text).product == product
    assert without("fused+wgmma+compact", "mma") == "fused+wgmma+compact"
    wrong = ("", "keep", "fused+", "fused+keep", "split+masks", "split+keep+keep", "Fused")
    wrong += ("split+mma", "epilogue+wgmma", "fused+mma+wgmma", "fused+mma+masks", "mma")
    for text in (*wrong, "fused+merged+wgmma", "fused+mma+mma"):
        assert not is_plan(text)
        accepted = "'fused' and masks, merged, mma, wgmma; .* mma and wgmma each without another"
        with pytest.raises(ValueError, match=rf"plan: got .*, accepted: {accepted}"):
            Plan.of(text)
    assert not is_plan(3)


def test_plans_of_dataflows() -> None:
    for flow in DATAFLOWS.values():
        assert is_plan(flow.pointwise) and is_plan(flow.spatial) and is_plan(flow.stem)
    with pytest.raises(ValueError, match="use_plan: name: got 'fused_2x2', accepted: 'auto'"):
        use_plan("fused_2x2")
    for name in ("split+masks", "split+unmasked", "fused+compact"):
        with pytest.raises(ValueError, match="use_plan: name"):
            use_plan(name)


@pytest.mark.parametrize("name", ["masks", "epilogue"])
def test_a_dataflow_needs_a_backend_that_fuses(name: str) -> None:
    with use_backend("reference"), use_plan(name), pytest.raises(RuntimeError, match="has no"):
        fusedres.IdentityBlock(8, (8, 8, 8))(torch.randn(1, 8, 4, 4))


@pytest.fixture
def traced() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("backend", FUSING)
def test_blocks_compile_under_a_dataflow(backend: str) -> None:
    stage = fusedres.nn.Stage(
        fusedres.IdentityBlock(16, (8, 8, 16)), fusedres.ConvBlock(16, (8, 8, 16))
    )
    x = torch.randn(2, 16, 6, 6).to(memory_format=CHANNELS_LAST)
    with use_backend(backend), use_plan("masks"):
        backward: list[str] = []

        def count(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
            backward.extend(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        counting = aot_autograd(fw_compiler=nop, bw_compiler=count)
        compiled = torch.compile(stage, backend=counting, fullgraph=True)
        results = []
        for module in (stage, compiled):
            leaf = x.clone().requires_grad_()
            module(leaf).square().sum().backward()
            results.append(leaf.grad)
            stage.zero_grad()
    torch.testing.assert_close(results[0], results[1])
    # nothing is masked, spread or added beside our kernels: only value()'s own square
    ours = collections.Counter(target for target in backward if target.startswith("fusedres"))
    assert ours == {"fusedres.conv_bn_bwd.default": 7, "fusedres.bn_act_bwd.default": 1}
    assert not any(word in target for target in backward for word in ("where", "zeros", "slice"))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_may_be_symbols(backend: str) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return fusedres.conv_bn_relu(x, w, torch.ones(w.size(0)), torch.zeros(w.size(0)))

    with use_backend(backend):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
        for c in (8, 16, 24):
            x, w = torch.randn(2, c, 4, 4), torch.randn(c, c, 1, 1)
            torch.testing.assert_close(compiled(x, w), function(x, w))
