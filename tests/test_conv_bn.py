"""conv_bn: the three-way rule, gradcheck, opcheck, what is saved, and the errors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import Deferred, use_backend, use_plan
from fusedres import backends as registry
from fusedres._conv import Conv
from fusedres.library import conv_bn as library
from fusedres.ops import bn_act, conv_bn
from fusedres.testing import (
    CHANNELS_LAST,
    CONTIGUOUS,
    HALF_TYPES,
    Inputs,
    Maker,
    Outputs,
    check_case,
    eager_batch_norm,
    error,
    gradcheck,
    norm_arguments,
    run,
    serves,
    serving_backends,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = serving_backends()
PROTOCOL = [b for b in BACKENDS if b != "reference"]  # those whose gradients run through sums
# plans with options, and what lies between these two: test_conv_bn_plans; "fused" of cpp and cuda,
# which is for blocks of channels: test_conv_bn_pointwise, test_conv_bn_tensor_core
WAYS = [(b, p) for b in BACKENDS for p in ("fused", "split") if p in registry.BACKENDS[b].plans]
WAYS = [way for way in WAYS if way not in (("cpp", "fused"), ("cuda", "fused"))]
PROTOCOL_WAYS = [(b, plan) for b, plan in WAYS if b != "reference"]


@dataclass(frozen=True)
class Chain:
    """conv_bn of `source`, read through value().

    source: "tensor", or a Deferred with no residual, a Tensor, or a Deferred ("none",
    "tensor_residual", "deferred_residual").
    """

    source: str = "none"
    shape: tuple[int, int, int, int] = (4, 8, 7, 5)
    channels: int = 6
    first: int = 1  # side of the kernel in front
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    relu: bool = True  # of the source
    out_relu: bool = True
    emit: bool = False
    training: bool = True
    affine: bool = True

    def __str__(self) -> str:
        default = Chain()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return ",".join(f"{k}={v}" for k, v in changed.items()) or "default"

    def inputs(self, make: Maker) -> Inputs:
        c = self.shape[1]
        t = {"x": make.activation(*self.shape)}
        if self.source != "tensor":
            t |= {"w0": make.weight(c, c, self.first, self.first)} | make.norm("n0", c, self.affine)
        if self.source.endswith("residual"):
            t["r"] = make.activation(*self.shape)
        if self.source == "deferred_residual":
            t |= {"wr": make.weight(c, c, self.first, self.first)} | make.norm("nr", c, self.affine)
        t["w"] = make.weight(self.channels, c // self.groups, self.kernel, self.kernel)
        return t | make.norm("n", self.channels, self.affine)

    def ours(self, t: Inputs) -> Outputs:
        def op(x: Tensor | Deferred, suffix: str, **kwargs: Any) -> Any:
            norm = norm_arguments(t, f"n{suffix}")
            kwargs.setdefault("padding", self.first // 2)
            return conv_bn(x, t[f"w{suffix}"], *norm, training=self.training, **kwargs)

        x: Tensor | Deferred = t["x"]
        if self.source != "tensor":
            residual: Tensor | Deferred | None = t.get("r")
            if self.source == "deferred_residual":
                residual = op(t["r"], "r", relu=False)
            x = op(x, "0", relu=self.relu, residual=residual)
        h = op(
            x, "", stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.groups, emit=self.emit, relu=self.out_relu,
        )  # fmt: skip
        if self.emit:
            return {"value": h[0].value(), "emitted": h[1]}
        return {"value": h.value()}

    def eager(self, t: Inputs) -> Outputs:
        a = t["x"]
        if self.source != "tensor":
            a = eager_batch_norm(
                F.conv2d(a, t["w0"], padding=self.first // 2), t, "n0", self.training
            )
            if self.source == "tensor_residual":
                a = a + t["r"]
            if self.source == "deferred_residual":
                a = a + eager_batch_norm(
                    F.conv2d(t["r"], t["wr"], padding=self.first // 2), t, "nr", self.training
                )
            a = a.relu() if self.relu else a
        y = F.conv2d(a, t["w"], None, self.stride, self.padding, self.dilation, self.groups)
        value = eager_batch_norm(y, t, "n", self.training)
        value = value.relu() if self.out_relu else value
        return {"value": value, "emitted": a} if self.emit else {"value": value}


SOURCES = ["tensor", "none", "tensor_residual", "deferred_residual"]
# every source with every flag; then each odd shape and geometry with the richest source
CHAINS = [
    *(Chain(source=s, emit=e) for s, e in itertools.product(SOURCES, (False, True))),
    *(Chain(source=s, relu=False, emit=True) for s in SOURCES[1:]),
    *(Chain(source=s, training=False) for s in SOURCES),
    Chain(source="deferred_residual", affine=False),
    Chain("deferred_residual", kernel=3, padding=1),
    Chain("deferred_residual", kernel=3, padding=1, stride=2),
    Chain("deferred_residual", stride=2),
    Chain("tensor", stride=2, emit=True),  # the shortcut's gradient falls between the pixels read
    Chain("deferred_residual", kernel=2, padding=1),
    Chain("deferred_residual", kernel=3, padding=2, dilation=2),
    Chain("deferred_residual", kernel=3, padding=1, groups=2),
    Chain("tensor", (2, 3, 19, 17), 13, kernel=7, stride=2, padding=3),
    Chain("deferred_residual", (3, 3, 5, 7), 5, emit=True),  # fewer channels than any vector
    # one channel; BatchNorm hides the scale of a lone tap, so that its gradient is all cancellation
    Chain("deferred_residual", (5, 1, 4, 3), 2, first=3, kernel=3, padding=1),
    Chain("deferred_residual", (1, 8, 6, 6), 4, emit=True),  # one image
    Chain("deferred_residual", (7, 5, 1, 1), 11, emit=True),  # statistics over the batch alone
    Chain("deferred_residual", (2, 17, 13, 11), 19, emit=True),  # primes
    Chain("deferred_residual", (2, 64, 9, 9), 65, emit=True),  # one past a vector
]


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "plan"), WAYS)
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_three_way(
    chain: Chain, backend: str, plan: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    if dtype in HALF_TYPES:  # masks flip by chance there: test_half_types_masks looks at them
        chain = replace(chain, relu=False, out_relu=False)
    if serves(backend, "conv_bn", dtype):
        check_case(chain, backend, dtype, memory_format, plan=plan)
    else:
        with (
            use_backend(backend),
            use_plan(plan),
            pytest.raises(RuntimeError, match=f"'{backend}' serves"),
        ):
            chain.ours(chain.inputs(Maker(dtype)))


@pytest.mark.parametrize(("backend", "plan"), WAYS)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_half_types_masks(source: str, dtype: torch.dtype, backend: str, plan: str) -> None:
    if serves(backend, "conv_bn", dtype):
        chain = Chain(source, (16, 8, 17, 17), 8, emit=True)  # large: flips average out
        check_case(chain, backend, dtype, CHANNELS_LAST, trim=0.01, plan=plan)


@pytest.mark.parametrize(("backend", "plan"), WAYS)
@pytest.mark.parametrize(
    "chain",
    [
        *(Chain(s, (2, 3, 3, 2), 2, emit=True) for s in SOURCES),
        Chain("deferred_residual", (2, 2, 4, 4), 3, kernel=3, stride=2, padding=1),
        Chain("deferred_residual", (2, 2, 4, 4), 3, kernel=2, stride=2),
        Chain("deferred_residual", (2, 2, 3, 3), 3, stride=2, training=False),
        Chain("none", (2, 2, 3, 3), 3, relu=False, emit=True, affine=False),
    ],
    ids=str,
)
def test_gradcheck(chain: Chain, backend: str, plan: str) -> None:
    gradcheck(chain, backend, plan)


@pytest.mark.parametrize(("backend", "plan"), WAYS)
@pytest.mark.parametrize("emit", [False, True])
def test_empty_batch(backend: str, plan: str, emit: bool) -> None:
    chain = Chain("deferred_residual", (0, 8, 5, 5), emit=emit)
    t = chain.inputs(Maker(torch.float32))
    before = t["n.running_mean"].clone()
    with use_backend(backend), use_plan(plan):
        outputs = chain.ours(t)
        sum(out.sum() for out in outputs.values()).backward()  # type: ignore[union-attr]
    assert outputs["value"].shape == (0, 6, 5, 5)
    assert torch.equal(t["n.running_mean"], before)
    for name, x in t.items():
        if x.requires_grad:
            assert x.grad is not None and x.grad.shape == x.shape and not x.grad.any(), name


@pytest.mark.parametrize(("backend", "plan"), WAYS)
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_non_contiguous_inputs_and_gradients(backend: str, plan: str, how: str) -> None:
    def view(x: Tensor) -> Tensor:
        if how == "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        if how == "sliced":
            return torch.cat([x, x], 1)[:, : x.size(1)]
        return x[:1].expand_as(x)

    @dataclass(frozen=True)
    class Viewed(Chain):
        def ours(self, t: Inputs) -> Outputs:
            viewed = {k: view(x) if x.dim() == 4 and k in "xr" else x for k, x in t.items()}
            # the gradients that arrive at value and emitted are strided as the views are
            return {k: view(x) for k, x in super().ours(viewed).items()}

        def eager(self, t: Inputs) -> Outputs:
            viewed = {k: view(x) if x.dim() == 4 and k in "xr" else x for k, x in t.items()}
            return {k: view(x) for k, x in super().eager(viewed).items()}

    check_case(Viewed("deferred_residual", emit=True), backend, torch.float64, plan=plan)


@pytest.mark.parametrize(("backend", "plan"), WAYS)
def test_two_readers_of_one_deferred(backend: str, plan: str) -> None:
    @dataclass(frozen=True)
    class Forked(Chain):
        def ours(self, t: Inputs) -> Outputs:
            h = conv_bn(t["x"], t["w0"], *norm_arguments(t, "n0"))
            k = conv_bn(h, t["w"], *norm_arguments(t, "n"))
            return {"value": k.value(), "source": h.value()}

        def eager(self, t: Inputs) -> Outputs:
            a = eager_batch_norm(F.conv2d(t["x"], t["w0"]), t, "n0", True).relu()
            value = eager_batch_norm(F.conv2d(a, t["w"]), t, "n", True).relu()
            return {"value": value, "source": a}

    check_case(Forked(), backend, torch.float64, plan=plan)


@pytest.mark.parametrize(("backend", "plan"), WAYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_output(backend: str, plan: str, value: float) -> None:
    t = Chain("tensor").inputs(Maker(torch.float32))
    with torch.no_grad():
        t["x"][0, 0, 0, 0] = value
    with use_backend(backend), use_plan(plan):
        out = Chain("tensor").ours(t)["value"]
    assert out.isnan().all()


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
def test_deterministic(backend: str, plan: str) -> None:
    chain = Chain("deferred_residual", (8, 16, 14, 14), 16, kernel=3, padding=1)
    with use_backend(backend), use_plan(plan):
        first, second = (chain.ours(chain.inputs(Maker(torch.float32)))["value"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
@pytest.mark.parametrize("emit", [False, True])
def test_saves_what_the_design_lists(backend: str, plan: str, emit: bool) -> None:
    chain = Chain("tensor_residual", (4, 8, 8, 8), 8, emit=emit)
    t = chain.inputs(Maker(torch.float32, CHANNELS_LAST))
    with use_backend(backend), use_plan(plan):
        d = conv_bn(t["x"], t["w0"], *norm_arguments(t, "n0"), residual=t["r"])
        saved: list[Tensor] = []

        def pack(x: Tensor) -> Tensor:
            saved.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = conv_bn(d, t["w"], *norm_arguments(t, "n"), emit=emit)
    storages = {s.data_ptr() for s in saved if s.dim() == 4}
    h, a = result if emit else (result, None)
    kept = [d.y, h.y, t["w"], a if a is not None else t["r"]]
    assert storages == {x.data_ptr() for x in kept}  # a or the residual, never both


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
def test_frozen_parts_get_no_gradient(backend: str, plan: str) -> None:
    for frozen in ("x", "w", "n.weight", "n.bias"):
        t = Chain("tensor").inputs(Maker(torch.float32))
        t[frozen].requires_grad_(False)
        with use_backend(backend), use_plan(plan):
            Chain("tensor").ours(t)["value"].sum().backward()
        for name, x in t.items():
            assert (x.grad is not None) == x.requires_grad, (frozen, name)


def test_weight_gradient_in_the_parameters_dtype_and_strides() -> None:
    w = torch.randn(8, 4, 3, 3).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        d = conv_bn(x, w, torch.ones(8), torch.zeros(8))
    assert d.y.dtype == torch.bfloat16 and d.mean.dtype == torch.float32
    d.value().sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32 and w.grad.stride() == w.stride()


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
def test_gradient_of_y_alone_is_refused(backend: str, plan: str) -> None:
    t = Chain("tensor").inputs(Maker(torch.float32))
    with use_backend(backend), use_plan(plan):
        d = conv_bn(t["x"], t["w"], *norm_arguments(t, "n"))
    with pytest.raises(RuntimeError, match=r"Deferred\.y without its sums"):
        d.y.sum().backward()


@pytest.mark.parametrize("backend", PROTOCOL)
def test_backends_may_meet(backend: str) -> None:
    chain, t = Chain("none"), Chain("none").inputs(Maker(torch.float64))
    eager = dict(run(chain.eager, chain.inputs(Maker(torch.float64))))
    with use_backend("reference"):
        d = conv_bn(t["x"], t["w0"], *norm_arguments(t, "n0"))
    with use_backend(backend):
        value = conv_bn(d, t["w"], *norm_arguments(t, "n")).value()
    for name, result in run(lambda _: {"value": value}, t):
        torch.testing.assert_close(result, eager[name], rtol=1e-9, atol=1e-9)

    with use_backend(backend):
        d = conv_bn(t["x"], t["w0"], *norm_arguments(t, "n0"))
    with use_backend("reference"), pytest.raises(RuntimeError, match="ordinary autograd"):
        conv_bn(d, t["w"], *norm_arguments(t, "n"))
    with use_backend("reference"), torch.no_grad():
        d = Deferred(d.y.detach(), d.mean, d.scale, d.bias)
        assert bn_act(d).shape == d.shape


@pytest.mark.parametrize("loss", [torch.sum, lambda v: v.square().sum()], ids=["sum", "square"])
@pytest.mark.parametrize("backend", PROTOCOL)
def test_double_backward_is_refused(backend: str, loss: Any) -> None:
    """Also of a sum, whose gradient needs none itself; ordinary autograd has it."""
    t = Chain("tensor").inputs(Maker(torch.float32))
    with use_backend(backend):
        value = Chain("tensor").ours(t)["value"]
    with pytest.raises(RuntimeError, match=r"no double backward .*use_backend\('reference'\)"):
        torch.autograd.grad(loss(value), t["x"], create_graph=True)
    with use_backend("reference"):
        value = Chain("tensor").ours(t)["value"]
    (g,) = torch.autograd.grad(value.square().sum(), t["x"], create_graph=True)
    g.square().sum().backward()
    assert t["x"].grad.any()


@pytest.mark.parametrize("backend", PROTOCOL)
def test_transforms_of_torch_func_are_refused(backend: str) -> None:
    x, w, v = torch.randn(3, 2, 4, 4), torch.randn(5, 2, 1, 1), torch.ones(5)

    def loss(x: Tensor) -> Tensor:
        return conv_bn(x, w, None, None, v, v, training=False).value().sum()

    transforms: list[Any] = [
        lambda: torch.func.grad(loss)(x),
        lambda: torch.func.vmap(loss)(x[None]),
        lambda: torch.func.jvp(loss, (x,), (x,)),
    ]
    for transform in transforms:
        with use_backend(backend), pytest.raises(RuntimeError, match=r"transforms of torch\.func"):
            transform()
        with use_backend("reference"):
            transform()


def test_an_empty_batch_of_another_dtype_is_refused_as_a_full_one_is() -> None:
    weight, conv = torch.randn(5, 3, 1, 1), Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)
    for n in (0, 2):
        x, dy = torch.zeros(n, 3, 4, 4, dtype=torch.int32), torch.zeros(n, 5, 4, 4)
        with pytest.raises((TypeError, RuntimeError)):
            library.convolution(x, weight, conv, CONTIGUOUS)
        for image, grad in [(x, dy), (x.float(), dy.double())]:
            with pytest.raises((TypeError, RuntimeError)):
                library.convolution_backward(grad, image, weight, conv, True, True)


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
@pytest.mark.parametrize("emit", [False, True])
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
def test_opcheck(backend: str, plan: str, emit: bool, memory_format: torch.memory_format) -> None:
    make = Maker(torch.float32, memory_format)
    x, r = make.activation(2, 4, 5, 5, grad=False), make.activation(2, 4, 5, 5, grad=False)
    vectors = [torch.rand(4) for _ in range(6)]
    w = make.weight(6, 4, 1, 1).detach()
    source = (x, *vectors[:3], r, *vectors[3:], True)
    conv = (w, None, (1, 1), (0, 0, 0, 0), (1, 1), 1)
    bn = (torch.rand(6), torch.rand(6), torch.rand(6), torch.rand(6), True, 0.1, None, 1e-5)
    forward = (*source, *conv, emit, *bn, backend, plan)
    torch.library.opcheck(torch.ops.fusedres.conv_bn_fwd, forward)
    y, mean, _, rstd, scale, _, a, bits = torch.ops.fusedres.conv_bn_fwd(*forward)
    upstream = (torch.randn_like(y), torch.randn(2, 6), torch.randn_like(x) if emit else None)
    backward = (
        *source, *conv, a if a.numel() else None, bits if bits.numel() else None, *upstream,
        y, mean, scale, rstd, None, True, True, True,
        torch.float32, torch.float16, backend, plan,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fusedres.conv_bn_bwd, backward)


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
def test_saved_tensors_may_come_back_in_another_memory_format(backend: str, plan: str) -> None:
    chain = Chain("tensor_residual", (3, 8, 6, 5))
    eager = dict(run(chain.eager, chain.inputs(Maker(torch.float64))))

    def pack(x: Tensor) -> Tensor:
        return x if x.is_leaf else x.detach().contiguous()

    t = chain.inputs(Maker(torch.float64, CHANNELS_LAST))
    with (
        use_backend(backend),
        use_plan(plan),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        for name, result in run(chain.ours, t):
            torch.testing.assert_close(result, eager[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("backend", PROTOCOL)
def test_nothing_is_computed_for_an_input_without_gradient(backend: str) -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(4, 4, 1, 1, requires_grad=True)
    with use_backend(backend):
        d, a = conv_bn(x, w, emit=True)
    assert d.y.requires_grad and not a.requires_grad


@pytest.mark.parametrize("backend", PROTOCOL)
def test_parameters_of_batch_norm_may_change_before_backward(backend: str) -> None:
    """Backward needs neither; plain PyTorch lets the bias change too."""
    t = Chain("tensor").inputs(Maker(torch.float32))
    with use_backend(backend):
        value = Chain("tensor").ours(t)["value"]
    with torch.no_grad():
        t["n.bias"].add_(1.0)
    value.sum().backward()


def test_a_cropped_channels_last_input_stays_channels_last() -> None:
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=CHANNELS_LAST)[:, :, 1:5, :4]
    value = conv_bn(x, torch.randn(4, 8, 1, 1)).value()
    assert value.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("backend", PROTOCOL)
def test_direct_calls_of_the_ops_end_in_a_value_error(backend: str) -> None:
    """What reaches a kernel by torch.ops.fusedres is checked again: nothing here may crash."""
    ops = torch.ops.fusedres
    y, v, s = torch.randn(2, 4, 6, 6), torch.ones(4), torch.zeros(2, 4)
    bad = [y[:1], y.double(), y.transpose(2, 3), y.to(memory_format=CHANNELS_LAST)]
    bad_v = [v[:2], v.double(), torch.ones(8)[::2], v.view(2, 2)]
    calls = []
    for b in bad:
        calls += [
            lambda b=b: ops.bn_act_fwd(y, v, v, v, b, None, None, None, True, backend),
            lambda b=b: ops.bn_act_bwd(b, y, y, v, None, None, backend),
            lambda b=b: ops.bn_act_bwd(y, b, y, v, None, None, backend),
            lambda b=b: ops.bn_act_bwd(y, y, y, v, b, v, backend),
            lambda b=b: ops.batch_norm_bwd(b, y, v, v, v, s, True, None, None, backend),
            lambda b=b: ops.bn_relu_maxpool_bwd(b, y, v, v, v, 1, 1, 0, backend),
            lambda b=b: ops.add_relu_fwd(y, b, backend),
            lambda b=b: ops.add_relu_bwd(b, y, backend),
        ]
    for b in bad_v:
        calls += [
            lambda b=b: ops.bn_act_fwd(y, b, v, v, None, None, None, None, True, backend),
            lambda b=b: ops.bn_act_fwd(y, v, v, b, None, None, None, None, True, backend),
            lambda b=b: ops.bn_act_fwd(y, v, v, v, y, v, v, b, True, backend),
            lambda b=b: ops.bn_act_bwd(y, y, y, b, None, None, backend),
            lambda b=b: ops.batch_norm_bwd(y, y, v, b, v, s, True, None, None, backend),
            lambda b=b: ops.batch_norm_bwd(y, y, v, v, v, b, True, None, None, backend),
            lambda b=b: ops.bn_relu_maxpool_fwd(y, v, b, v, 3, 2, 1, backend),
        ]
    calls += [
        lambda: ops.bn_act_fwd(y, v, v, v, y, v, None, v, True, backend),
        lambda: ops.bn_act_fwd(y, v, v, v, None, v, v, v, True, backend),
        lambda: ops.bn_act_fwd(y[0], v, v, v, None, None, None, None, True, backend),
        lambda: ops.bn_act_fwd(y, v, v, v, None, None, None, None, True, "nope"),
        lambda: ops.bn_act_fwd(y, v, v, v, None, None, None, None, True, "reference"),
        lambda: ops.bn_relu_maxpool_fwd(y, v, v, v, 0, 1, 0, backend),
        lambda: ops.bn_relu_maxpool_fwd(y, v, v, v, 3, 0, 1, backend),
        lambda: ops.bn_relu_maxpool_fwd(y, v, v, v, 3, 2, 2, backend),
        lambda: ops.bn_relu_maxpool_bwd(y, y, v, v, v, 3, 2, 1, backend),
    ]
    if backend == "cpp":
        calls += [
            lambda: ops.batch_norm_fwd(y.half(), v, v, None, None, True, 0.1, None, 1e-5, backend)
        ]
    for call in calls:
        with pytest.raises(ValueError):
            call()


X, W = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
V = torch.ones(6)


def _deferred(**changes: Any) -> Deferred:
    zeros, ones = torch.zeros(4), torch.ones(4)
    fields: dict[str, Any] = {"y": X, "mean": zeros, "scale": ones, "bias": zeros}
    return Deferred(**(fields | changes))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, W), {}, TypeError, "input must be a Tensor or a Deferred, got NoneType"),
        ((X[0], W), {}, ValueError, r"input must be \[N, C, H, W\], got shape \[4, 5, 5\]"),
        ((X.int(), W), {}, TypeError, "input must be float32.*got torch.int32"),
        ((X.to_sparse(), W), {}, TypeError, "input must be dense"),
        ((X.to(torch.complex64), W), {}, TypeError, "input must be float32"),
        ((X, W.double()), {}, TypeError, "weight must be torch.float32.*got torch.float64"),
        ((X, W[:, :3]), {}, ValueError, "weight has 3 input channels.*the activation has 4"),
        ((X, W[0]), {}, ValueError, "weight must be"),
        ((X, W.to("meta")), {}, ValueError, "weight is on meta"),
        ((X, W[:0]), {}, ValueError, "weight must not be empty"),
        ((X, W, V[:5]), {}, ValueError, r"bn_weight must have shape \[6\], got \[5\]"),
        ((X, W, V, V[:5]), {}, ValueError, r"bn_bias must have shape \[6\]"),
        ((X, W, V, V, V), {}, ValueError, "running_mean and running_var must be given together"),
        ((X, W, V, V, V[:5], V), {}, ValueError, "running_mean must have shape"),
        ((X, W, V, V, V, V[:5]), {}, ValueError, "running_var must have shape"),
        ((X, W, V, V, V, V[:1].expand(6)), {}, ValueError, "running_var is expanded"),
        ((X, W, V, V), {"training": False}, ValueError, "training=False needs running_mean"),
        ((X, W), {"training": 1}, TypeError, "training must be a bool"),
        ((X, W), {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ((X, W), {"stride": (1, 2, 3)}, ValueError, "stride must be an int or a pair"),
        ((X, W), {"stride": 1.5}, TypeError, "stride must be an int"),
        ((X, W), {"padding": -1}, ValueError, "padding must be at least 0"),
        ((X, W), {"dilation": 0}, ValueError, "dilation must be at least 1"),
        ((X, W), {"dilation": 3}, ValueError, "kernel.*does not fit the padded input"),
        ((X, W), {"groups": 2}, ValueError, "weight has 4 input channels in each of 2 groups"),
        ((X, W[:5, :1]), {"groups": 4}, ValueError, "groups must divide"),
        ((X, W), {"momentum": "a"}, TypeError, "momentum must be a number"),
        ((X, W), {"momentum": float("nan")}, ValueError, "momentum must be finite"),
        ((X, W), {"momentum": V}, ValueError, "momentum must be a number or a 0-d tensor"),
        ((X, W), {"eps": -1.0}, ValueError, "eps must be finite and not negative"),
        ((X, W), {"eps": None}, TypeError, "eps must be a number"),
        ((X, W), {"relu": None}, TypeError, "relu must be a bool"),
        ((X, W), {"emit": 1}, TypeError, "emit must be a bool"),
        ((X, W), {"residual": X}, ValueError, r"residual must have shape \[2, 6, 3, 3\]"),
        ((X, W), {"residual": 3}, TypeError, "residual must be a Tensor"),
        ((X[:1, :, :3, :3], W), {}, ValueError, "more than 1 value per channel"),
        ((_deferred(), W), {"emit": True}, ValueError, "emit of a Deferred needs a 1x1 kernel"),
        ((_deferred(mean=V), W), {}, ValueError, r"input.mean must have shape \[4\]"),
        ((_deferred(scale=None), W), {}, TypeError, "input.scale must be a Tensor, got None"),
        ((_deferred(bias=V[:4].double()), W), {}, TypeError, "input.bias must be torch.float32"),
        ((_deferred(residual=X[:1]), W), {}, ValueError, "input.residual must have shape"),
        ((_deferred(residual=X.double()), W), {}, TypeError, "input.residual must be torch.f"),
        ((_deferred(residual=_deferred()), W), {}, ValueError, "a Deferred with a ReLU"),
        ((_deferred(sums=torch.zeros(2, 3)), W), {}, ValueError, r"input.sums must be .*\[2, 4\]"),
        (
            (_deferred(residual=_deferred(relu=False, residual=X)), W),
            {},
            ValueError,
            "a residual of its own",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"conv_bn: .*{message}"):
        conv_bn(*arguments, **options)


def test_nothing_is_written_before_an_error() -> None:
    running = [torch.zeros(6), torch.ones(6)]
    with pytest.raises(ValueError, match="residual"):
        conv_bn(X, W, V, V, *running, residual=X)
    assert not running[0].any() and (running[1] == 1).all()


def test_a_plan_that_is_not_there_is_refused() -> None:
    with use_plan("epilogue"), pytest.raises(RuntimeError, match="no 'epilogue' plan"):
        conv_bn(X, W)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if serves(b, "conv_bn", torch.bfloat16)])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "dilation", "kernel"),
    [((13, 2), 3, 1, 1, 3), ((9, 2), 2, 1, 1, 3), ((13, 4), (1, 2), 0, 2, 2),
     ((13, 8), (1, 3), 0, 3, 3), ((9, 2), 2, (0, 1, 1, 0), 1, 3), ((9, 1), 3, 1, 1, 1)],
)  # fmt: skip
def test_an_output_one_pixel_wide(
    size: tuple[int, int], stride: Any, padding: Any, dilation: int, kernel: int, backend: str
) -> None:
    """oneDNN in bf16 gives garbage for it, where the stride leads past it."""
    x = torch.randn(2, 3, *size).bfloat16()
    w = torch.randn(4, 3, kernel, kernel).bfloat16()
    found: list[list[Tensor]] = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
        options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        name = backend if dtype == torch.bfloat16 else "reference"
        with use_backend(name):
            d = conv_bn(*leaves, **options, relu=False)  # type: ignore[call-overload]
            assert d.shape[3] == 1
            out = d.value()
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        out.backward(upstream.bfloat16().to(dtype))
        found.append([out.detach(), *(t.grad for t in leaves)])  # type: ignore[misc]
    for ours, truth in zip(*found, strict=True):
        assert error(ours, truth) < 0.05
