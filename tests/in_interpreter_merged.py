"""dgrad and wgrad in one kernel, in Triton's interpreter; test_triton.py runs it with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_conv_bn import SOURCES, Chain
from torch import Tensor
from triton_launches import dry

from fusedres import use_backend, use_plan
from fusedres._conv import Conv, Source, Upstream
from fusedres._tensors import INTERPRETED, stat_dtype
from fusedres.testing import CHANNELS_LAST, FLOOR, Maker, check_case, run
from fusedres.triton_kernels import _configs, _gemm, _launch, _merged, _pointwise

assert INTERPRETED, "run by test_triton.py"
CONV = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)


PLAN = "fused+merged"


class Merged:
    """How often the kernel was asked for."""

    calls = 0


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> Merged:
    """Counts the calls."""
    counted, bwd = Merged(), _merged.bwd

    def counting(*args: Any) -> Any:
        counted.calls += 1
        found, dw_part = bwd(*args)
        assert found.dy is None
        return found, dw_part

    monkeypatch.setattr(_merged, "bwd", counting)
    return counted


class Operands:
    """Arguments of `bwd`, drawn from a seed."""

    def __init__(
        self, source: str, shape: tuple[int, int, int, int], outs: int, dtype: torch.dtype,
        *, relu: bool = True, emit: bool = False, training: bool = True, gmask: bool = False,
        seed: int = 0,
    ) -> None:  # fmt: skip
        n, c, h, w = shape
        generator = torch.Generator().manual_seed(seed)

        def full(k: int) -> Tensor:
            values = torch.randn(n, k, h, w, generator=generator, dtype=torch.float64)
            return values.to(dtype).contiguous(memory_format=CHANNELS_LAST)

        def vector(k: int, low: float = -0.5) -> Tensor:
            values = torch.rand(k, generator=generator, dtype=torch.float64) + low
            return values.to(stat_dtype(dtype))

        x, deferred = full(c), source != "tensor"
        own = [vector(c), vector(c, 0.5), vector(c)] if deferred else [None] * 3
        residual = full(c) if source.endswith("residual") else None
        both = source == "deferred_residual"
        joined = [vector(c), vector(c, 0.5), vector(c)] if both else [None] * 3
        self.source = Source(x, *own, residual, *joined, relu and deferred)
        self.a = conv_bn_value(self.source) if emit and deferred else None
        self.grad_a = full(c) if emit else None
        y, g = full(outs), full(outs)
        mean, scale, rstd, bias = vector(outs), vector(outs, 0.5), vector(outs, 0.5), vector(outs)
        self.unmasked = g
        if gmask:
            u = (y.to(mean.dtype) - col(mean)) * col(scale) + col(bias)
            g = torch.where(u.to(dtype) <= 0, 0, g)
        wide = g.to(mean.dtype)
        sums = torch.stack([wide.sum((0, 2, 3)), (wide * (y - col(mean))).sum((0, 2, 3))])
        self.up = Upstream(g, sums, y, mean, scale, rstd, None, training)
        self.bias = bias
        weight = torch.randn(outs, c, 1, 1, generator=generator, dtype=torch.float64)
        self.weight = weight.to(dtype)

    def arguments(self) -> tuple[Any, ...]:
        return self.up, self.source, self.a, self.grad_a, self.weight, CONV

    def one(self) -> dict[str, Tensor]:
        """By the kernel under test."""
        found, dw_part = _merged.bwd(*self.arguments())
        return self._results(found, dw_part)

    def two(self) -> dict[str, Tensor]:
        """By dgrad and wgrad."""
        found = _pointwise.dgrad(*self.arguments(), True)
        left = self.source if self.a is None else Source.plain(self.a)
        assert found.dy is not None
        return self._results(found, _pointwise.wgrad(left, found.dy, self.weight, CONV))

    def _results(self, found: Any, dw_part: Tensor) -> dict[str, Tensor]:
        results = {"g_in": found.g_in, "dw": dw_part.sum(0)}
        assert (found.part is None) == (self.source.mean is None)
        return results if found.part is None else results | {"sums": found.part.sum(0)}


def col(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def conv_bn_value(source: Source) -> Tensor:
    """The activation, in plain torch."""
    x, mean, scale, bias, residual, res_mean, res_scale, res_bias, relu = source
    assert mean is not None and scale is not None and bias is not None
    u = (x.to(mean.dtype) - col(mean)) * col(scale) + col(bias)
    if residual is not None:
        r = residual.to(mean.dtype)
        if res_mean is not None:
            assert res_scale is not None and res_bias is not None
            r = (r - col(res_mean)) * col(res_scale) + col(res_bias)
        u = u + r
    u = u.relu() if relu else u
    return u.to(x.dtype).contiguous(memory_format=CHANNELS_LAST)


CASES = [
    *(
        dict(source=s, relu=r, emit=e, training=t)
        for s, r, e, t in itertools.product(SOURCES, (True, False), (False, True), (True, False))
        if r or s != "tensor"
    ),
]


@pytest.mark.parametrize("gmask", [False, True], ids=["", "gmask"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_equals_two_kernels(case: dict[str, Any], gmask: bool) -> None:
    """fp64, 1e-12; where g arrives unmasked, to the bit what it gives masked."""
    o = Operands(shape=(2, 37, 5, 9), outs=19, dtype=torch.float64, gmask=gmask, **case)
    close(o.one(), o.two(), 1e-12)
    if gmask:
        before = o.one()
        o.up = o.up._replace(g=o.unmasked, bias=o.bias)
        for name, result in o.one().items():
            assert torch.equal(result, before[name]), name


def close(found: dict[str, Tensor], truth: dict[str, Tensor], limit: float) -> None:
    assert found.keys() == truth.keys()
    for name, true in truth.items():
        assert true.any() and found[name].shape == true.shape, name
        off = (found[name] - true).abs().max() / true.abs().max()
        assert off <= limit, (name, float(off))


@pytest.mark.parametrize("multiprocessors", [1, 3, 50])
@pytest.mark.parametrize(
    ("shape", "outs"),
    [
        ((1, 1, 3, 1), 1),
        ((2, 3, 4, 4), 2),  # one tile, less than whole
        ((5, 33, 8, 8), 16),  # 10 whole tiles of rows
        ((5, 64, 8, 9), 65),  # a short one
        ((7, 5, 3, 3), 130),
    ],
    ids=str,
)
def test_shapes_and_splits(
    shape: tuple[int, int, int, int], outs: int, multiprocessors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(_gemm, "multiprocessors", lambda device: multiprocessors)
    o = Operands("deferred_residual", shape, outs, torch.float64, gmask=True, relu=False, seed=1)
    truth = o.two()
    o.up = o.up._replace(g=o.unmasked, bias=o.bias)
    with _launch.recording() as launches:
        close(o.one(), truth, 1e-12)
    (launch,) = launches
    v = launch.arguments()
    across = -(-shape[1] // v["BN"])
    row_tiles = -(-v["M"] // v["BM"])
    parts = launch.grid[0] // across
    assert v["tiles"] * (parts - 1) < row_tiles <= v["tiles"] * parts
    assert parts == max(1, min(parts, 2 * multiprocessors // across))
    assert v["dw_part_ptr"].size(0) == v["part_ptr"].size(0) == parts


CHAINS = [
    *(Chain(s, emit=e, training=t) for s in SOURCES for e in (False, True) for t in (True, False)),
    *(Chain(s, relu=False, emit=True) for s in SOURCES[1:]),
    Chain("deferred_residual", affine=False),
    Chain("deferred_residual", (2, 17, 13, 11), 19, emit=True),
    Chain("tensor_residual", (2, 33, 9, 9), 65),
    Chain("none", (7, 5, 1, 1), 11),
]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_equals_autograd(chain: Chain, merged: Merged) -> None:
    """fp64, to 1e-10."""
    check_case(chain, "triton", torch.float64, CHANNELS_LAST, plan=PLAN)
    assert merged.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("emit", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_three_way(source: str, emit: bool, dtype: torch.dtype, merged: Merged) -> None:
    """No mask in fp16, where it flips by chance."""
    chain = Chain(source, (4, 24, 7, 5), 40, emit=emit)
    if dtype == torch.float16:
        chain = replace(chain, relu=False, out_relu=False)
    torch.backends.cudnn.allow_tf32 = False
    check_case(chain, "triton", dtype, CHANNELS_LAST, plan=PLAN)
    assert merged.calls


@pytest.mark.parametrize("source", ["none", "deferred_residual"])
def test_masks_of_half_types(source: str, merged: Merged) -> None:
    chain = Chain(source, (16, 8, 17, 17), 8, emit=True)  # large: flips average out
    check_case(chain, "triton", torch.float16, CHANNELS_LAST, trim=0.01, plan=PLAN)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("emit", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_rounds_as_two_kernels_do(source: str, emit: bool, dtype: torch.dtype) -> None:
    """g_in differs where a sum in another order rounds to its neighbour; the mask never does. In
    fp32, where a sum may round at each of its steps, every element is within a few of them.
    """
    o = Operands(source, (3, 40, 7, 9), 24, dtype, emit=emit, gmask=True)
    truth = o.two()
    o.up = o.up._replace(g=o.unmasked, bias=o.bias)
    found = o.one()
    assert torch.equal(found["g_in"] == 0, truth["g_in"] == 0)
    same = (found["g_in"] == truth["g_in"]).float().mean()
    assert same > (0.98 if dtype == torch.float16 else 0.2), float(same)
    furthest = (found["g_in"].double() - truth["g_in"].double()).abs().max()
    assert furthest <= 4 * torch.finfo(dtype).eps * truth["g_in"].abs().max(), float(furthest)
    for name, true in truth.items():
        off = (found[name].double() - true.double()).norm() / true.double().norm()
        assert off < FLOOR[dtype] / (10 if dtype == torch.float16 else 1), (name, float(off))


def test_sums_are_of_the_rounded_gradient() -> None:
    o = Operands("none", (4, 8, 9, 9), 6, torch.float16)
    found = o.one()
    wide, x, mean = found["g_in"].double(), o.source.x.double(), o.source.mean
    assert mean is not None
    truth = torch.stack([wide.sum((0, 2, 3)), (wide * (x - col(mean))).sum((0, 2, 3))])
    torch.testing.assert_close(found["sums"].double(), truth, rtol=1e-5, atol=1e-4)


def test_an_activation_that_rounds_to_zero_masks_both_gradients() -> None:
    """Below fp16's smallest number it is zero, of the input and of the output alike."""
    o = Operands("none", (2, 8, 4, 4), 6, torch.float16)
    tiny = torch.full((8,), 1e-9)
    x = o.source.x.abs() + 1
    o.source = o.source._replace(x=x, mean=torch.zeros(8), scale=tiny, bias=torch.zeros(8))
    found = o.one()
    assert not found["g_in"].any() and not found["sums"].any() and not found["dw"].any()
    o = Operands("tensor", (2, 8, 4, 4), 6, torch.float16, training=False)
    y, g = o.up.y.abs() + 1, torch.full_like(o.up.g, 3e4)  # which outweighs the scale
    o.up = o.up._replace(g=g, y=y, mean=torch.zeros(6), scale=tiny[:6])
    assert o.one()["g_in"].any()
    o.up = o.up._replace(bias=torch.zeros(6))
    found = o.one()
    assert not found["g_in"].any() and not found["dw"].any()


