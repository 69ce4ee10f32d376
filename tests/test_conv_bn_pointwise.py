"""The CPU's fused plan of 1x1 convolutions: against the split plan and fp64, at every level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_conv_bn import Chain
from torch import Tensor

from fusedres import Deferred, native, use_backend, use_plan
from fusedres import backends as registry
from fusedres._conv import Conv, Source, Upstream
from fusedres._plans import Plan
from fusedres.native import conv_bn as kernels
from fusedres.nn import ConvBlock, IdentityBlock, report
from fusedres.ops import conv_bn
from fusedres.testing import CHANNELS_LAST, Maker, check_case, norm_arguments

pytestmark = pytest.mark.skipif(native.load() is None, reason="the extension is not built")
LEVELS = [] if native.load() is None else native.require().cpu_levels()[1:]
POINT = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)
DTYPES = [torch.float32, torch.bfloat16]


def serves(dtype: torch.dtype) -> bool:
    return kernels.multiplies(dtype)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    extension = native.require()
    best = extension.cpu_level()
    extension.set_cpu_level(request.param)
    yield request.param
    extension.set_cpu_level(best)


# Inputs of every kind, emitted or not; fewer pixels than a microkernel has rows, an odd number of
# them, more than there are blocks for; channels and filters in several tiles of sums, and so many
# channels that a chunk of them is short.
CHAINS = [
    Chain("tensor", (4, 32, 7, 5), 64),
    Chain("tensor", (4, 32, 7, 5), 64, emit=True),
    Chain("none", (3, 64, 5, 7), 32),
    Chain("none", (3, 64, 5, 7), 32, relu=False, out_relu=False),
    Chain("none", (3, 64, 5, 7), 32, emit=True),
    Chain("none", (3, 64, 5, 7), 32, training=False),
    Chain("none", (3, 64, 5, 7), 32, affine=False),
    Chain("tensor_residual", (3, 64, 5, 7), 96, emit=True),
    Chain("tensor_residual", (3, 64, 5, 7), 96),
    Chain("deferred_residual", (3, 64, 5, 7), 96, emit=True),
    Chain("deferred_residual", (3, 64, 5, 7), 96),
    Chain("deferred_residual", (3, 64, 5, 7), 96, relu=False),
    Chain("none", (3, 32, 1, 1), 32),
    Chain("none", (2, 32, 93, 91), 32),
    Chain("none", (1, 1600, 13, 15), 32),
    Chain("tensor_residual", (2, 1056, 3, 3), 32, emit=True),
    Chain("none", (2, 32, 3, 3), 1056),
    Chain("tensor", (2, 32, 6, 5), 64, stride=2),
    Chain("tensor", (2, 32, 6, 5), 64, stride=2, emit=True),
    Chain("none", (2, 32, 7, 5), 64, stride=2),
    Chain("tensor_residual", (2, 32, 6, 5), 64, stride=2),
    Chain("deferred_residual", (2, 32, 6, 5), 64, stride=2, relu=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_three_way(chain: Chain, dtype: torch.dtype) -> None:
    if not serves(dtype):
        pytest.skip(f"no fused plan for {dtype} here")
    check_case(chain, "cpp", dtype, CHANNELS_LAST, plan="fused")


def chain_results(chain: Chain, dtype: torch.dtype, plan: str) -> dict[str, Tensor]:
    """Results, gradients and running statistics of a chain."""
    t = chain.inputs(Maker(dtype, CHANNELS_LAST))
    with use_backend("cpp"), use_plan(plan):
        outputs = chain.ours(t)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs.values()]
    torch.autograd.backward(list(outputs.values()), grads)
    found = {name: o.detach() for name, o in outputs.items()}
    return found | {n: (x if x.grad is None else x.grad) for n, x in t.items()}


@pytest.mark.parametrize("chain", [CHAINS[2], CHAINS[9]], ids=str)
def test_levels_give_the_same_bits(chain: Chain, level: str) -> None:
    found = chain_results(chain, torch.float32, "fused")
    extension = native.require()
    extension.set_cpu_level(extension.cpu_levels()[-1])
    best = chain_results(chain, torch.float32, "fused")
    for name, result in found.items():
        assert torch.equal(result, best[name]), name


@pytest.mark.parametrize("chain", [CHAINS[9], CHAINS[13]], ids=str)
def test_bits_do_not_depend_on_the_thread_count(chain: Chain) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(chain_results(chain, torch.float32, "fused"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], result) for name, result in other.items())


@pytest.mark.parametrize("also_whole", [False, True])
@pytest.mark.parametrize("shape", [(2, 32, 6, 4), (2, 32, 5, 7), (3, 32, 1, 4), (4, 32, 1, 1)])
def test_a_sampled_gradient_joins(shape: tuple[int, ...], also_whole: bool) -> None:
    def results(plan: str) -> list[Tensor]:
        t = Chain("tensor_residual", shape, 64).inputs(Maker(torch.float32, CHANNELS_LAST))  # type: ignore[arg-type]
        wd = Maker(torch.float32, CHANNELS_LAST, seed=1).weight(96, 32, 1, 1)
        with use_backend("cpp"), use_plan(plan):
            d = conv_bn(t["x"], t["w0"], *norm_arguments(t, "n0"), residual=t["r"])
            h, sampled = conv_bn(d, t["w"], *norm_arguments(t, "n"), emit=(2, 2))
            shortcut = conv_bn(sampled, wd, stride=2, relu=False)
            parts = [h.value().sum((2, 3)), shortcut.value().square().sum((2, 3))]
            parts += [sampled.value.sum((2, 3))] if also_whole else []
        sum(p.square().sum() for p in parts).backward()  # type: ignore[union-attr]
        return [*parts, *(x.grad for x in (*t.values(), wd) if x.grad is not None)]

    for ours, theirs in zip(results("fused"), results("split"), strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * max(scale, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_batch(dtype: torch.dtype) -> None:
    if not serves(dtype):
        pytest.skip(f"no fused plan for {dtype} here")
    for plan in ("fused", "split"):
        chain = Chain("deferred_residual", (0, 32, 3, 3), 64, emit=True)
        found = chain_results(chain, dtype, plan)
        assert found["value"].shape == (0, 64, 3, 3)
        for name in ("w0", "wr", "w", "n.weight", "n.bias"):
            assert name in found and not found[name].any(), name


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    t = Chain("tensor", (2, 32, 4, 4), 64).inputs(Maker(torch.float32, CHANNELS_LAST))
    name = {"input": "x", "weight": "w", "bias": "n.bias"}[frozen]
    t[name].requires_grad_(False)
    found = []
    for plan in ("fused", "split"):
        for x in t.values():
            x.grad = None
        with use_backend("cpp"), use_plan(plan):
            conv_bn(t["x"], t["w"], *norm_arguments(t, "n")).value().square().sum().backward()
        found.append({n: x.grad for n, x in t.items()})
        assert t[name].grad is None
    for n, grad in found[0].items():
        other = found[1][n]
        assert (grad is None) == (other is None), n
        if grad is not None:
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4)


def test_weights_of_either_dtype_and_memory_format() -> None:
    """Under autocast the kernels round the parameter; its gradient is as it is stored."""
    if not serves(torch.bfloat16):
        pytest.skip("no fused plan for bf16 here")
    x = torch.randn(2, 32, 5, 5).to(torch.bfloat16, memory_format=CHANNELS_LAST)
    stored = torch.randn(64, 32, 1, 1)
    values, grads = [], []
    for memory_format in (torch.contiguous_format, CHANNELS_LAST):
        for dtype in (torch.float32, torch.bfloat16):
            w = stored.to(dtype).contiguous(memory_format=memory_format)
            w = w.detach().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16), use_backend("cpp"), use_plan("fused"):
                value = conv_bn(x, w).value()
            value.float().square().sum().backward()
            assert w.grad is not None
            assert (w.grad.dtype, w.grad.stride()) == (w.dtype, w.stride())
            values.append(value)
            grads.append(w.grad.float())
    assert all(torch.equal(values[0], v) for v in values[1:])
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3])
    # bf16 keeps 8 bits
    assert (grads[0] - grads[1]).abs().max() <= 2**-8 * grads[0].abs().max()


@pytest.mark.parametrize("odd", ["gaps", "negated"])
def test_weights_may_lie_anyhow(odd: str) -> None:
    x = torch.randn(2, 32, 5, 5).contiguous(memory_format=CHANNELS_LAST)
    if odd == "gaps":
        w = torch.randn(64, 64, 1, 1)[:, ::2]
    else:
        w = torch.randn(64, 32, 1, 1, dtype=torch.complex64).conj().imag
    assert w.is_neg() == (odd == "negated")
    with use_backend("cpp"), use_plan("fused"):
        d = conv_bn(x, w)
    torch.testing.assert_close(d.y, F.conv2d(x, w.clone()), rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_stay_in_their_pixel_and_are_counted_once() -> None:
    x = torch.randn(2, 32, 4, 4).contiguous(memory_format=CHANNELS_LAST)
    x[1, 5, 2, 3] = float("nan")
    w = torch.randn(64, 32, 1, 1)
    with use_backend("cpp"), use_plan("fused"):
        d = conv_bn(x, w)
    spoilt = d.y.isnan()
    assert spoilt[1, :, 2, 3].all() and spoilt.sum() == 64
    assert d.mean.isnan().all()


# --- where it runs --------------------------------------------------------------------------------


def way(
    weight: Tensor, conv: Conv = POINT, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[str, str]:
    choice = registry.choose("conv_bn", "cpu", dtype)
    return registry.way_of(choice, dtype, weight, conv, **options)


def test_it_runs_where_it_serves_and_nowhere_else() -> None:
    weight = torch.empty(64, 32, 1, 1)
    with use_backend("cpp"):
        for asked in ("auto", "fused", "fused+masks", "fused_1x1", "masks"):
            with use_plan(asked):
                assert way(weight) == ("cpp", "fused")
                for other in (
                    torch.empty(64, 32, 3, 3),
                    torch.empty(64, 40, 1, 1),
                    torch.empty(40, 32, 1, 1),
                    torch.empty(32, 4128, 1, 1),
                ):
                    assert registry.base_of(way(other)[1]) == "split"
                assert registry.base_of(way(weight, POINT._replace(stride=(3, 3)))[1]) == "split"
                assert registry.base_of(way(weight, dtype=torch.float64)[1]) == "split"
                nchw = way(weight, memory_format=torch.contiguous_format)
                assert registry.base_of(nchw[1]) == "split"
        with use_plan("split"):
            assert way(weight) == ("cpp", "split")


def test_levels_without_products_leave_them_to_the_library() -> None:
    extension = native.require()
    best = extension.cpu_level()
    try:
        extension.set_cpu_level("baseline")
        assert not serves(torch.float32) and not serves(torch.bfloat16)
        for lower in LEVELS:
            extension.set_cpu_level(lower)
            assert serves(torch.float32)
            wanted = lower == "avx512_bf16" and not extension.cpu_has_tiles()
            assert serves(torch.bfloat16) == wanted
    finally:
        extension.set_cpu_level(best)


def test_blocks_take_it_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("conv_bn_fwd", "conv_bn_bwd"):
        inner = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, n=name, f=inner: (called.append(n), f(*a))[1])
    model = torch.nn.Sequential(ConvBlock(32, (32, 32, 64)), IdentityBlock(64, (32, 32, 64)))
    model.to(memory_format=CHANNELS_LAST)
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=CHANNELS_LAST)
    with use_backend("cpp"):
        model(x).sum().backward()
        plans = {row.name: row.plan for row in report(model)}
    assert called.count("conv_bn_fwd") == called.count("conv_bn_bwd") == 5
    fused = {n.partition(".")[2] for n, plan in plans.items() if plan == "fused"}
    assert fused == {"conv1 + bn1", "conv3 + bn3", "downsample.0 + downsample.1"}


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "dtype",
        "format",
        "channels",
        "filters",
        "kernel",
        "stride",
        "weight",
        "masks",
        "emit",
        "scale",
    ]
    + ["residual", "y", "g", "sums", "grad_a", "a"],
)
def test_what_it_does_not_serve_is_refused(change: str) -> None:
    dtype = torch.float64 if change == "dtype" else torch.float32
    layout = torch.contiguous_format if change == "format" else CHANNELS_LAST
    channels, filters = 40 if change == "channels" else 32, 40 if change == "filters" else 32
    kernel = 3 if change == "kernel" else 1
    conv = POINT._replace(stride=(3, 3)) if change == "stride" else POINT

    def full(count: int, height: int = 4) -> Tensor:
        return torch.randn(2, count, height, 4, dtype=dtype).contiguous(memory_format=layout)

    weight = torch.randn(filters, channels, kernel, kernel)
    weight = weight[:, :24] if change == "weight" else weight
    v = torch.ones(channels)
    source = Source(full(channels), v, v, v, None, None, None, None, True)
    if change == "scale":
        source = source._replace(scale=torch.ones(3))
    if change == "residual":
        source = Source.plain(source.x)._replace(residual=full(channels))
    norm = (None, None, None, None, True, 0.1, 1e-5)
    backward = change in ("y", "g", "sums", "grad_a", "a")
    if not backward:
        with pytest.raises(ValueError, match="conv_bn_fwd"):
            conv = POINT._replace(stride=(2, 1)) if change == "emit" else conv
            kernels.conv_bn_fwd(source, weight, conv, change == "emit", change == "masks", *norm)
        if change in ("masks", "emit"):
            return
    k = torch.ones(filters)
    up = Upstream(
        full(filters, 3 if change == "g" else 4), torch.ones(3 if change == "sums" else 2, filters),
        full(filters, 3 if change in ("g", "y") else 4), k, k, k, None, True,
    )  # fmt: skip
    grad_a = full(channels, 3) if change == "grad_a" else None
    a = full(channels, 3) if change == "a" else None
    for need_input in (True, change == "grad_a"):
        with pytest.raises(ValueError, match="conv_bn_bwd"):
            kernels.conv_bn_bwd(
                source, weight, weight, conv, a, None, up, grad_a, Plan("fused"), need_input, True,
                None, None,
            )  # fmt: skip


def test_deferred_is_what_comes_out() -> None:
    """The statistics are those of y as it was stored."""
    x = torch.randn(2, 32, 9, 9).contiguous(memory_format=CHANNELS_LAST)
    w = torch.randn(64, 32, 1, 1)
    with use_backend("cpp"), use_plan("fused"):
        d = conv_bn(x, w)
    assert isinstance(d, Deferred)
    torch.testing.assert_close(d.y, F.conv2d(x, w), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d.mean, d.y.double().mean((0, 2, 3)).float())
