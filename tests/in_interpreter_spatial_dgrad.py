"""The spatial dgrad kernel, called directly, against torch's autograd; test_triton.py runs it in a
process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres._conv import Conv, Source, Upstream
from fusedres._tensors import CHANNEL_DIMS, INTERPRETED, per_channel, stat_dtype
from fusedres.testing import CHANNELS_LAST, Maker, assert_three_way
from fusedres.triton_kernels import _gemm, _launch
from fusedres.triton_kernels._spatial_dgrad import dgrad, dy_of

assert INTERPRETED, "run by test_triton.py"


@dataclass(frozen=True)
class Layer:
    """A convolution with BatchNorm, what stands in front of it, and how its gradient arrives."""

    shape: tuple[int, int, int, int] = (2, 5, 7, 6)
    channels: int = 3
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    deferred: bool = True
    residual: int = 2  # as the kernel counts them
    relu: bool = True
    emitted: bool = False
    grad_a: bool = True
    training: bool = True
    gmask: bool = True  # a ReLU behind it, whose mask g is still to take
    need_dy: bool = True
    prologue: bool = True

    def __str__(self) -> str:
        default = Layer()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return ",".join(f"{k}={v}" for k, v in changed.items()) or "default"

    @property
    def conv(self) -> Conv:
        return Conv(self.stride, self.padding, self.dilation, 1)


def inputs(layer: Layer, make: Maker) -> dict[str, Tensor]:
    c, k = layer.shape[1], layer.channels
    t = {"x": make.activation(*layer.shape), "w": make.weight(k, c, *layer.kernel)}
    t |= make.norm("x", c) | make.norm("r", c) | make.norm("y", k)
    t["r"], t["grad_a"] = make.activation(*layer.shape), make.activation(*layer.shape)
    t = {name: v.detach() for name, v in t.items()}
    t["g"] = make.activation(*_y(layer, t, t["x"]).shape).detach() - 0.25
    return t


def _y(layer: Layer, t: dict[str, Tensor], a: Tensor) -> Tensor:
    top, bottom, left, right = layer.padding
    padded = F.pad(a, (left, right, top, bottom))
    return F.conv2d(padded, t["w"], None, layer.stride, 0, layer.dilation)


def _normalized(t: dict[str, Tensor], name: str) -> Tensor:
    mean, scale, bias = (per_channel(v) for v in _vectors(t, name))
    x = t[name]
    return (((x - mean) * scale) + bias).to(x.dtype)


def _vectors(t: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """mean, scale and bias: any will do."""
    return t[f"{name}.running_mean"], t[f"{name}.weight"], t[f"{name}.bias"]


def _activation(layer: Layer, t: dict[str, Tensor], u: Tensor) -> Tensor:
    if layer.residual and layer.deferred:
        u = u + (t["r"] if layer.residual == 1 else _normalized(t, "r"))
    return u.relu() if layer.relu and layer.deferred else u


def eager(layer: Layer, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """By autograd, in the dtype of the inputs."""
    u = (_normalized(t, "x") if layer.deferred else t["x"]).detach().requires_grad_()
    a = _activation(layer, t, u)
    y = _y(layer, t, a)
    running = (t["y.running_mean"].clone(), t["y.running_var"].clone())
    out = F.batch_norm(y, *running, t["y.weight"], t["y.bias"], layer.training, eps=1e-5)
    out = out.relu() if layer.gmask else out
    outputs = [(out, t["g"]), *([(a, t["grad_a"])] if layer.grad_a else [])]
    g_in, dy = torch.autograd.grad(
        [o for o, _ in outputs], [u, y], [g for _, g in outputs], allow_unused=True
    )
    found = {"g_in": g_in, **({"dy": dy} if layer.need_dy else {})}
    if layer.deferred:
        wide = g_in.to(stat_dtype(g_in.dtype))
        found["sums"] = torch.stack([_sum(wide), *(_sum(wide * o) for o in _off(layer, t))])
    return found


def _sum(t: Tensor) -> Tensor:
    return t.sum(CHANNEL_DIMS)


def _off(layer: Layer, t: dict[str, Tensor]) -> list[Tensor]:
    """What the sums beside that of g_in are weighted with."""
    names = ["x", "r"] if layer.residual == 2 else ["x"]
    return [t[n] - per_channel(_vectors(t, n)[0]) for n in names]


def operands(layer: Layer, t: dict[str, Tensor]) -> tuple[Any, ...]:
    """What dgrad takes."""
    x, w = t["x"], t["w"]
    none = (None,) * 3
    residual = t["r"] if layer.residual and layer.deferred else None
    joined = _vectors(t, "r") if layer.residual == 2 and layer.deferred else none
    source = Source(
        x, *(_vectors(t, "x") if layer.deferred else none), residual, *joined, layer.relu
    )
    a = _activation(layer, t, _normalized(t, "x") if layer.deferred else x)
    a = a.contiguous(memory_format=CHANNELS_LAST)
    y = _y(layer, t, a).contiguous(memory_format=CHANNELS_LAST)
    wide = y.to(stat_dtype(y.dtype))
    mean, var = t["y.running_mean"], t["y.running_var"]
    if layer.training and y.numel():
        mean, var = wide.mean(CHANNEL_DIMS), wide.var(CHANNEL_DIMS, correction=0)
    rstd = torch.rsqrt(var + 1e-5)
    scale, bias = t["y.weight"] * rstd, t["y.bias"]
    off, g = wide - per_channel(mean), t["g"].to(wide.dtype)
    u = off * per_channel(scale) + per_channel(bias)
    masked = torch.where(u.to(y.dtype) <= 0, 0, g) if layer.gmask else g
    sums = torch.stack([_sum(masked), _sum(masked * off)])
    up = Upstream(t["g"], sums, y, mean, scale, rstd, bias if layer.gmask else None, layer.training)
    return (
        up, source, a if layer.emitted else None, t["grad_a"] if layer.grad_a else None, w,
        layer.conv, layer.need_dy, None if layer.prologue else dy_of(up),
    )  # fmt: skip


def ours(layer: Layer, t: dict[str, Tensor]) -> dict[str, Tensor]:
    found = dgrad(*operands(layer, t))
    assert (found.part is not None) == layer.deferred
    assert (found.dy is not None) == layer.need_dy
    assert found.g_in.is_contiguous(memory_format=CHANNELS_LAST)
    results = {"g_in": found.g_in}
    if found.part is not None:
        results["sums"] = found.part.sum(0)
    if found.dy is not None:
        results["dy"] = found.dy
    return results


def check(layer: Layer, dtype: torch.dtype = torch.float64) -> None:
    seeds = range(2 if dtype == torch.float16 else 1)

    def runs(function: Any, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        return [function(layer, inputs(layer, Maker(dtype, CHANNELS_LAST, seed=s))) for s in seeds]

    truth, peer, mine = runs(eager, torch.float64), runs(eager, dtype), runs(ours, dtype)
    assert truth[0].keys() == mine[0].keys()
    for name in truth[0]:
        results = ([r[name] for r in rs] for rs in (mine, peer, truth))
        assert_three_way(name, *results, dtype)


SAME = (0, 1, 0, 1)  # as Keras pads an even kernel
NO = (0, 0, 0, 0)
GEOMETRIES = {
    "3x3": Layer(),
    "3x3/2": Layer(stride=(2, 2)),
    "3x3/2 of even sides": Layer((2, 5, 8, 6), stride=(2, 2)),
    "7x7/2 of an image": Layer((2, 3, 13, 11), 5, (7, 7), (2, 2), (3, 3, 3, 3)),
    "2x2, below and right": Layer(kernel=(2, 2), padding=SAME),
    "2x2/2, below and right": Layer(kernel=(2, 2), stride=(2, 2), padding=SAME),
    "1x3": Layer(kernel=(1, 3), padding=(0, 0, 1, 1)),
    "3x1/1x2": Layer(kernel=(3, 1), stride=(1, 2), padding=(2, 0, 0, 0)),
    "3x3, dilated": Layer(dilation=(2, 2), padding=(2, 2, 2, 2)),
    "3x3/2, dilated: classes without a tap": Layer(
        stride=(2, 2), dilation=(2, 2), padding=(2, 2, 2, 2)
    ),
    "3x3/4x2, dilated by 2x3": Layer(
        (2, 5, 9, 8), stride=(4, 2), dilation=(2, 3), padding=(3, 2, 3, 3)
    ),
    "padded by more than the kernel": Layer(padding=(4, 3, 5, 4)),
    "padded by more than the kernel, /2": Layer(padding=(4, 3, 5, 4), stride=(2, 2)),
    "3x3/3": Layer(stride=(3, 3), padding=(1, 1, 2, 0)),
    "2x2/3: pixels that no output reads": Layer(kernel=(2, 2), stride=(3, 3), padding=NO),
    "1x1/3": Layer((2, 5, 8, 7), kernel=(1, 1), stride=(3, 2), padding=NO),
    "3x3, not padded": Layer(padding=NO),
    "3x3/2, not padded": Layer(padding=NO, stride=(2, 2)),
    "1x1, padded": Layer(kernel=(1, 1)),
    "one channel": Layer((3, 1, 5, 4), 2, stride=(2, 2)),
    "one channel out": Layer((3, 4, 5, 4), 1),
    "1x1 maps: empty classes": Layer((7, 5, 1, 1), 4, stride=(2, 2)),
    "one row": Layer((3, 5, 1, 9), 4, stride=(2, 2)),
    "one image": Layer((1, 5, 6, 6), 4),
    "several blocks of C and K": Layer((1, 37, 5, 5), 41, stride=(2, 2)),
    "several chunks": Layer((3, 3, 13, 11), 2),
    "several chunks of a class, not of another": Layer((3, 3, 13, 11), 2, stride=(2, 2)),
}


@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name: str, prologue: bool) -> None:
    check(replace(GEOMETRIES[name], prologue=prologue))


FLAGS = [
    *(
        Layer(stride=(2, 2), residual=r, relu=relu, emitted=e, grad_a=r == 1)
        for r, relu, e in itertools.product((0, 1, 2), (True, False), (False, True))
    ),
    *(
        Layer(residual=0, grad_a=False, training=t, gmask=m, need_dy=d, prologue=p)
        for t, m, d, p in itertools.product((True, False), repeat=4)
    ),
    Layer(deferred=False),
    Layer(deferred=False, stride=(2, 2), grad_a=False),
    Layer(deferred=False, need_dy=False, gmask=False, training=False, grad_a=False),
]


@pytest.mark.parametrize("layer", FLAGS, ids=str)
def test_flags(layer: Layer) -> None:
    check(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_narrow_types(stride: int, prologue: bool, dtype: torch.dtype) -> None:
    """With channels enough for the blocks that half types get, and with fewer than a vector."""
    for shape, k in (((2, 16, 9, 8), 24), ((3, 5, 6, 5), 7)):
        check(Layer(shape, k, stride=(stride, stride), prologue=prologue), dtype)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("residual", [0, 2])
def test_chunks_of_several_tiles(
    residual: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums merge over the tiles of a program, a class's last chunk being short or empty."""
    monkeypatch.setattr(_gemm, "MOST_PARTIALS", 8)
    layer = Layer((11, 6, 9, 7) if stride == 1 else (17, 6, 9, 7), 5, residual=residual)
    with _launch.recording() as launches:
        check(replace(layer, stride=(stride, stride)))
    v = next(x.arguments() for x in launches if "spatial" in x.name)
    assert v["tiles"] > 1 and v["LOOP"]
    assert layer.shape[0] * 63 // stride**2 % (v["tiles"] * v["BM"])


