"""What only Triton's interpreter can show without a GPU; test_triton.py runs it in a process of its
own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import importlib
from collections.abc import Callable
from typing import Any

import plain_ops
import pytest
import torch
import torch.nn.functional as F
from test_conv_bn import SOURCES, Chain
from test_conv_bn_relu_maxpool import Stem
from test_resnet import test_gradients_per_sample  # noqa: F401  (a test here, too)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_launches import dry, model_step, stem_step

import fusedres
from fusedres import use_backend, use_plan
from fusedres._conv import Conv, Source
from fusedres._plans import DATAFLOWS
from fusedres._tensors import INTERPRETED
from fusedres.models import resnet, stages
from fusedres.ops import batch_norm, bn_act
from fusedres.ops._packed import PackedWeights, packed_weights, packing
from fusedres.testing import CHANNELS_LAST, Maker, check_case, run
from fusedres.triton_kernels import _configs, _gemm, _launch, conv_bn_relu_maxpool
from fusedres.triton_kernels._configs import Config
from fusedres.triton_kernels.batch_norm import batch_norm_bwd, batch_norm_fwd
from fusedres.triton_kernels.bn_act import bn_act_bwd, masked_sums
from fusedres.triton_kernels.bn_relu_maxpool import (
    bn_relu_maxpool_bwd,
    bn_relu_maxpool_fwd,
    bn_relu_maxpool_winners,
    maxpool_dy,
    maxpool_sums,
)
from fusedres.triton_kernels.conv_bn import conv_bn_wgrad

assert INTERPRETED, "run by test_triton.py"
PLANS = ("fused", "split")
conv_bn_op = importlib.import_module("fusedres.ops._conv_bn_ops")


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "plan"),
    [("keras", "fused"), ("keras", "split"), ("keras", "masks")]
    + [("torchvision", plan) for plan in (*PLANS, *DATAFLOWS)],
)
def test_a_small_resnet_equals_the_reference(
    variant: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp64, three steps (of the dataflows one, they are many): outputs, every gradient and running
    statistics to 1e-10.
    """
    monkeypatch.setattr(stages, "_PLANES", (8, 8, 16, 16))
    monkeypatch.setitem(stages._DEPTHS, 50, (2, 2, 1, 1))
    model = fusedres.FusedResNet50(5, variant=variant).double().to(memory_format=CHANNELS_LAST)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-5) for m in (model, twin)]
    for _ in range(1 if plan in DATAFLOWS else 3):
        x = torch.randn(3, 3, 40, 40, dtype=torch.float64).to(memory_format=CHANNELS_LAST)
        target = torch.randint(5, (3,))
        found = []
        for m, backend, optimizer in zip(
            (model, twin), ("triton", "reference"), optimizers, strict=True
        ):
            leaf = x.clone().requires_grad_()
            optimizer.zero_grad()
            with use_backend(backend), use_plan(plan if backend == "triton" else "auto"):
                out = m(leaf)
                F.cross_entropy(out, target).backward()
            grads = {name: p.grad for name, p in m.named_parameters()}
            found.append({"output": out.detach(), "input": leaf.grad, **grads})
            optimizer.step()
        for name, truth in found[1].items():
            assert truth is not None and truth.any(), name
            largest = (found[0][name] - truth).abs().max() / truth.abs().max()
            assert largest < 1e-10, (name, largest)
    for (name, ours), truth in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert (ours - truth).abs().max() <= 1e-10 * truth.abs().max(), name


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_chunks_of_several_tiles(source: str, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments and sums merge over the tiles of a program, the last chunk being a short one."""
    monkeypatch.setattr(_gemm, "MOST_PARTIALS", 2)
    chain = Chain(source, (3, 6, 11, 9), 5, stride=stride, emit=stride == 1 or source == "tensor")
    with _launch.recording() as launches:
        check_case(chain, "triton", torch.float64, CHANNELS_LAST, plan="fused")
    by_name = {launch.name: launch.arguments() for launch in launches}
    for name in ("conv_bn_fwd_kernel", "conv_bn_dgrad_kernel"):
        arguments = by_name[name]
        assert arguments["tiles"] > 1 and arguments["LOOP"]
        assert arguments["M"] % (arguments["tiles"] * arguments["BM"])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "r", "w", "value", "emitted"])
def test_nan_and_inf_spread_as_in_torch(where: str, value: float, plan: str) -> None:
    """With frozen statistics, where they do not reach everything at once."""
    chain = Chain("tensor_residual", (2, 8, 5, 3), 6, training=False, emit=True)

    def poisoned(function: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        t = chain.inputs(Maker(torch.float32, CHANNELS_LAST))
        if where in t:
            with torch.no_grad():
                t[where][-1, -1, -1, -1] = value

        def outputs(inputs: Any) -> dict[str, Tensor]:
            out = function(inputs)
            if where in out:  # poisons the gradient that arrives there
                out[where].register_hook(_set_last(value))
            return out

        return dict(run(outputs, t))

    torch.backends.cudnn.allow_tf32 = False
    with use_backend("triton"), use_plan(plan):
        ours = poisoned(chain.ours)
    theirs = poisoned(chain.eager)
    for name, true in theirs.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours[name]), kind(true)), (name, kind)


def _set_last(value: float) -> Callable[[Tensor], Tensor]:
    def hook(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[-1, -1, -1, -1] = value
        return grad

    return hook


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_input_gives_the_same_bits(plan: str) -> None:
    chain = Chain("deferred_residual", (4, 16, 13, 13), 24, emit=True)
    with use_backend("triton"), use_plan(plan):
        first, second = (
            dict(run(chain.ours, chain.inputs(Maker(torch.float32)))) for _ in range(2)
        )
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_results_do_not_rest_on_what_memory_held() -> None:
    """Outputs are poisoned: torch fills every empty tensor with NaN here."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        for stride in (1, 2):
            for source in SOURCES:
                chain = Chain(source, (2, 5, 6, 7), 3, stride=stride, emit=stride == 1)
                check_case(chain, "triton", torch.float64, CHANNELS_LAST, plan="fused")
        for plan in PLANS:
            check_case(Stem(), "triton", torch.float64, CHANNELS_LAST, plan=plan)
    finally:
        torch.use_deterministic_algorithms(False)


def test_dw_takes_any_strides_of_its_parameter() -> None:
    chain = Chain("none", (2, 8, 5, 5), 6)
    eager = dict(run(chain.eager, chain.inputs(Maker(torch.float64))))
    t = chain.inputs(Maker(torch.float64))
    t["w"] = t["w"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    with use_backend("triton"), use_plan("fused"):
        ours = dict(run(chain.ours, t))
    for name, truth in eager.items():
        torch.testing.assert_close(ours[name], truth, rtol=1e-10, atol=1e-10, msg=name)
    assert ours["gradient of w"].stride() == t["w"].stride()


def test_rounded_activations_decide_ties_of_the_pool() -> None:
    """Windows whose activations are equal after rounding only: the first of them wins."""
    y = (torch.randn(2, 5, 8, 7) * 4).half().contiguous(memory_format=CHANNELS_LAST)
    mean, scale, bias = torch.zeros(5), torch.full((5,), 2.0**-6), torch.full((5,), 64.0)
    for window in ((3, 2, 1), (3, 2, 0), (2, 2, 0), (4, 1, 2)):
        a = (y.float() * 2.0**-6 + 64).half().contiguous(memory_format=CHANNELS_LAST)
        pooled = F.max_pool2d(a.requires_grad_(), *window)
        grad = torch.randint(1, 9, pooled.shape).half().contiguous(memory_format=CHANNELS_LAST)
        ours = bn_relu_maxpool_fwd(y, mean, scale, bias, *window)
        assert torch.equal(ours, pooled)
        g, _ = bn_relu_maxpool_bwd(grad, y, mean, scale, bias, *window)
        assert torch.equal(g, torch.autograd.grad(pooled, a, grad)[0]), window
        p, winners = bn_relu_maxpool_winners(y, mean, scale, bias, window)
        assert torch.equal(p, pooled)
        frozen = (torch.ones(5), torch.ones(5), torch.zeros(2, 5), window, False, None, None)
        assert torch.equal(g, maxpool_dy(grad, winners, y, mean, *frozen)[0]), window


@pytest.mark.parametrize("shape", [(3, 7, 9, 10), (2, 16, 3, 70), (1, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 1)], ids=str)
def test_winners_give_what_two_nodes_give(
    shape: tuple[int, int, int, int], window: tuple[int, int, int]
) -> None:
    """The gradient of a pool, rounded, to the bit; its sums but for the order they are added in."""
    y = torch.randn(shape).half().contiguous(memory_format=CHANNELS_LAST)
    mean, scale, bias, rstd = (torch.rand(shape[1]) + 0.2 for _ in range(4))
    p = bn_relu_maxpool_fwd(y, mean, scale, bias, *window)
    grad = torch.randn_like(p)
    g, sums = bn_relu_maxpool_bwd(grad, y, mean, scale, bias, *window)
    again, winners = bn_relu_maxpool_winners(y, mean, scale, bias, window)
    assert torch.equal(again, p)
    torch.testing.assert_close(
        maxpool_sums(grad, winners, y, mean, window), sums, rtol=1e-5, atol=1e-4
    )
    for training in (True, False):
        ours = maxpool_dy(
            grad, winners, y, mean, scale, rstd, sums, window, training, torch.float32,
            torch.float64,
        )  # fmt: skip
        two = batch_norm_bwd(g, y, mean, scale, rstd, sums, training, torch.float32, torch.float64)
        for mine, theirs in zip(ours, two, strict=True):
            assert mine is not None and theirs is not None and torch.equal(mine, theirs)


def test_chunks_of_several_tiles_of_a_stem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments merge over the tiles of a program; rows are long enough for no division, or not."""
    monkeypatch.setattr(_gemm, "MOST_PARTIALS", 2)
    for width in (22, 70):
        stem = Stem((2, 3, 9, width), 5, (3, 3), (1, 1), (1, 1, 1, 1))
        with _launch.recording() as launches:
            check_case(stem, "triton", torch.float64, CHANNELS_LAST, plan="fused")
        by_name = {launch.name: launch.arguments() for launch in launches}
        forward = by_name["conv_bn_stem_fwd_kernel"]
        assert forward["tiles"] > 1 and forward["LOOP"]
        assert forward["M"] % (forward["tiles"] * forward["BM"])
        wgrad = by_name["conv_bn_stem_wgrad_kernel"]
        assert wgrad["POOL"] and wgrad["rows"] % (wgrad["tiles"] * wgrad["BM"])
        assert (forward["WIDE"], wgrad["WIDE"]) == (width == 70, width == 70)


def test_eps_and_momentum_keep_their_digits() -> None:
    """Triton takes a float as fp32; neither 0.1 nor 0.3 is one."""
    y = torch.randn(3, 4, 5, 5, dtype=torch.float64).contiguous(memory_format=CHANNELS_LAST)
    ours, plain = ([torch.zeros(4).double(), torch.ones(4).double()] for _ in range(2))
    _, _, rstd, *_ = batch_norm_fwd(y, None, None, *ours, True, 0.3, 0.1)
    F.batch_norm(y, *plain, training=True, momentum=0.3)
    torch.testing.assert_close(ours, plain, rtol=1e-14, atol=1e-14)
    truth = torch.rsqrt(y.var((0, 2, 3), correction=0) + 0.1)
    torch.testing.assert_close(rstd, truth, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("plan", PLANS)
def test_statistics_are_of_the_rounded_output(plan: str) -> None:
    x = torch.randn(4, 8, 9, 9).half().contiguous(memory_format=CHANNELS_LAST)
    with use_backend("triton"), use_plan(plan):
        d = fusedres.ops.conv_bn(x, torch.randn(6, 8, 1, 1).half())
    torch.testing.assert_close(d.mean.double(), d.y.double().mean((0, 2, 3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_an_activation_that_rounds_to_zero_masks_its_gradient(plan: str) -> None:
    """Below fp16's smallest number the activation is zero, whatever its sign was in fp32."""
    t = Chain("none", (2, 8, 4, 4), 6).inputs(Maker(torch.float16, CHANNELS_LAST))
    x, vectors = t["x"].detach().abs() + 1, (torch.zeros(8), torch.full((8,), 1e-9), torch.zeros(8))
    y = torch.randn(2, 6, 4, 4).half().contiguous(memory_format=CHANNELS_LAST)
    g_in, sums, *_ = torch.ops.fusedres.conv_bn_bwd(
        x, *vectors, *(None,) * 4, True, t["w"].detach(), None, (1, 1), (0, 0, 0, 0), (1, 1), 1,
        None, None, torch.randn_like(y), torch.zeros(2, 6), None, y, torch.zeros(6), torch.ones(6),
        torch.ones(6), None, True, True, True, None, None, "triton", plan,
    )  # fmt: skip
    assert not g_in.any() and not sums.any()


@pytest.mark.parametrize("plan", PLANS)
def test_a_gradient_masked_late_is_masked_by_the_rounded_activation(plan: str) -> None:
    """y is above its mean by less than fp16's smallest number."""
    y = torch.full((2, 6, 4, 4), 2.0**-14).half().contiguous(memory_format=CHANNELS_LAST)
    mean, one, zero = torch.full((6,), 2.0**-14 - 2.0**-30), torch.ones(6), torch.zeros(6)
    assert (y.float() > mean[:, None, None]).all()
    x, w = torch.randn(2, 8, 4, 4).half().contiguous(memory_format=CHANNELS_LAST), torch.ones(6, 8)
    g_in, _, _, dw, *_ = torch.ops.fusedres.conv_bn_bwd(
        x, *(None,) * 7, False, w.half()[:, :, None, None], None, (1, 1), (0, 0, 0, 0), (1, 1), 1,
        None, None, torch.randn_like(y), torch.zeros(2, 6), None, y, mean, one, one, zero, True,
        True, True, None, None, "triton", plan,
    )  # fmt: skip
    assert not g_in.any() and not dw.any()
    assert not masked_sums(torch.randn_like(y), y, mean, one, zero).any()
    g, sums, _ = bn_act_bwd(torch.randn_like(y), None, y, y, mean, None, None, affine=(one, zero))
    assert not g.any() and not sums.any()


@pytest.mark.parametrize("kernel", ["fwd", "dgrad"])
def test_a_persistent_grid_has_as_many_programs_as_run_at_once(kernel: str) -> None:
    chain = Chain("deferred_residual", (3, 40, 11, 9), 40, emit=True)
    config = Config(16, 16, 16, 4, 1, programs=3)
    with _configs.trying({kernel: config}), _launch.recording() as launches:
        check_case(chain, "triton", torch.float64, CHANNELS_LAST, plan="fused")
    name = f"conv_bn_{kernel}_kernel"
    grids = {launch.grid for launch in launches if launch.name == name}
    # 2 multiprocessors, 3 programs each, 3 of them side by side; 19 tiles of rows
    assert grids == {(6,)}


@pytest.mark.parametrize("plan", PLANS)
def test_sums_are_of_the_rounded_gradient(plan: str) -> None:
    """Of a gradient that fp16 rounds by much more than sums in fp32 do."""
    t = Chain("none", (4, 8, 9, 9), 6).inputs(Maker(torch.float16, CHANNELS_LAST))
    vectors = (torch.zeros(8), torch.ones(8), torch.zeros(8))
    none, y = (None,) * 4, torch.randn(4, 6, 9, 9).half().contiguous(memory_format=CHANNELS_LAST)
    g_in, sums, *_ = torch.ops.fusedres.conv_bn_bwd(
        t["x"].detach(), *vectors, *none, True, t["w"].detach(), None, (1, 1), (0, 0, 0, 0), (1, 1),
        1, None, None, torch.randn_like(y), torch.zeros(2, 6), None, y, torch.zeros(6),
        torch.ones(6), torch.ones(6), None, True, True, True, None, None, "triton", plan,
    )  # fmt: skip
    wide, x = g_in.double(), t["x"].detach().double()
    truth = torch.stack([wide.sum((0, 2, 3)), (wide * x).sum((0, 2, 3))])
    torch.testing.assert_close(sums.double(), truth, rtol=1e-5, atol=1e-5)


def test_a_weight_changed_between_forward_and_backward_is_refused() -> None:
    t = Chain("tensor").inputs(Maker(torch.float32))
    with use_backend("triton"), use_plan("fused"):
        value = Chain("tensor").ours(t)["value"]
    with torch.no_grad():
        t["w"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@pytest.mark.parametrize("plan", PLANS)
def test_rows_past_the_end_add_nothing_to_dw(plan: str) -> None:
    """A zero in their place would overflow fp16 in the prologue: its mean is 5 digits from it."""
    x = torch.randn(1, 16, 5, 5).half().contiguous(memory_format=CHANNELS_LAST)
    x[:, 0] = -300
    w = torch.randn(6, 16, 1, 1).half().requires_grad_()
    with use_backend("triton"), use_plan(plan):
        fusedres.ops.conv_bn(batch_norm(x, relu=False), w).value().sum().backward()
    assert w.grad is not None and w.grad.isfinite().all()


@pytest.mark.parametrize("half", [False, True])
def test_compiles_without_a_graph_break(half: bool) -> None:
    """By the default plan, which the table and the flags of the moment decide."""
    block = fusedres.IdentityBlock(16, (16, 16, 16)).to(torch.float16 if half else torch.float32)
    x = torch.randn(2, 16, 4, 4, dtype=block.conv1.weight.dtype)
    with use_backend("triton"):
        compiled = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), block(x))


def test_no_channels_at_all() -> None:
    with use_backend("triton"):
        assert fusedres.ops.batch_norm(torch.randn(2, 0, 3, 3)).value().shape == (2, 0, 3, 3)


# --- launches -------------------------------------------------------------------------------------


def test_launches_of_a_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    """A 1x1 convolution: one kernel forward, two backward; a node: one second stage each way."""
    with dry() as launches:
        model_step(2, 64)
    count = collections.Counter(launch.name for launch in launches)
    with capsys.disabled():
        print("\nlaunches of a FusedResNet50 training step, beside the library's convolutions:")
        for name, times in sorted(count.items()):
            print(f"  {times:4}  {name}")
        print(f"  {sum(count.values()):4}  in all")
    pointwise, others = 36, 17
    assert count == {
        "conv_bn_fwd_kernel": pointwise,
        "conv_bn_dgrad_kernel": pointwise,
        "conv_bn_wgrad_kernel": pointwise,
        "conv_bn_finish_kernel": pointwise,
        # the split plan of the 3x3 convolutions and the stem, whose dy the pool's backward writes
        "batch_norm_stats_kernel": others,
        "batch_norm_finish_kernel": pointwise + others,
        "batch_norm_bwd_kernel": others - 1,
        "bn_act_fwd_kernel": 2 * 16 + 1,  # forward, for wgrad once more, and the network's end
        "bn_act_bwd_kernel": 16 + 1,
        "sum_rows_kernel": 16 + 1 + 1,
        "maxpool_winners_kernel": 1,  # which pools, too
        "maxpool_winners_bwd_kernel": 2,
    }


def test_launches_of_a_fused_stem() -> None:
    """Statistics and dy have no launch of their own."""
    with dry() as launches:
        stem_step(2, 64)
    assert [launch.name for launch in launches] == [
        "conv_bn_stem_fwd_kernel",
        "batch_norm_finish_kernel",
        "maxpool_winners_kernel",
        "maxpool_winners_bwd_kernel",
        "sum_rows_kernel",
        "conv_bn_stem_wgrad_kernel",
        "conv_bn_finish_kernel",
        "conv_bn_stem_wgrad_kernel",  # of a dy that is there already
    ]


class _Seen(TorchDispatchMode):
    """Lists the aten ops below ours that allocate or compute, with the elements they give."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("fusedres::"):  # below the op: its implementation under this mode
            with self:
                return getattr(conv_bn_op, name.removeprefix("fusedres::conv_bn_"))(*args)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.ops.append((name, result.numel()))
        return result


@pytest.mark.parametrize("emit", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_no_temporary_the_size_of_an_activation(source: str, emit: bool) -> None:
    """Forward allocates y, and the activation where it is emitted; backward g_in and dy."""
    n, c, h, w, k = 64, 64, 56, 56, 256
    x = torch.empty(n, c, h, w, dtype=torch.bfloat16, memory_format=CHANNELS_LAST)
    vectors = [torch.ones(c) for _ in range(3)]
    deferred = source != "tensor"
    residual = torch.empty_like(x) if "residual" in source else None
    joined = vectors if source == "deferred_residual" else [None] * 3
    operands = (
        x, *(vectors if deferred else [None] * 3), residual, *joined, deferred,
        torch.empty(k, c, 1, 1, dtype=torch.bfloat16), None, (1, 1), (0, 0, 0, 0), (1, 1), 1,
    )  # fmt: skip
    norm = (torch.ones(k), torch.ones(k), torch.zeros(k), torch.ones(k), True, 0.1, None, 1e-5)
    emit = emit and deferred
    with dry(), _Seen() as seen:
        y, mean, _, rstd, scale, _, a, _ = conv_bn_op.fwd(*operands, emit, *norm, "triton", "fused")
        forward, seen.ops = seen.ops, []
        conv_bn_op.bwd(
            *operands, a if emit else None, None, torch.empty_like(y), torch.empty(2, k),
            torch.empty_like(x) if emit else None, y, mean, scale, rstd, None, True, True, True,
            torch.float32, torch.float32, "triton", "fused",
        )  # fmt: skip
        backward = seen.ops[2 + emit :]  # without those made for the call
    large = n * h * w * min(c, k)
    assert {name for name, _ in forward + backward} <= {
        "aten::empty.memory_format",
        "aten::empty_like",
        "aten::new_empty",
    }
    sizes = [size for _, size in forward if size >= large]
    assert sorted(sizes) == sorted([n * h * w * k] + [n * h * w * c] * emit)
    assert sorted(s for _, s in backward if s >= large) == sorted([n * h * w * c, n * h * w * k])


def test_a_fused_stem_has_neither_g_nor_dy_in_memory() -> None:
    n, k = 16, 64  # beyond what wgrad's splits take
    x = torch.empty(n, 3, 224, 224, dtype=torch.bfloat16).to(memory_format=CHANNELS_LAST)
    image = n * 230 * 232 * 4  # its copy in 4 channels with padding
    w = torch.empty(k, 3, 7, 7, dtype=torch.bfloat16)
    conv, window = Conv((2, 2), (3, 3, 3, 3), (1, 1), 1), (3, 2, 1)
    bn = (torch.ones(k), torch.ones(k), None, None, True, 0.1, 1e-5)
    with dry(), _Seen() as seen:
        p, y, norm, winners = conv_bn_relu_maxpool.conv_bn_relu_maxpool_fwd(
            x, w, conv, bn, window, True
        )
        mean, _, rstd, scale, bias = norm
        forward, seen.ops = seen.ops, []
        grad = torch.empty_like(p)
        conv_bn_relu_maxpool.conv_bn_relu_maxpool_bwd(
            grad, winners, x, w, w.float(), conv, y, mean, scale, bias, rstd, window, True,
            torch.float32, torch.float32,
        )  # fmt: skip
    # p and its winners, which are bytes
    assert [s for _, s in forward if s >= p.numel()] == [y.numel(), image, *[p.numel()] * 2]
    assert [s for _, s in seen.ops if s >= p.numel()] == [grad.numel(), image]


# --- products -------------------------------------------------------------------------------------


def test_fp32_products_follow_the_flag_of_convolutions() -> None:
    """By the old setting, and by the new one, after which the old one may not be read any more."""
    cudnn, x = torch.backends.cudnn, torch.empty(2, 16, 8, 8, requires_grad=True)

    def precisions() -> set[str]:
        with dry() as launches, use_plan("fused"):
            d = fusedres.ops.conv_bn(x, torch.empty(16, 16, 1, 1, requires_grad=True))
            d.value().backward(torch.empty_like(x))
        gemms = [launch.arguments() for launch in launches]
        found = [v["PRECISION"] for v in gemms if "PRECISION" in v]
        assert len(found) == 3
        return set(found)

    before = cudnn.allow_tf32
    try:
        for allowed, precision in ((True, "tf32"), (False, "ieee")):
            cudnn.allow_tf32 = allowed
            assert precisions() == {precision}
    finally:
        cudnn.allow_tf32 = before
    if hasattr(getattr(cudnn, "conv", None), "fp32_precision"):
        own = cudnn.conv.fp32_precision
        try:
            for precision in ("tf32", "ieee"):
                cudnn.conv.fp32_precision = precision
                assert precisions() == {precision}
        finally:
            cudnn.conv.fp32_precision = own


# --- plans and weights ----------------------------------------------------------------------------


def test_plans_by_name_and_in_the_report() -> None:
    model = fusedres.FusedResNet50(4).half()
    with use_backend("triton"):
        rows = {row.name: row.plan for row in fusedres.report(model)}
        assert (
            rows["layer1.0.conv1 + bn1"] == rows["layer2.0.downsample.0 + downsample.1"] == "fused"
        )
        assert rows["layer1.0.conv2 + bn2"] == rows["conv1 + bn1"] == "split"
        assert collections.Counter(rows.values()) == {"fused": 36, "split": 17}
        with use_plan("split"):
            assert {row.plan for row in fusedres.report(model)} == {"split"}
        wide = {row.plan for row in fusedres.report(model.double())}
        assert wide == {"split"}  # no tensor core serves Triton's fp64


def test_a_model_casts_its_weights_in_one_copy() -> None:
    model = fusedres.FusedResNet50(4).to(memory_format=CHANNELS_LAST)
    x = torch.randn(2, 3, 64, 64).to(memory_format=CHANNELS_LAST)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    sizes = {m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)}

    class Casts(TorchDispatchMode):
        alone, together = 0, 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.name() == "aten::_foreach_copy_":
                self.together += sum(t.numel() for t in args[1])
            elif func.name() == "aten::_to_copy" and args[0].requires_grad:
                self.alone += args[0].numel() in sizes and args[0].dim() == 4
            return func(*args, **(kwargs or {}))

    with dry(), torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        model(x)
    assert (casts.alone, casts.together) == (0, weights)


def test_casts_follow_their_weights() -> None:
    """Each forward casts anew; a weight changed since its cast is cast again."""
    w, other = (nn.Parameter(torch.randn(4, 3, 1, 1)) for _ in range(2))
    with packing([w, other], torch.float16, torch.device("cpu")):
        casts = packed_weights()
    assert isinstance(casts, PackedWeights) and packed_weights() is None
    assert torch.equal(casts.get(w, torch.float16), w.half())
    assert casts.get(w, torch.bfloat16) is None
    with torch.no_grad():
        w.add_(1)
    assert casts.get(w, torch.float16) is None
    assert casts.get(nn.Parameter(torch.randn(4, 3, 1, 1)), torch.float16) is None
    gone = nn.Parameter(torch.randn(4, 3, 1, 1))
    gone.untyped_storage().resize_(0)  # as a sharded weight is before its layer runs
    with packing([gone], torch.float16, torch.device("cpu")):
        assert packed_weights() is None
    assert torch.equal(casts.get(other, torch.float16), other.half())


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_equals_casts_by_hand(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_PLANES", (8, 8, 8, 8))
    monkeypatch.setitem(stages._DEPTHS, 50, (1, 1, 1, 1))
    model = fusedres.FusedResNet50(3)
    x = torch.randn(2, 3, 32, 32)
    results = []
    with use_backend("triton"), use_plan(plan):
        for cast_together in (True, False):
            if not cast_together:
                monkeypatch.setattr(resnet, "packed", lambda *_: contextlib.nullcontext())
            twin = copy.deepcopy(model)
            with torch.autocast("cpu", torch.float16):
                out = twin(x)
            out.float().square().sum().backward()
            results.append([out.detach(), *(p.grad for p in twin.parameters())])
    for together, alone in zip(*results, strict=True):
        assert torch.equal(together, alone)


# --- direct calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("kind", ["plain", "deferred", "residual"])
def test_wgrad_of_a_dy_that_is_there(kind: str, kernel: int) -> None:
    """As the backend "cuda" has it, whose dgrad writes dy; in the parameter's dtype and strides."""
    make = Maker(torch.float32, CHANNELS_LAST)
    x, r = (make.activation(2, 16, 5, 7, grad=False) for _ in range(2))
    v = [torch.rand(16) for _ in range(3)]
    source = Source(x, *v, r if kind == "residual" else None, None, None, None, True)
    source = Source.plain(x) if kind == "plain" else source
    a = x if kind == "plain" else plain_ops.bn_act_fwd(*source)
    dy = make.activation(2, 24, 5, 7, grad=False)
    parameter = make.weight(24, 16, kernel, kernel).detach().double().contiguous()
    conv = Conv((1, 1), (kernel // 2,) * 4, (1, 1), 1)
    dw = conv_bn_wgrad(source, dy, parameter.float(), parameter, conv)
    leaf = parameter.clone().requires_grad_()
    (truth,) = torch.autograd.grad(
        F.conv2d(a.double(), leaf, None, 1, kernel // 2), leaf, dy.double()
    )
    assert dw.dtype == torch.float64 and dw.stride() == parameter.stride()
    torch.testing.assert_close(dw, truth, rtol=1e-4, atol=1e-4)
    for wrong in (dy[:1], dy.double(), dy.contiguous()):
        with pytest.raises(ValueError, match="conv_bn_wgrad: dy must be"):
            conv_bn_wgrad(source, wrong, parameter.float(), parameter, conv)
    with pytest.raises(ValueError, match="conv_bn_wgrad: parameter must have"):
        conv_bn_wgrad(source, dy, parameter.float(), parameter[:8], conv)


def test_direct_calls_of_the_fused_plan_end_in_a_value_error() -> None:
    ops = torch.ops.fusedres
    x = torch.randn(2, 4, 6, 6).to(memory_format=CHANNELS_LAST)
    v, w = torch.ones(4), torch.randn(4, 4, 1, 1)
    none = (None,) * 3
    norm = (v, v, None, None, True, 0.1, None, 1e-5, "triton", "fused")
    conv = (None, (1, 1), (0, 0, 0, 0), (1, 1), 1)

    def call(
        x: Tensor = x, vectors: Any = (v, v, v), residual: Any = None, joined: Any = none,
        w: Tensor = w, conv: Any = conv, emit: bool = False,
    ) -> Any:  # fmt: skip
        return ops.conv_bn_fwd(x, *vectors, residual, *joined, True, w, *conv, emit, *norm)

    call()
    for bad in (
        {"x": x.contiguous()},
        {"x": x[0]},
        {"vectors": (v, None, v)},
        {"vectors": (v[:2], v, v)},
        {"vectors": none, "residual": x},
        {"residual": x[:1]},
        {"residual": x.double()},
        {"residual": x, "joined": (v, v, None)},
        {"w": w[:, :2]},
        {"w": torch.randn(4, 4, 0, 1)},
        {"w": torch.randn(4, 4, 7, 3)},  # larger than the map
        {"w": w[0]},
        {"conv": (None, (0, 1), (0, 0, 0, 0), (1, 1), 1)},
        {"conv": (None, (1, 1), (0, 0, 0, 0), (1, 1), 2)},
        {"conv": (None, (2, 2), (0, 0, 0, 0), (1, 1), 1), "emit": True},
        {"conv": (None, (1, 1), (1, 1, 1, 1), (1, 1), 1), "emit": True},
        {"w": torch.randn(4, 4, 3, 3), "emit": True},
        {"vectors": none, "emit": True},
    ):
        try:
            call(**bad)
        except ValueError:
            continue
        pytest.fail(f"{list(bad)} passed")


def test_empty_batches_and_bn_act() -> None:
    with use_backend("triton"):
        x = torch.empty(0, 4, 3, 3, requires_grad=True)
        d = fusedres.ops.conv_bn(x, torch.randn(6, 4, 1, 1))
        bn_act(d).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
