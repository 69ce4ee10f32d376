"""conv_act: the three-way rule, NaN, packed weights, and the errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import _plan_table, backends, use_backend, use_plan
from fusedres._conv import Conv
from fusedres._tensors import INTERPRETED, per_channel, stat_dtype, stored_format
from fusedres.library import conv_act as library
from fusedres.ops import conv_act
from fusedres.testing import (
    CHANNELS_LAST,
    CONTIGUOUS,
    HALF_TYPES,
    Maker,
    assert_three_way,
    serves,
    serving_backends,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = serving_backends()
WAYS = [(b, p) for b in BACKENDS for p in ("fused", "split")]
WAYS = [(b, p) for b, p in WAYS if p == "split" or "conv_act" in backends.BACKENDS[b].fuses]


@dataclass(frozen=True)
class Layer:
    """One convolution and what is behind it."""

    shape: tuple[int, int, int, int] = (2, 16, 9, 7)
    filters: int = 24
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    scaled: bool = True
    biased: bool = True
    joined: bool = True
    relu: bool = True

    def __str__(self) -> str:
        default = Layer()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return ",".join(f"{k}={v}" for k, v in changed.items()) or "default"

    def inputs(self, make: Maker) -> dict[str, Any]:
        k, norm = self.filters, make.norm("n", self.filters)
        t: dict[str, Any] = {"x": make.activation(*self.shape, grad=False)}
        t["weight"] = make.weight(k, self.shape[1] // self.groups, *self.kernel).detach()
        t["scale"] = norm["n.weight"].detach() if self.scaled else None
        t["bias"] = norm["n.bias"].detach() if self.biased else None
        out = self.plain(t | {"residual": None}).shape
        t["residual"] = make.activation(*out, grad=False) if self.joined else None
        return t

    def conv(self) -> Conv:
        return Conv(self.stride, self.padding, self.dilation, self.groups)

    def options(self) -> dict[str, Any]:
        names = ("relu", "stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    def plain(self, t: dict[str, Any]) -> Tensor:
        """What a user of plain PyTorch has: a convolution, a frozen BatchNorm, an add, a ReLU."""
        top, bottom, left, right = self.padding
        x, stride = F.pad(t["x"], (left, right, top, bottom)), self.stride
        if self.conv().gives_a_column(t["x"].shape, t["weight"].shape):  # see there
            x, stride = x[..., : self.kernel[1]], (stride[0], 1)
        y = F.conv2d(x, t["weight"], None, stride, 0, self.dilation, self.groups)
        wide = y.to(stat_dtype(y.dtype))  # as a BatchNorm computes
        wide = wide if t["scale"] is None else wide * per_channel(t["scale"])
        wide = wide if t["bias"] is None else wide + per_channel(t["bias"])
        y = wide.to(y.dtype)
        y = y if t["residual"] is None else y + t["residual"]
        return y.relu() if self.relu else y


LAYERS = [
    Layer(),
    Layer(kernel=(1, 1), padding=(0, 0, 0, 0)),
    Layer((2, 32, 8, 8), 64, (1, 1), (2, 2), (0, 0, 0, 0), joined=False),
    Layer((2, 3, 23, 20), 16, (7, 7), (2, 2), (3, 3, 3, 3), joined=False),
    Layer((1, 1, 12, 9), 5, (5, 2), (2, 3), (0, 2, 1, 0)),  # an odd padding
    Layer(dilation=(2, 3), padding=(2, 2, 3, 3), stride=(2, 1)),
    Layer((3, 5, 6, 7), 11),  # no multiple of anything
    Layer((2, 8, 9, 2), 6, stride=(2, 2)),  # a column, where oneDNN's bf16 fails
    Layer((1, 16, 1, 1), 8, (1, 1), padding=(0, 0, 0, 0)),
    Layer(scaled=False, joined=False),
    Layer(biased=False, relu=False),
    Layer(scaled=False, biased=False, joined=False, relu=False),
    Layer(scaled=False, biased=False),
]
GROUPED = [Layer(groups=4), Layer((2, 8, 7, 7), 8, groups=8, joined=False)]


def pooled(layer: Layer, way: tuple[str, str], dtype: torch.dtype, order: Any) -> None:
    """The three-way rule, over several draws in half types."""
    seeds = range((2 if INTERPRETED else 4) if dtype in HALF_TYPES else 1)
    drawn = [layer.inputs(Maker(torch.float64, order, seed=s)) for s in seeds]
    truth = [layer.plain(t) for t in drawn]
    own = [layer.inputs(Maker(dtype, order, seed=s)) for s in seeds]
    peers = [layer.plain(t) for t in own]
    with use_backend(way[0]), use_plan(way[1]):
        ours = [conv_act(**t, **layer.options()) for t in own]
    assert_three_way(str(layer), ours, peers, truth, dtype)
    for y, t in zip(ours, own, strict=True):
        expected = CHANNELS_LAST if INTERPRETED else stored_format(t["x"])
        assert y.is_contiguous(memory_format=expected) and y.dtype == t["x"].dtype


@pytest.mark.parametrize("order", [CHANNELS_LAST, CONTIGUOUS], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [*LAYERS, *GROUPED], ids=str)
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_against_fp64(way: tuple[str, str], layer: Layer, dtype: torch.dtype, order: Any) -> None:
    if serves(way[0], "conv_act", dtype):
        pooled(layer, way, dtype, order)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "weight", "scale", "bias", "residual"])
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_nan_and_inf_spread_as_in_torch(way: tuple[str, str], where: str, value: float) -> None:
    """oneDNN's ReLU would make zero of NaN. An infinite scale in the weight is another sum."""
    if (where, way[1]) == ("scale", "split") and value == value and way[0] != "reference":
        return
    layer = Layer((2, 8, 5, 6), 8, (3, 3), padding=(0, 0, 0, 0))  # which a GEMM would multiply
    t = layer.inputs(Maker(torch.float32, CHANNELS_LAST))
    t[where][(-1,) * t[where].dim()] = value
    with use_backend(way[0]), use_plan(way[1]):
        ours = conv_act(**t, **layer.options())
    true = layer.plain(t)
    assert not true.isfinite().all() or value < 0
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(ours), kind(true)), kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layer", LAYERS[:8], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_packed_once(layer: Layer, batch: int, dtype: torch.dtype) -> None:
    """Packed for any batch, the numbers are those of a call; a residual is taken over if it may."""
    layer = replace(layer, shape=(batch, *layer.shape[1:]))
    t = layer.inputs(Maker(dtype, CHANNELS_LAST))
    parts = t["weight"], layer.conv(), t["scale"], t["bias"]
    one = library.pack(t["x"][:1], *parts) if batch == 1 else library.pack(t["x"][:2], *parts)
    residual, relu = t["residual"], layer.relu
    whole = library.conv_act(t["x"], *parts, residual, relu)
    before = None if residual is None else residual.clone()
    ours = library.run(t["x"], one, residual, relu)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours, whole, rtol=tolerance, atol=tolerance)
    if residual is not None:
        assert torch.equal(residual, before)
        taken = library.run(t["x"], one, residual, relu, into=True)
        assert torch.equal(taken, ours)