def launched(layer: Layer) -> list[_launch.Launch]:
    with _launch.recording() as launches:
        ours(layer, inputs(layer, Maker(torch.float64, CHANNELS_LAST)))
    return launches


def test_who_writes_dy() -> None:
    """The kernel, where a tap meets every output; else a light pass, whose dy it reads."""
    alone = ["conv_bn_spatial_dgrad_kernel"]
    both = ["batch_norm_bwd_kernel", *alone]
    for name, expected in (
        ("3x3", alone),
        ("3x3/2", alone),
        ("2x2, below and right", alone),
        ("3x3, dilated", alone),
        ("3x3/2, dilated: classes without a tap", alone),
        ("3x3, not padded", alone),
        ("1x1/3", alone),
        ("padded by more than the kernel", both),
        ("1x1, padded", both),
    ):
        layer = GEOMETRIES[name]
        assert [x.name for x in launched(layer)] == expected, name
        assert [x.name for x in launched(replace(layer, need_dy=False))] == alone, name
        assert [x.name for x in launched(replace(layer, prologue=False))] == both, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dy_is_that_of_the_light_pass(dtype: torch.dtype) -> None:
    """Every value of it, to the last digits, whatever tap and class it was written under."""
    for name in ("3x3", "3x3/2", "2x2/2, below and right", "3x1/1x2", "3x3/4x2, dilated by 2x3"):
        layer = GEOMETRIES[name]
        t = inputs(layer, Maker(dtype, CHANNELS_LAST))
        kernel, light = (ours(replace(layer, prologue=p), t)["dy"] for p in (True, False))
        torch.testing.assert_close(kernel, light, rtol=1e-6, atol=1e-6)