def test_rows_past_the_end_add_nothing_to_dw() -> None:
    """A zero in their place would overflow fp16 in the prologue: its mean is far from it."""
    o = Operands("none", (1, 16, 5, 5), 6, torch.float16, relu=False)
    o.source.x[:, 0] = -300
    mean, scale = torch.zeros(16), torch.ones(16)
    mean[0], scale[0] = -300, 316
    o.source = o.source._replace(mean=mean, scale=scale, bias=torch.zeros(16))
    found = o.one()
    assert found["dw"].isfinite().all()
    torch.testing.assert_close(found["dw"], o.two()["dw"], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "r", "w", "value", "emitted"])
def test_nan_and_inf_spread_as_in_torch(where: str, value: float, merged: Merged) -> None:
    """With frozen statistics, where they do not reach everything at once."""
    chain = Chain("tensor_residual", (2, 8, 5, 3), 6, training=False, emit=True)

    def poisoned(function: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        t = chain.inputs(Maker(torch.float32, CHANNELS_LAST))
        if where in t:
            with torch.no_grad():
                t[where][-1, -1, -1, -1] = value

        def hook(grad: Tensor) -> Tensor:
            grad = grad.clone()
            grad[-1, -1, -1, -1] = value
            return grad

        def outputs(inputs: Any) -> dict[str, Tensor]:
            out = function(inputs)
            if where in out:
                out[where].register_hook(hook)
            return out

        return dict(run(outputs, t))

    torch.backends.cudnn.allow_tf32 = False
    with use_backend("triton"), use_plan(PLAN):
        ours = poisoned(chain.ours)
    theirs = poisoned(chain.eager)
    for name, true in theirs.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours[name]), kind(true)), (name, kind)


