"""The convolutions of any kernel size in Triton's interpreter; test_triton.py runs it in a process
of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from test_conv_bn import SOURCES
from torch import Tensor

from fusedres import Deferred, use_backend, use_plan
from fusedres._conv import Conv, Source, output_shape
from fusedres._tensors import INTERPRETED
from fusedres.ops import batch_norm, conv_bn
from fusedres.testing import (
    CHANNELS_LAST,
    Inputs,
    Maker,
    Outputs,
    assert_three_way,
    check_case,
    eager_batch_norm,
    norm_arguments,
    run,
)
from fusedres.triton_kernels import _gemm, _launch, _spatial
from fusedres.triton_kernels.device.conv_bn_rows import quotient, reciprocal

assert INTERPRETED, "run by test_triton.py"
KERNELS = ("conv_bn_spatial_fwd_kernel", "conv_bn_spatial_wgrad_kernel")


@dataclass(frozen=True)
class Window:
    """conv_bn with a kernel of any size, read through value(); `source` as test_conv_bn's Chain
    has it, but for batch_norm in the place of convolutions in front.
    """

    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # top, bottom, left, right
    dilation: tuple[int, int] = (1, 1)
    shape: tuple[int, int, int, int] = (2, 5, 6, 7)
    channels: int = 3
    source: str = "deferred_residual"
    relu: bool = True  # of the source
    out_relu: bool = True
    training: bool = True

    def __str__(self) -> str:
        default = Window()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return ",".join(f"{k}={v}".replace(" ", "") for k, v in changed.items()) or "default"

    def inputs(self, make: Maker) -> Inputs:
        c = self.shape[1]
        t = {"x": make.activation(*self.shape)}
        if self.source != "tensor":
            t |= make.norm("n0", c)
            with torch.no_grad():  # relu(bias) is not zero: padding would show
                t["n0.bias"].abs_().add_(0.5)
        if self.source.endswith("residual"):
            t["r"] = make.activation(*self.shape)
        if self.source == "deferred_residual":
            t |= make.norm("nr", c)
        t["w"] = make.weight(self.channels, c, *self.kernel)
        return t | make.norm("n", self.channels)

    def ours(self, t: Inputs) -> Outputs:
        x: Tensor | Deferred = t["x"]
        flags = {"training": self.training}
        if self.source != "tensor":
            residual: Any = t.get("r")
            if self.source == "deferred_residual":
                residual = batch_norm(t["r"], *norm_arguments(t, "nr"), relu=False, **flags)
            x = batch_norm(
                t["x"], *norm_arguments(t, "n0"), residual=residual, relu=self.relu, **flags
            )
        d = conv_bn(
            x, t["w"], *norm_arguments(t, "n"), stride=self.stride, padding=self.padding,
            dilation=self.dilation, relu=self.out_relu, **flags,
        )  # fmt: skip
        return {"value": d.value()}

    def eager(self, t: Inputs) -> Outputs:
        a = t["x"]
        if self.source != "tensor":
            a = eager_batch_norm(a, t, "n0", self.training)
            if self.source == "tensor_residual":
                a = a + t["r"]
            if self.source == "deferred_residual":
                a = a + eager_batch_norm(t["r"], t, "nr", self.training)
            a = a.relu() if self.relu else a
        top, bottom, left, right = self.padding
        a = F.pad(a, (left, right, top, bottom))
        y = F.conv2d(a, t["w"], None, self.stride, 0, self.dilation)
        value = eager_batch_norm(y, t, "n", self.training)
        return {"value": value.relu() if self.out_relu else value}


# every source with and without ReLU; then each geometry and each odd size with the richest source
WINDOWS = [
    *(Window(source=s) for s in SOURCES),
    *(Window(source=s, relu=False) for s in SOURCES[1:]),
    *(Window(source=s, stride=(2, 2), training=False) for s in SOURCES),
    Window(stride=(2, 2)),
    Window(stride=(2, 1)),
    Window((7, 7), (2, 2), (3, 3, 3, 3), shape=(1, 3, 11, 13), channels=5),
    Window((2, 2), padding=(0, 1, 1, 0)),
    Window((2, 2), (2, 2), padding=(1, 0, 0, 1), shape=(2, 5, 7, 5)),
    Window((1, 3), padding=(0, 0, 1, 1)),
    Window((3, 1), padding=(2, 0, 0, 0)),
    Window((5, 5), padding=(2, 2, 2, 2), shape=(1, 5, 6, 7)),
    Window(padding=(2, 2, 2, 2), dilation=(2, 2)),
    Window((3, 2), padding=(1, 3, 2, 0), dilation=(2, 3), shape=(2, 5, 8, 9)),
    Window((2, 2), padding=(3, 4, 3, 3)),  # windows with nothing in them but padding
    Window((1, 1), padding=(1, 1, 1, 1)),
    Window((1, 1), (3, 3), (0, 0, 0, 0)),
    Window((3, 3), (3, 3), (0, 0, 0, 0), shape=(2, 5, 9, 9)),
    Window((4, 3), padding=(0, 0, 0, 0), shape=(3, 5, 4, 3)),  # the map is one window
    Window(shape=(7, 5, 1, 1)),
    Window(shape=(1, 17, 5, 6), channels=19),  # one image, primes
    Window(shape=(3, 1, 5, 4), channels=2),
    Window(shape=(1, 8, 4, 4), channels=1),
    Window(shape=(1, 64, 4, 3), channels=33),  # a whole block of channels, one past a tile
    Window(shape=(2, 48, 4, 4), channels=40),  # vectors, but blocks of channels that are not full
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_equals_plain_pytorch(window: Window) -> None:
    """fp64, to 1e-10: outputs, running statistics, every gradient, by the kernels of this file."""
    with _launch.recording() as launches:
        check_case(window, "triton", torch.float64, CHANNELS_LAST, plan="fused")
    assert set(KERNELS) <= {launch.name for launch in launches}


LOWER = [
    *(Window(source=s) for s in SOURCES),
    Window((2, 2), (2, 2), padding=(1, 0, 0, 1), shape=(2, 5, 7, 5)),
    Window(padding=(2, 2, 2, 2), dilation=(2, 2), shape=(2, 24, 6, 6), channels=16),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("window", LOWER, ids=str)
def test_three_way(window: Window, dtype: torch.dtype) -> None:
    if dtype == torch.float16:  # masks flip by chance there
        window = replace(window, relu=False, out_relu=False)
    check_case(window, "triton", dtype, CHANNELS_LAST, plan="fused")


@pytest.mark.parametrize("relu", [False, True])
def test_the_activation_is_rounded_before_the_product(relu: bool) -> None:
    """fp16 forward and dw of the kernels, with ReLU, against fp64 of the rounded activation."""
    make = Maker(torch.float16, CHANNELS_LAST)
    x, w = make.activation(2, 16, 7, 6, grad=False), make.weight(24, 16, 3, 3).detach()
    dy = make.activation(2, 24, 7, 6, grad=False)
    vectors = (torch.randn(16), torch.rand(16) + 0.5, torch.rand(16))
    source, conv = Source(x, *vectors, *(None,) * 4, relu), Conv((1, 1), (1,) * 4, (1, 1), 1)
    mean, scale, bias = (v.view(1, -1, 1, 1) for v in vectors)
    a = (x.float() - mean) * scale + bias
    a = (a.relu() if relu else a).half()
    y = torch.empty_like(dy)
    _spatial.fwd(source, w, conv, y, None, False)
    truth = F.conv2d(a.double(), w.double(), padding=1)
    peer = F.conv2d(a, w, padding=1)
    assert_three_way("y", [y], [peer], [truth], torch.float32)  # half types' floor hides too much
    dw = _spatial.wgrad(source, dy, w, conv).sum(0).permute(0, 3, 1, 2)
    truth = torch.nn.grad.conv2d_weight(a.double(), w.shape, dy.double(), padding=1)
    torch.testing.assert_close(dw.double(), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("stride", [1, 2])
def test_chunks_of_several_tiles(source: str, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments merge over the tiles of a program, dw adds up over its steps and over the splits."""
    monkeypatch.setattr(_gemm, "MOST_PARTIALS", 2)
    monkeypatch.setattr(_gemm, "multiprocessors", lambda device: 18)
    window = Window(stride=(stride, stride), shape=(3 * stride, 6, 11, 8), source=source)
    with _launch.recording() as launches:
        check_case(window, "triton", torch.float64, CHANNELS_LAST, plan="fused")
    by_name = {launch.name: launch for launch in launches}
    fwd, wgrad = (by_name[name].arguments() for name in KERNELS)
    assert fwd["tiles"] > 1 and fwd["LOOP"] and fwd["M"] % fwd["BM"]
    assert triton.cdiv(fwd["M"], fwd["BM"]) % fwd["tiles"]  # the last chunk has fewer tiles
    assert wgrad["tiles"] > 1 and by_name[KERNELS[1]].grid[1] > 1