def test_weights_of_any_strides() -> None:
    t = inputs(layer := Layer(stride=(2, 2)), Maker(torch.float64, CHANNELS_LAST))
    truth, w = ours(layer, t), t["w"]
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 0, 1)):
        back = [order.index(d) for d in range(4)]
        found = ours(layer, t | {"w": w.permute(order).contiguous().permute(back)})
        assert all(torch.equal(found[name], truth[name]) for name in truth), order
    odd = Layer((2, 1, 5, 4), 3, kernel=(1, 3), padding=(0, 0, 1, 1))  # sides of 1: no stride
    t = inputs(odd, Maker(torch.float64, CHANNELS_LAST))
    truth = ours(odd, t)
    w = torch.as_strided(t["w"].contiguous(), t["w"].shape, (3, 77, 99, 1))
    assert torch.equal(ours(odd, t | {"w": w})["g_in"], truth["g_in"])


@pytest.mark.parametrize("stride", [1, 2])
def test_an_empty_batch(stride: int) -> None:
    layer = Layer((0, 5, 7, 6), stride=(stride, stride), training=False)
    found = ours(layer, inputs(layer, Maker(torch.float32, CHANNELS_LAST)))
    assert found["g_in"].shape == layer.shape and not found["sums"].any()


def test_results_do_not_rest_on_what_memory_held() -> None:
    """Outputs are poisoned: torch fills every empty tensor with NaN here."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        for name in (
            "3x3",
            "3x3/2",
            "2x2/3: pixels that no output reads",
            "1x1 maps: empty classes",
        ):
            check(GEOMETRIES[name])
            check(replace(GEOMETRIES[name], prologue=False))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_same_input_gives_the_same_bits(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gemm, "MOST_PARTIALS", 4)
    layer = Layer((4, 16, 11, 9), 24, stride=(stride, stride))
    t = inputs(layer, Maker(torch.float32, CHANNELS_LAST))
    first, second = ours(layer, t), ours(layer, t)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "r", "g", "grad_a", "y.bias"])
def test_nan_and_inf_spread_as_in_torch(where: str, value: float, prologue: bool) -> None:
    """With frozen statistics, where they do not reach everything at once. (A weight's reach the
    pixels, too, whose tap falls outside the map, as in any GEMM over a padded map.)
    """
    for stride, gmask in ((1, True), (2, False)):
        layer = Layer(
            (2, 8, 5, 4), 6, stride=(stride, stride), training=False, gmask=gmask,
            residual=1, prologue=prologue,
        )  # fmt: skip
        t = inputs(layer, Maker(torch.float32, CHANNELS_LAST))
        t[where][(-1,) * t[where].dim()] = value
        mine, theirs = ours(layer, t), eager(layer, t)
        for name, kind in itertools.product(
            ("g_in", "dy"), (torch.isnan, torch.isposinf, torch.isneginf)
        ):
            assert torch.equal(kind(mine[name]), kind(theirs[name])), (name, kind)


@pytest.mark.parametrize("training", [True, False])
def test_padding_stays_zero_beside_an_infinite_mean_gradient(training: bool) -> None:
    """Pixels that meet no output have no gradient, even where every dy is NaN."""
    layer = Layer(kernel=(2, 2), stride=(3, 3), padding=(2, 2, 2, 2), training=training)
    layer = replace(layer, residual=0, grad_a=False, relu=False)
    t = inputs(layer, Maker(torch.float64, CHANNELS_LAST))
    t["g"][:] = float("nan")
    t["y.bias"][:] = 100.0  # so that no NaN is masked
    mine, theirs = ours(layer, t)["g_in"], eager(layer, t)["g_in"]
    assert torch.equal(mine.isnan(), theirs.isnan()) and not theirs.isnan().all()


def test_what_rounds_to_zero_masks_gradients() -> None:
    """Below fp16's smallest number the activation is zero, whatever its sign was in fp32."""
    layer = Layer((2, 8, 4, 4), 6, residual=0, grad_a=False, training=False)
    t = inputs(layer, Maker(torch.float16, CHANNELS_LAST))
    up, *rest = operands(layer, t)
    ones, tiny = torch.ones(6), torch.full((6,), 1e-9)
    masked = up._replace(y=torch.zeros_like(up.y), mean=0 * ones, scale=ones, bias=tiny)
    dy = dgrad(masked, *rest).dy
    assert dy is not None and not dy.any()
    assert torch.equal(dgrad(masked._replace(bias=ones), *rest).dy, up.g)
    t["x"], t["x.running_mean"] = t["x"].abs() + 1, torch.zeros(8)
    t["x.weight"], t["x.bias"] = torch.full((8,), 1e-9), torch.zeros(8)
    found = ours(layer, t)
    assert not found["g_in"].any() and not found["sums"].any()


@pytest.mark.parametrize("stride", [1, 2])
def test_sums_are_of_the_rounded_gradient(stride: int) -> None:
    """Of a gradient that fp16 rounds by much more than sums in fp32 do."""
    layer = Layer((4, 8, 9, 9), 6, stride=(stride, stride))
    t = inputs(layer, Maker(torch.float16, CHANNELS_LAST))
    found = ours(layer, t)
    wide = found["g_in"].double()
    off = [o.double() for o in _off(layer, {k: v.double() for k, v in t.items()})]
    truth = torch.stack([_sum(wide), *(_sum(wide * o) for o in off)])
    torch.testing.assert_close(found["sums"].double(), truth, rtol=1e-5, atol=1e-5)