def test_a_masked_g_keeps_nan() -> None:
    """Where y is NaN relu's gradient passes; where it is not positive a NaN in g does not."""
    o = Operands("tensor", (1, 4, 3, 3), 5, torch.float32, training=False)
    o.up.y[0, 0, 0, 0] = float("nan")
    o.up.y[0, 1, 1, 1] = -100
    o.up.g[0, 1, 1, 1] = float("nan")
    o.up = o.up._replace(bias=o.bias)
    found = o.one()
    assert found["g_in"].isfinite().all() and found["dw"].isfinite().all()
    o.up.g[0, 0, 0, 0] = float("inf")
    assert not o.one()["g_in"][0, :, 0, 0].isfinite().any()


def test_infinity_stays_in_its_row_and_is_counted_once() -> None:
    """M = 9 of a tile of 32 rows, K = 5 of 16 columns: what fills them up is zero, not a copy."""
    o = Operands("none", (1, 4, 3, 3), 5, torch.float32, training=False, relu=False)
    o.source.x.abs_().add_(1)
    o.source = o.source._replace(bias=torch.full((4,), 2.0))
    o.up.g.abs_()
    o.up.g[0, 0, 2, 2] = float("inf")
    found = o.one()
    assert found["g_in"][0, :, 2, 2].isinf().all()
    assert found["g_in"].isfinite().sum() == 4 * 8
    assert found["dw"][0].isposinf().all() and found["dw"][1:].isfinite().all()
    o.up.g[0, 0, 2, 2] = 1
    o.weight[0, 0] = float("inf")
    found = o.one()
    assert found["g_in"][:, 0].isposinf().all() and found["sums"][0, 0].isposinf()
    assert found["sums"][:, 1:].isfinite().all() and found["dw"].isfinite().all()