def test_without_the_librarys_epilogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a torch that is built without oneDNN."""
    monkeypatch.setattr(library, "_onednn_serves", lambda dtype: False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layer in LAYERS:
            t = layer.inputs(Maker(dtype, CHANNELS_LAST))
            one = library.pack(t["x"], t["weight"], layer.conv(), t["scale"], t["bias"])
            assert one.fused == ""
        pooled(LAYERS[0], ("reference", "split"), dtype, CHANNELS_LAST)
        if serves("cpp", "conv_act", dtype):
            for layer in LAYERS:
                pooled(layer, ("cpp", "split"), dtype, CHANNELS_LAST)


def test_cudnns_epilogue_is_given_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two functions in plain torch: order of arguments, and what it is not asked for."""
    called: list[str] = []

    def conv_relu(x, weight, bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
        called.append("relu")
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def conv_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
        called.append("add_relu")
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z)

    fake = SimpleNamespace(
        cudnn_convolution_relu=conv_relu,
        cudnn_convolution_add_relu=conv_add_relu,
        convolution=library.aten.convolution,
    )
    monkeypatch.setattr(library, "aten", fake)
    monkeypatch.setattr(library, "_fused_by", lambda x, conv: "cudnn" * conv.even_padding())
    for layer in [*LAYERS, *GROUPED]:
        t = layer.inputs(Maker(torch.float64, CHANNELS_LAST))
        parts = t["weight"], layer.conv(), t["scale"], t["bias"]
        for inputs in (t, t | {"residual": None}):
            called.clear()
            ours = library.conv_act(t["x"], *parts, inputs["residual"], layer.relu)
            torch.testing.assert_close(ours, layer.plain(inputs), rtol=1e-12, atol=1e-12)
            expected = ["add_relu" if inputs["residual"] is not None else "relu"]
            assert called == expected * (layer.relu and layer.conv().even_padding())


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_an_empty_batch(way: tuple[str, str]) -> None:
    layer = Layer((0, 16, 9, 7))
    with use_backend(way[0]), use_plan(way[1]):
        y = conv_act(**layer.inputs(Maker(torch.float32)), **layer.options())
    assert y.shape == (0, 24, 9, 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    layer = Layer()
    t = layer.inputs(Maker(torch.float32))
    with use_backend(backend), torch.autocast("cpu", torch.float16):
        if serves(backend, "conv_act", torch.float16):
            y = conv_act(**t, **layer.options())
            assert y.dtype == torch.float16
            torch.testing.assert_close(y.float(), layer.plain(t), rtol=2e-2, atol=2e-2)


def test_gradients_are_refused_but_by_the_reference() -> None:
    layer = Layer()
    for name in ("x", "weight", "scale", "bias", "residual"):
        t = layer.inputs(Maker(torch.float32))
        t[name].requires_grad_()
        with use_backend("reference"):
            conv_act(**t, **layer.options()).sum().backward()
        assert t[name].grad is not None
        if "cpp" in BACKENDS:
            with (
                use_backend("cpp"),
                pytest.raises(RuntimeError, match=f"no backward, and {name} requires"),
            ):
                conv_act(**t, **layer.options())
            with use_backend("cpp"), torch.no_grad():
                conv_act(**t, **layer.options())


def test_the_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is silent the library's epilogue is taken, if there is one; else our kernel."""
    on_gpu = backends.Choice("triton", "auto", "", "cuda")
    weight, conv = torch.empty(64, 32, 1, 1), Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)
    out = (8, 64, 10, 10)

    def plan(choice: backends.Choice = on_gpu, fuses: bool = True, shape: Any = out) -> str:
        return backends.inference_plan_of(choice, torch.bfloat16, weight, conv, shape, fuses)

    assert (plan(), plan(fuses=False)) == ("split", "fused")
    assert plan(replace(on_gpu, plan="fused")) == "fused"
    assert plan(replace(on_gpu, plan="epilogue")) == "fused"
    assert plan(replace(on_gpu, plan="split+keep"), fuses=False) == "split"
    assert plan(replace(on_gpu, plan="fused_1x1")) == "fused"
    assert plan(replace(on_gpu, light="")) == "fused"  # asked for by name
    assert plan(backends.Choice("cpp", "auto", "", "cpp")) == "split"
    entry = {
        "device": "cpu", "dtype": "bfloat16", "in_channels": 32, "out_channels": 64,
        "kernel": [1, 1], "stride": [1, 1], "rows": [0, 800], "inference": "fused",
    }  # fmt: skip
    _plan_table.check(entry)
    monkeypatch.setattr(_plan_table, "entries", lambda: [entry])
    _plan_table.reload()
    try:
        assert (plan(), plan(shape=(9, *out[1:])), plan(shape=None)) == ("fused", "split", "split")
    finally:
        monkeypatch.undo()
        _plan_table.reload()
    with pytest.raises(ValueError, match="inference must be fused or split, got 'epilogue'"):
        _plan_table.check(entry | {"inference": "epilogue"})