@pytest.mark.parametrize("source", ["tensor", "deferred_residual"])
def test_offsets_of_64_bits(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the images of one tile have 2^31 elements."""
    monkeypatch.setattr(_spatial, "_WIDE_MAP", 1)
    with _launch.recording() as launches:
        check_case(
            Window(source=source, stride=(2, 1)), "triton", torch.float64, CHANNELS_LAST,
            plan="fused",
        )  # fmt: skip
    wide = [launch.arguments()["WIDE"] for launch in launches if launch.name in KERNELS]
    assert len(wide) == 2 and all(wide)


def test_when_offsets_are_of_64_bits() -> None:
    """Where the images that the rows of a tile touch have 2^31 elements, and on long maps."""
    config = _gemm.Config(128, 64, 64, 4, 3)

    def wide(n: int, c: int, h: int, w: int, oh: int, ow: int) -> bool:
        return _spatial.is_wide(c * h * w, torch.empty(n, 8, oh, ow, device="meta"), config)

    assert not wide(256, 64, 112, 112, 112, 112)
    assert wide(2, 2**10, 2**10, 2**10, 2**10, 2**10)  # two images of 2^30
    assert not wide(2, 2**9, 2**10, 2**10, 2**10, 2**10)
    assert wide(128, 2**10, 2**7, 2**7, 1, 1)  # a row an image
    assert wide(1, 1, 1, 2**16, 1, 2**16)


@triton.jit
def _divide_kernel(t_ptr, d, out_ptr, WIDE: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out_ptr + i, quotient(tl.load(t_ptr + i), d, reciprocal(d), WIDE))


@pytest.mark.parametrize("wide", [False, True])
def test_the_quick_division_is_exact(wide: bool) -> None:
    """On both sides of multiples of sides up to the limit, as far as a tile reaches past one."""
    for d in (1, 2, 3, 5, 7, 14, 56, 127, 128, 641, 4097, 32749, _spatial._WIDE_MAP - 1):
        near = torch.arange(-8, 8)
        points = [k * d + near for k in (0, 1, 2, 3, 8, 512 // d)] + [d + 512 + near] * 2
        t = torch.cat(points).clamp(0, d + 511).int()
        found = torch.empty_like(t)
        _divide_kernel[(1,)](t, d, found, wide, t.numel())
        assert torch.equal(found, t // d), d


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "r", "w", "value"])
def test_nan_and_inf_spread_as_in_torch(where: str, value: float) -> None:
    """With frozen statistics; an infinite weight at the tap that never falls into the padding, as
    its product with a zero that is not there is a library's choice.
    """
    window = Window(source="tensor_residual", shape=(2, 5, 6, 5), training=False)

    def poisoned(function: Any) -> dict[str, Tensor]:
        t = window.inputs(Maker(torch.float32, CHANNELS_LAST))
        with torch.no_grad():
            if where in ("x", "r"):
                t[where][-1, -1, -1, -1] = value  # a corner, next to the padding
            if where == "w":
                t["w"][-1, -1, 1, 1] = value

        def outputs(inputs: Inputs) -> Outputs:
            out = function(inputs)["value"]
            if where == "value":
                out.register_hook(lambda grad: _poisoned(grad, value))
            return {"value": out}

        return dict(run(outputs, t))

    with use_backend("triton"), use_plan("fused"):
        ours = poisoned(window.ours)
    theirs = poisoned(window.eager)
    for name, true in theirs.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours[name]), kind(true)), (name, kind)


def _poisoned(grad: Tensor, value: float) -> Tensor:
    grad = grad.clone()
    grad[-1, -1, 2, 2] = value  # an inner pixel: all of its taps are in the map
    return grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_is_zero_whatever_the_statistics(value: float) -> None:
    """A window of nothing but padding gives 0 where a channel's mean is no number."""
    mean = torch.tensor([0.0, value, 0.0, 0.0])
    x = torch.randn(1, 4, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    source = Source(x, mean, torch.ones(4), torch.ones(4), *(None,) * 4, True)
    conv, w = Conv((1, 1), (4, 0, 0, 0), (1, 1), 1), torch.randn(2, 4, 3, 3)
    y = torch.empty(output_shape(x.shape, w.shape, conv)).contiguous(memory_format=CHANNELS_LAST)
    _spatial.fwd(source, w, conv, y, None, False)
    assert not y[:, :, :2].any()


def test_results_do_not_rest_on_what_memory_held() -> None:
    """Outputs are poisoned: torch fills every empty tensor with NaN here."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        for source in SOURCES:
            window = Window(source=source, stride=(2, 2), shape=(3, 6, 9, 8))
            check_case(window, "triton", torch.float64, CHANNELS_LAST, plan="fused")
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_same_input_gives_the_same_bits() -> None:
    window = Window(shape=(3, 16, 9, 9), channels=24)
    with use_backend("triton"), use_plan("fused"):
        first, second = (
            dict(run(window.ours, window.inputs(Maker(torch.float32, CHANNELS_LAST))))
            for _ in range(2)
        )
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize("channels", [1, 4])
def test_the_weight_may_have_any_strides(channels: int, kernel: tuple[int, int]) -> None:
    window = Window(kernel, shape=(2, channels, 5, 5), source="none")
    eager = dict(run(window.eager, window.inputs(Maker(torch.float64))))
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)):
        t = window.inputs(Maker(torch.float64))
        back = [order.index(i) for i in range(4)]
        w = t["w"].detach().permute(order).contiguous().permute(back)
        t["w"] = w.requires_grad_()
        with use_backend("triton"), use_plan("fused"):
            ours = dict(run(window.ours, t))
        for name, truth in eager.items():
            torch.testing.assert_close(ours[name], truth, rtol=1e-10, atol=1e-10, msg=name)
        assert ours["gradient of w"].stride() == t["w"].stride()


def test_empty_batch() -> None:
    window = Window(shape=(0, 5, 6, 7))
    t = window.inputs(Maker(torch.float32))
    with use_backend("triton"), use_plan("fused"):
        value = window.ours(t)["value"]
        value.sum().backward()
    assert value.shape == (0, 3, 6, 7)
    for name, x in t.items():
        if x.requires_grad:
            assert x.grad is not None and x.grad.shape == x.shape and not x.grad.any(), name