def test_results_do_not_rest_on_what_memory_held(merged: Merged) -> None:
    """Outputs are poisoned: torch fills every empty tensor with NaN here."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        for source in SOURCES:
            chain = Chain(source, (2, 5, 6, 7), 3, emit=True)
            check_case(chain, "triton", torch.float64, CHANNELS_LAST, plan=PLAN)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_same_input_gives_the_same_bits() -> None:
    o = Operands("deferred_residual", (4, 16, 13, 13), 24, torch.float32)
    first, second = o.one(), o.one()
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_empty_batch(merged: Merged) -> None:
    chain = Chain("deferred_residual", (0, 8, 5, 5), emit=True)
    t = chain.inputs(Maker(torch.float32))
    with use_backend("triton"), use_plan(PLAN):
        sum(out.sum() for out in chain.ours(t).values()).backward()  # type: ignore[union-attr]
    assert merged.calls
    for name, x in t.items():
        if x.requires_grad:
            assert x.grad is not None and x.grad.shape == x.shape and not x.grad.any(), name


# --- what it is for -------------------------------------------------------------------------------

# C, K of ResNet-50's 1x1 convolutions of stride 1, and whether one kernel is for their backward
SHAPES = {
    (64, 64): True, (64, 256): True, (256, 64): True, (256, 128): True, (512, 128): True,
    (128, 512): False, (512, 256): False, (256, 1024): False, (1024, 512): False,
}  # fmt: skip


def half(channels: int, outs: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    x = torch.empty(1, channels, 4, 4, dtype=dtype, memory_format=CHANNELS_LAST)
    return x, torch.empty(outs, channels, 1, 1, dtype=dtype)


def test_serves_by_shape_dtype_and_gpu() -> None:
    def serves(x: Tensor, weight: Tensor, conv: Conv = CONV) -> bool:
        return _merged.serves(x, weight, conv, Source.plain(x))

    with dry():
        for shape, wanted in SHAPES.items():
            assert serves(*half(*shape)) == wanted, shape
        assert not serves(*half(64, 64, torch.float32))
        assert not serves(*half(72, 64)) and not serves(*half(64, 96))
        assert not serves(*half(64, 64), CONV._replace(stride=(2, 2)))
        assert not serves(half(64, 64)[0], torch.empty(64, 64, 3, 3, dtype=torch.bfloat16))
    for target, wanted in (
        ("sm_80", False),
        ("sm_100", True),
        ("sm_120", False),
        ("gfx942", False),
    ):
        with dry(target):
            assert serves(*half(64, 64)) == wanted, target


def test_bytes_are_what_the_head_of_the_kernel_states() -> None:
    """Elements a row: 2*K and C of each operand that applies, and nothing more."""
    for case in CASES:
        for gmask in (False, True):
            o = Operands(shape=(2, 8, 5, 5), outs=6, dtype=torch.float32, **case)
            o.up = o.up._replace(bias=o.bias) if gmask else o.up
            with _launch.recording(run=False) as launches:
                _merged.bwd(*o.arguments())
            (launch,) = launches
            given = launch.arguments()
            sizes = {
                n: t.numel()
                for n, t in given.items()
                if isinstance(t, Tensor) and t.dim() == 4 and n != "w_ptr"
            }
            m, deferred, emitted = 2 * 5 * 5, o.source.mean is not None, o.a is not None
            residual = 0 if o.source.residual is None else 1 if o.source.res_mean is None else 2
            wanted = m * (6 + 6 * (case["training"] or gmask))
            wanted += m * 8 * (1 + 1 + emitted + case["emit"])  # x, g_in, a, grad_a
            wanted += m * 8 * (residual == 2 or (residual == 1 and not emitted))
            assert sum(sizes.values()) == wanted, (case, sizes)
            assert deferred or given["part_ptr"] is None


def test_every_candidate_holds_a_tile_of_dw_in_registers() -> None:
    for channels, outs in (s for s, served in SHAPES.items() if served):
        shape = _gemm.shape_of(*half(channels, outs), CONV, 1024)
        for config in _configs.candidates("bwd", shape):
            assert config.BN * outs <= 128 * 32 * config.num_warps
            assert config.BM % 16 == 0 and outs <= config.BK
