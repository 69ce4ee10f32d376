"""conv_bn_relu_maxpool: three-way rule, ties, NaN, what is saved, gradcheck, opcheck, errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import backends as registry
from fusedres import use_backend, use_plan
from fusedres._conv import Conv
from fusedres.ops import conv_bn_relu_maxpool
from fusedres.ops.conv_bn_relu_maxpool import stem_plan
from fusedres.testing import (
    CHANNELS_LAST,
    CONTIGUOUS,
    HALF_TYPES,
    Inputs,
    Maker,
    Outputs,
    check_case,
    eager_batch_norm,
    gradcheck,
    norm_arguments,
    run,
    serves,
    serving_backends,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = serving_backends()
FUSING = [b for b in BACKENDS if "conv_bn_relu_maxpool" in registry.BACKENDS[b].fuses]
WAYS = [(b, p) for b in BACKENDS for p in ("fused", "split") if p == "split" or b in FUSING]
PROTOCOL_WAYS = [(b, plan) for b, plan in WAYS if b != "reference"]
SERVED = [(b, p, d) for b, p in WAYS for d in DTYPES if serves(b, "conv_bn_relu_maxpool", d)]


@dataclass(frozen=True)
class Stem:
    """max_pool2d(relu(bn(conv(x)))); the default is a ResNet's, of a small image."""

    shape: tuple[int, int, int, int] = (2, 3, 17, 19)
    channels: int = 8
    kernel: tuple[int, int] = (7, 7)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int, int, int] = (3, 3, 3, 3)  # top, bottom, left, right
    window: tuple[int, int, int] = (3, 2, 1)
    training: bool = True
    affine: bool = True
    image_grad: bool = True

    def __str__(self) -> str:
        default = Stem()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return ",".join(f"{k}={v}" for k, v in changed.items()) or "default"

    def inputs(self, make: Maker) -> Inputs:
        t = {"w": make.weight(self.channels, self.shape[1], *self.kernel)}
        t |= {"x": make.activation(*self.shape, grad=self.image_grad)}
        return t | make.norm("n", self.channels, self.affine)

    def ours(self, t: Inputs) -> Outputs:
        kernel_size, pool_stride, pool_padding = self.window
        p = conv_bn_relu_maxpool(
            t["x"], t["w"], *norm_arguments(t, "n"), stride=self.stride, padding=self.padding,
            training=self.training, kernel_size=kernel_size, pool_stride=pool_stride,
            pool_padding=pool_padding,
        )  # fmt: skip
        return {"p": p}

    def eager(self, t: Inputs) -> Outputs:
        top, bottom, left, right = self.padding
        y = F.conv2d(F.pad(t["x"], (left, right, top, bottom)), t["w"], None, self.stride)
        return {"p": F.max_pool2d(eager_batch_norm(y, t, "n", self.training).relu(), *self.window)}