def test_errors_name_the_argument() -> None:
    layer = Layer()
    t = layer.inputs(Maker(torch.float32))

    def refuses(error: type[Exception], match: str, **changed: Any) -> None:
        with pytest.raises(error, match=match):
            conv_act(**{**t, **layer.options(), **changed})

    refuses(TypeError, "x must be a Tensor, got NoneType", x=None)
    refuses(TypeError, "x must be float32, float16.* got torch.uint8", x=t["x"].byte())
    refuses(ValueError, r"x must be \[N, C, H, W\], got shape \[16, 9, 7\]", x=t["x"][0])
    refuses(ValueError, "weight has 16 input channels", x=t["x"][:, :5])
    refuses(TypeError, "weight must be torch.float32 as x, got torch.float64",
            weight=t["weight"].double())  # fmt: skip
    refuses(ValueError, r"scale must have shape \[24\], got \[23\]", scale=t["scale"][1:])
    refuses(ValueError, r"bias must have shape \[24\], got \[1\]", bias=t["bias"][:1])
    refuses(ValueError, "residual must have shape", residual=t["residual"][:1])
    refuses(TypeError, "residual must be torch.float32", residual=t["residual"].double())
    refuses(TypeError, "relu must be a bool", relu=1)
    refuses(ValueError, "does not fit the padded input", x=t["x"][..., :0])
    refuses(ValueError, "stride must be at least 1", stride=0)
    refuses(ValueError, "scale is on meta", scale=t["scale"].to("meta"))