PAD1 = (1, 1, 1, 1)
CASES = [
    Stem(),
    Stem(image_grad=False),  # as in training
    Stem(training=False),
    Stem(affine=False),
    Stem((1, 4, 13, 22), 5, (3, 3), (1, 1), PAD1, (3, 2, 0)),  # one image, all 4 channels
    Stem((3, 1, 12, 9), 9, (5, 5), (3, 3), (2, 2, 2, 2), (2, 2, 0)),  # one channel
    # nothing is square or even; a row of the window is two steps deep
    Stem((2, 3, 9, 20), 6, (2, 17), (1, 2), (0, 1, 3, 2), (3, 1, 1)),
    Stem((2, 2, 5, 80), 6, (3, 3), (1, 1), PAD1),  # rows longer than a tile
    Stem((1, 3, 9, 9), 70, (3, 3), (1, 1), PAD1),  # several tiles of output channels
    Stem((3, 3, 6, 7), 4, (1, 1), (1, 1), (0, 0, 0, 0), (2, 3, 1)),  # pixels no window covers
    Stem((2, 5, 9, 7), 6, (3, 3), (2, 2), PAD1, (5, 1, 2)),  # too many channels for a fused plan
]


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("backend", "plan", "dtype"), SERVED, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_way(
    case: Stem, backend: str, plan: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    if dtype in HALF_TYPES:  # large, and without the few that flip: the winner changes by rounding
        case = replace(case, shape=(8, *case.shape[1:]))
        check_case(case, backend, dtype, memory_format, trim=0.05, plan=plan)
    else:
        check_case(case, backend, dtype, memory_format, plan=plan)


@pytest.mark.parametrize(("backend", "plan"), WAYS)
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0)], ids=str)
def test_ties_go_where_torch_sends_them(
    backend: str, plan: str, window: tuple[int, int, int]
) -> None:
    """Small integers through an identity: every sum is exact."""
    x = torch.randint(-2, 3, (2, 3, 11, 9)).float().contiguous(memory_format=CHANNELS_LAST)
    w = torch.eye(3).view(3, 3, 1, 1).clone()
    state = (None, None, torch.zeros(3), torch.ones(3))
    grad, results = None, []
    for fused in (True, False):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        if fused:
            with use_backend(backend), use_plan(plan):
                p = conv_bn_relu_maxpool(
                    *leaves, *state, training=False, eps=0.0, kernel_size=window[0],
                    pool_stride=window[1], pool_padding=window[2],
                )  # fmt: skip
        else:
            p = F.max_pool2d(F.conv2d(*leaves).relu(), *window)
        grad = torch.randint(1, 9, p.shape).float() if grad is None else grad
        results.append([p, *torch.autograd.grad(p, leaves, grad)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_spread_as_in_torch(backend: str, plan: str, value: float) -> None:
    """With frozen statistics, where they do not reach everything at once: no further than the
    window that holds them.
    """
    case = Stem(training=False)

    def poisoned() -> Inputs:
        t = case.inputs(Maker(torch.float32, CHANNELS_LAST))
        with torch.no_grad():
            t["x"][-1, -1, 7, 8] = value
        return t

    with use_backend(backend), use_plan(plan):
        ours = dict(run(case.ours, poisoned()))
    theirs = dict(run(case.eager, poisoned()))
    assert not theirs["p"].isfinite().all() and theirs["p"].isfinite().any()
    for name in ("p", "gradient of w", "gradient of n.weight", "gradient of n.bias"):
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=name
        )


@pytest.mark.parametrize(("backend", "plan"), WAYS)
@pytest.mark.parametrize(
    "case",
    [
        Stem((2, 2, 6, 5), 3, (3, 3), (1, 1), PAD1),
        Stem((2, 2, 6, 5), 3, (2, 2), (2, 2), PAD1, (2, 2, 0), training=False),
    ],
    ids=str,
)
def test_gradcheck(case: Stem, backend: str, plan: str) -> None:
    gradcheck(case, backend, plan)


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
@pytest.mark.parametrize("need_input", [False, True])
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
def test_opcheck(
    backend: str, plan: str, need_input: bool, memory_format: torch.memory_format
) -> None:
    make = Maker(torch.float32, memory_format)
    x, w = make.activation(2, 3, 8, 8, grad=False), make.weight(6, 3, 3, 3).detach()
    operands = (x, w, None, (2, 2), (1, 1, 1, 1), (1, 1), 1, 3, 2, 1)
    bn = (torch.rand(6), torch.rand(6), torch.rand(6), torch.rand(6), True, 0.1, None, 1e-5)
    forward = (*operands, *bn, need_input, backend, plan)
    torch.library.opcheck(torch.ops.fusedres.conv_bn_relu_maxpool_fwd, forward)
    p, y, mean, _, rstd, scale, bias, winners = torch.ops.fusedres.conv_bn_relu_maxpool_fwd(
        *forward
    )
    kept = winners if winners.numel() > 0 else None
    for need_weight in (False, True):
        backward = (
            *operands, torch.randn_like(p), kept, y, mean, scale, bias, rstd, True, need_input,
            need_weight, torch.float32, torch.float16 if need_input else None, backend, plan,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.fusedres.conv_bn_relu_maxpool_bwd, backward)


@pytest.mark.parametrize(("backend", "plan"), WAYS)
def test_empty_batch(backend: str, plan: str) -> None:
    case = Stem((0, 3, 9, 9))
    t = case.inputs(Maker(torch.float32))
    before = t["n.running_mean"].clone()
    with use_backend(backend), use_plan(plan):
        p = case.ours(t)["p"]
        p.sum().backward()
    assert p.shape == (0, 8, 3, 3) and torch.equal(t["n.running_mean"], before)
    for name, x in t.items():
        if x.requires_grad:
            assert x.grad is not None and x.grad.shape == x.shape and not x.grad.any(), name


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
def test_inference_finds_no_winners(
    backend: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    op = torch.ops.fusedres.conv_bn_relu_maxpool_fwd
    monkeypatch.setattr(
        torch.ops.fusedres, "conv_bn_relu_maxpool_fwd", lambda *a: asked.append(a[-3]) or op(*a)
    )
    t = Stem().inputs(Maker(torch.float32, CHANNELS_LAST))
    with use_backend(backend), use_plan(plan):
        Stem().ours(t)
        with torch.no_grad():
            Stem().ours(t)
    assert asked == [True, False]


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
def test_saves_the_image_y_and_the_winners(backend: str, plan: str) -> None:
    case = Stem()
    t = case.inputs(Maker(torch.float32, CHANNELS_LAST))
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with use_backend(backend), use_plan(plan), hooks:
        p = case.ours(t)["p"]
    winners = [s for s in saved if s.dtype == torch.uint8]
    assert [s.shape for s in winners] == [p.shape] * (backend == "triton")
    large = [s for s in saved if s.dim() == 4 and s.dtype != torch.uint8]
    y = F.conv2d(t["x"], t["w"], None, 2, 3)
    assert {s.data_ptr() for s in large} >= {t["x"].data_ptr(), t["w"].data_ptr()}
    assert sorted(tuple(s.shape) for s in large) == sorted(
        tuple(s.shape) for s in (t["x"], t["w"], y)
    )
    assert all(s.data_ptr() != p.data_ptr() for s in saved)
    assert sum(s.numel() for s in saved if s.dim() != 4) == 4 * case.channels


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
def test_frozen_parts_get_no_gradient(backend: str, plan: str) -> None:
    for frozen in (("x",), ("w",), ("x", "w"), ("n.weight",), ("n.bias", "x")):
        t = Stem().inputs(Maker(torch.float64))
        eager = Stem().inputs(Maker(torch.float64))
        for name in frozen:
            t[name].requires_grad_(False)
        with use_backend(backend), use_plan(plan):
            Stem().ours(t)["p"].square().sum().backward()
        Stem().eager(eager)["p"].square().sum().backward()
        for name, x in t.items():
            assert (x.grad is not None) == x.requires_grad, (frozen, name)
            if x.grad is not None:
                torch.testing.assert_close(x.grad, eager[name].grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
def test_deterministic(backend: str, plan: str) -> None:
    case = Stem((5, 3, 23, 21), 16)
    with use_backend(backend), use_plan(plan):
        first, second = (dict(run(case.ours, case.inputs(Maker(torch.float32)))) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
def test_autocast_equals_casts_by_hand(backend: str, plan: str) -> None:
    """And gradients leave in the parameters' dtype and strides."""
    half = next(d for b, p, d in SERVED if (b, p) == (backend, plan) and d in HALF_TYPES)
    case, results = Stem(image_grad=False), []
    for auto in (True, False):
        t = case.inputs(Maker(torch.float32, CHANNELS_LAST))
        w = t["w"]
        with use_backend(backend), use_plan(plan), torch.autocast("cpu", half, enabled=auto):
            if not auto:
                t["x"], t["w"] = t["x"].to(half), w.to(half)
            p = case.ours(t)["p"]
        assert p.dtype == half
        p.float().square().sum().backward()
        assert w.grad is not None and t["n.weight"].grad is not None
        assert w.grad.dtype == torch.float32 and w.grad.stride() == w.stride()
        results.append([p, t["n.weight"].grad, t["n.running_var"], w.grad.to(half)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "plan"), PROTOCOL_WAYS)
def test_gradients_and_saved_tensors_may_come_stored_otherwise(backend: str, plan: str) -> None:
    case = Stem()
    eager = dict(run(case.eager, case.inputs(Maker(torch.float64))))

    def stored_otherwise(t: Inputs) -> Outputs:
        p = case.ours(t)["p"]
        return {"p": p.transpose(2, 3).contiguous().transpose(2, 3)}

    def pack(x: Tensor) -> Tensor:
        return x if x.is_leaf else x.detach().contiguous()

    t = case.inputs(Maker(torch.float64, CHANNELS_LAST))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with use_backend(backend), use_plan(plan), hooks:
        for name, result in run(stored_otherwise, t):
            torch.testing.assert_close(result, eager[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(("backend", "plan"), WAYS)
def test_compiles_without_a_graph_break(backend: str, plan: str) -> None:
    case = Stem()
    t, twin = (case.inputs(Maker(torch.float32)) for _ in range(2))
    with use_backend(backend), use_plan(plan):
        plain = dict(run(case.ours, twin))
        compiled = torch.compile(case.ours, backend="aot_eager", fullgraph=True)
        for name, result in run(compiled, t):
            torch.testing.assert_close(result, plain[name], rtol=1e-5, atol=1e-5, msg=name)


def test_the_plan_follows_the_backend_and_the_channels() -> None:
    """A fused plan that is asked for and not there is no error here: the blocks' convolutions say
    so.
    """
    few, many = torch.empty(8, 3, 7, 7), torch.empty(8, 5, 7, 7)
    plain, grouped = (Conv((2, 2), (3,) * 4, (1, 1), groups) for groups in (1, 3))
    for backend in registry.BACKENDS:
        for asked in registry.PLANS:
            choice = registry.Choice(backend, asked, "")
            fuses = asked in ("fused", "fused_stem", "ideal")
            wanted = "fused" if backend == "triton" and fuses else "split"
            assert stem_plan(choice, few, plain) == wanted
            assert stem_plan(choice, many, plain) == stem_plan(choice, few, grouped) == "split"
    with use_plan("fused"):
        assert Stem().ours(Stem().inputs(Maker(torch.float32)))["p"].shape == (2, 8, 5, 5)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_direct_calls_of_the_ops_end_in_a_value_error(backend: str) -> None:
    ops = torch.ops.fusedres
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=CHANNELS_LAST)
    w, v, y = torch.randn(4, 3, 3, 3), torch.ones(4), torch.randn(2, 4, 6, 6)
    y = y.contiguous(memory_format=CHANNELS_LAST)
    grad = torch.randn(2, 4, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    plans = ("fused", "split") if backend in FUSING else ("split",)
    if backend not in FUSING:
        with pytest.raises(ValueError, match="no kernels of a backend"):
            registry.kernels(backend, "conv_bn_relu_maxpool")

    def forward(plan: str, x: Tensor = x, w: Tensor = w, v: Tensor = v, pool: Any = (3, 2, 1)):
        conv = (None, (1, 1), (0, 0, 0, 0), (1, 1), 1)
        norm = (v, v, None, None, True, 0.1, None, 1e-5)
        return ops.conv_bn_relu_maxpool_fwd(x, w, *conv, *pool, *norm, False, backend, plan)

    def backward(
        plan: str, grad: Any = grad, y: Any = y, v: Any = v, pool: Any = (3, 2, 1), kept: Any = None
    ):
        conv = (None, (1, 1), (0, 0, 0, 0), (1, 1), 1)
        own = (kept, y, v, v, v, v, True, False, True, None, None)
        return ops.conv_bn_relu_maxpool_bwd(x, w, *conv, *pool, grad, *own, backend, plan)

    for plan in plans:
        forward(plan)
        backward(plan)
        calls = [{"v": v[:2]}, {"pool": (0, 1, 0)}, {"pool": (3, 2, 2)}, {"pool": (16, 1, 0)}]
        for bad in calls:
            with pytest.raises(ValueError):
                forward(plan, **bad)
        calls += [{"y": y[:1]}, {"y": y[:, :, 1:]}, {"grad": grad[:1]}, {"grad": grad.double()}]
        calls += [{"grad": grad.contiguous()}]
        for bad in calls:
            with pytest.raises(ValueError):
                backward(plan, **bad)
    if "fused" in plans:
        good = torch.zeros_like(grad, dtype=torch.uint8)
        for plan in ("fused", "split"):
            backward(plan, kept=good)
            for kept in (good[:1], good.int(), good.contiguous()):
                with pytest.raises(ValueError, match="winners do not belong to grad"):
                    backward(plan, kept=kept)
        for bad in ({"w": w[:, :2]}, {"x": x.contiguous()}, {"w": w[0]}):
            with pytest.raises((ValueError, IndexError)):
                forward("fused", **bad)


X, W, V = torch.randn(2, 3, 9, 9), torch.randn(6, 3, 3, 3), torch.ones(6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, W), {}, TypeError, "x must be a Tensor, got NoneType"),
        ((X[0], W), {}, ValueError, r"x must be \[N, C, H, W\]"),
        ((X.int(), W), {}, TypeError, "x must be float32.*got torch.int32"),
        ((X, W.double()), {}, TypeError, "weight must be torch.float32.*got torch.float64"),
        ((X, W[:, :2]), {}, ValueError, "weight has 2 input channels"),
        ((X, W, V[:5]), {}, ValueError, "bn_weight must have shape"),
        ((X, W, V, V, V), {}, ValueError, "running_mean and running_var must be given together"),
        ((X, W), {"training": False}, ValueError, "training=False needs running_mean"),
        ((X, W), {"stride": 0}, ValueError, "stride must be at least 1"),
        ((X, W), {"padding": -1}, ValueError, "padding must be at least 0"),
        ((X, W), {"groups": 2}, ValueError, "weight has 3 input channels in each of 2 groups"),
        ((X, W), {"momentum": "a"}, TypeError, "momentum must be a number"),
        ((X, W), {"eps": -1.0}, ValueError, "eps must be finite and not negative"),
        ((X, W), {"kernel_size": 0}, ValueError, "kernel_size must be at least 1"),
        ((X, W), {"kernel_size": 16}, ValueError, "kernel_size must be at most 15"),
        ((X, W), {"pool_stride": 0}, ValueError, "pool_stride must be at least 1"),
        ((X, W), {"pool_stride": 2.0}, TypeError, "pool_stride must be an int"),
        ((X, W), {"pool_padding": -1}, ValueError, "pool_padding must be at least 0"),
        ((X, W), {"pool_padding": 2}, ValueError, "pool_padding must be at most half"),
        ((X, W), {"kernel_size": 11}, ValueError, "kernel_size 11 does not fit the padded input"),
        ((X[:1, :, :3, :3], W), {}, ValueError, "more than 1 value per channel"),
        ((X[:, :, :2, :2], W), {}, ValueError, "kernel.*does not fit the padded input"),
    ],
)
def test_errors_name_the_argument(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"conv_bn_relu_maxpool: .*{message}"):
        conv_bn_relu_maxpool(*arguments, **options)


def test_nothing_is_written_before_an_error() -> None:
    running = [torch.zeros(6), torch.ones(6)]
    with pytest.raises(ValueError, match="pool_padding"):
        conv_bn_relu_maxpool(X, W, V, V, *running, pool_padding=2)
    assert not running[0].any() and (running[1] == 1).all()
