"""conv_act's kernels in Triton's interpreter; test_triton.py runs it in a process of its own, with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres._conv import Conv
from fusedres._plan_table import Shape
from fusedres._tensors import INTERPRETED
from fusedres.testing import CHANNELS_LAST, Inputs, Maker, assert_three_way, error
from fusedres.triton_kernels import _configs, _gemm, _launch, _spatial
from fusedres.triton_kernels._configs import Config
from fusedres.triton_kernels.conv_act import conv_act, image, pack

assert INTERPRETED, "run by test_triton.py"
IMAGE, GEMM, SUM = (f"conv_act_{name}kernel" for name in ("image_", "", "sum_"))
SMALL = Config(16, 16, 16, 4, 1)
KERNELS = ("act", "act_stem")


@dataclass(frozen=True)
class Window:
    """One call of conv_act; `frames`: of a camera's uint8 [N, H, W, C]."""

    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # top, bottom, left, right
    dilation: tuple[int, int] = (1, 1)
    shape: tuple[int, int, int, int] = (2, 5, 6, 7)
    outs: int = 7
    given: tuple[str, ...] = ("scale", "bias", "residual")
    relu: bool = True
    frames: bool = False

    def __str__(self) -> str:
        default = Window()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return ",".join(f"{k}={v}".replace(" ", "") for k, v in changed.items()) or "default"

    @property
    def conv(self) -> Conv:
        return Conv(self.stride, self.padding, self.dilation, 1)

    @property
    def of_image(self) -> bool:
        return self.shape[1] <= 4 and self.dilation == (1, 1)

    def inputs(self, make: Maker) -> Inputs:
        n, c, h, w = self.shape
        t = {"x": make.activation(*self.shape, grad=False)}
        if self.frames:
            t["x"] = torch.randint(0, 256, (n, h, w, c), dtype=torch.uint8)
            t |= {"times": torch.rand(c) / 50 + 0.01, "plus": -torch.rand(c) - 1}
        t["weight"] = make.weight(self.outs, c, *self.kernel).detach()
        vectors = make.norm("n", self.outs)
        own = {"scale": vectors["n.weight"].detach(), "bias": vectors["n.bias"].detach()}
        own["scale"][::3] *= -1
        shape = self.plain(t | {"scale": None, "bias": None, "residual": None}).shape
        own["residual"] = make.activation(*shape, grad=False)
        return t | {name: v if name in self.given else None for name, v in own.items()}

    def ours(self, t: Inputs, **more: Any) -> Tensor:
        normalize = (t["times"], t["plus"]) if self.frames else None
        own = (t["scale"], t["bias"], t["residual"], self.relu)
        return conv_act(t["x"], t["weight"], self.conv, *own, normalize=normalize, **more)

    def plain(self, t: Inputs) -> Tensor:
        """In the weight's dtype."""
        x, dtype = t["x"], t["weight"].dtype
        if self.frames:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            x = x.to(wide) * t["times"].to(wide) + t["plus"].to(wide)
            x = x.to(dtype).permute(0, 3, 1, 2)
        top, bottom, left, right = self.padding
        x = F.pad(x, (left, right, top, bottom))
        u = F.conv2d(x, t["weight"], None, self.stride, 0, self.dilation)
        if t["scale"] is not None:
            u = u * t["scale"].view(-1, 1, 1).to(dtype)
        if t["bias"] is not None:
            u = u + t["bias"].view(-1, 1, 1).to(dtype)
        u = u if t["residual"] is None else u + t["residual"]
        return u.relu() if self.relu else u


def check(window: Window) -> list[_launch.Launch]:
    """fp64 to 1e-10, by one launch, or two of a divided reduction, beside an image's copy."""
    t = window.inputs(Maker(torch.float64, CHANNELS_LAST))
    with _launch.recording() as launches:
        y = window.ours(t)
    truth = window.plain(t)
    assert y.is_contiguous(memory_format=CHANNELS_LAST) and y.shape == truth.shape
    torch.testing.assert_close(y, truth, rtol=1e-10, atol=1e-10)
    gemm = launches[window.of_image]
    wanted = [IMAGE] * window.of_image + [GEMM] + [SUM] * gemm.arguments()["SPLIT"]
    assert [launch.name for launch in launches] == wanted
    assert gemm.arguments()["SPLIT"] == (gemm.grid[1] > 1)
    return launches


def taking(splits: int) -> Any:
    """Small blocks, and reductions divided by so many."""
    return _configs.trying(dict.fromkeys(KERNELS, replace(SMALL, programs=splits)))


EPILOGUES = [
    Window((1, 1), padding=(0, 0, 0, 0), given=given, relu=relu)
    for relu in (False, True)
    for given in (
        *((), ("scale",), ("bias",), ("residual",), ("scale", "bias"), ("scale", "residual")),
        *(("bias", "residual"), ("scale", "bias", "residual")),
    )
]
NONE = (0, 0, 0, 0)
WINDOWS = [
    Window(),
    Window((1, 1), padding=NONE, shape=(2, 40, 5, 7), outs=33),
    Window((1, 1), (2, 2), NONE, shape=(3, 17, 6, 7)),
    Window((1, 1), (2, 1), NONE, shape=(3, 17, 6, 7)),
    Window((1, 1), (3, 3), NONE),
    Window((1, 1), (2, 2), (1, 1, 1, 1)),  # outputs that read nothing but padding
    Window(stride=(2, 2), shape=(3, 5, 9, 8)),
    Window(stride=(3, 2), padding=NONE, shape=(2, 5, 9, 9)),
    Window((2, 2), padding=(0, 1, 1, 0)),
    Window((2, 2), (2, 2), (1, 0, 0, 1), shape=(2, 5, 7, 5)),
    Window((4, 4), (4, 4), NONE, shape=(2, 5, 8, 8)),
    Window((1, 3), padding=(0, 0, 1, 1)),
    Window((3, 1), padding=(2, 0, 0, 0)),
    Window((5, 5), padding=(2, 2, 2, 2), shape=(1, 5, 6, 7)),
    Window((7, 7), (2, 2), (3, 3, 3, 3), shape=(1, 5, 9, 8)),
    Window(padding=(2, 2, 2, 2), dilation=(2, 2)),
    Window((3, 2), padding=(1, 3, 2, 0), dilation=(2, 3), shape=(2, 5, 8, 9)),
    Window(padding=(2, 2, 2, 2), dilation=(2, 2), shape=(2, 3, 6, 7)),  # few channels, no image
    Window((2, 2), padding=(3, 4, 3, 3)),
    Window((4, 3), padding=NONE, shape=(3, 5, 4, 3)),  # the map is one window
    Window(shape=(70, 5, 1, 1)),
    Window(shape=(1, 32, 4, 3), outs=33),  # whole blocks of channels, one past a tile
    Window(shape=(1, 64, 4, 3), outs=64),
    Window(shape=(1, 8, 4, 4), outs=1),
]
STEMS = [
    *(Window((7, 7), (2, 2), (3,) * 4, shape=(2, c, 11, 13), outs=9) for c in (1, 2, 3, 4)),
    Window((7, 7), (2, 2), (2, 3, 3, 2), shape=(1, 3, 12, 10), outs=40),
    Window((3, 3), shape=(2, 3, 6, 7)),
    Window((3, 3), (3, 2), (1, 0, 0, 2), shape=(2, 3, 7, 9)),
    Window((4, 4), (4, 4), NONE, shape=(2, 3, 8, 8)),  # rows of a window need no filling
    Window((8, 8), (5, 4), NONE, shape=(1, 4, 14, 13)),  # and some pixels no window reads
    Window((11, 17), (4, 4), (2,) * 4, shape=(1, 3, 19, 23)),  # a row in several blocks
    Window((1, 1), padding=NONE, shape=(2, 4, 5, 3)),
    Window((1, 1), (2, 2), NONE, shape=(2, 2, 5, 5)),
    Window((2, 5), padding=(0, 1, 4, 0), shape=(2, 1, 5, 6)),
]


@pytest.mark.parametrize("window", [*EPILOGUES, *WINDOWS, *STEMS], ids=str)
def test_equals_plain_pytorch(window: Window) -> None:
    check(window)


@pytest.mark.parametrize("window", STEMS, ids=str)
def test_frames(window: Window) -> None:
    """A camera's bytes, normalised on the way."""
    check(replace(window, frames=True))


LOWER = [
    Window((1, 1), padding=NONE, shape=(2, 40, 5, 7), outs=33),
    Window(stride=(2, 2), shape=(2, 24, 7, 6), outs=16),
    Window((2, 2), (2, 2), (1, 0, 0, 1), shape=(2, 5, 7, 5), relu=False),
    replace(STEMS[2], shape=(2, 3, 15, 13)),
    replace(STEMS[2], frames=True),
]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("window", LOWER, ids=str)
def test_three_way(window: Window, dtype: torch.dtype, splits: int) -> None:
    """And as near as the rounded truth: one rounding, at the end."""
    ours, peers, truths, rounded = [], [], [], []
    for seed in range(3):
        torch.manual_seed(seed)
        t = window.inputs(Maker(dtype, CHANNELS_LAST, seed=seed))
        wide = {
            n: v.double() if v is not None and v.dtype != torch.uint8 else v for n, v in t.items()
        }
        with taking(splits):
            ours.append(window.ours(t))
        peers.append(window.plain(t))
        truths.append(window.plain(wide))
        rounded.append(truths[-1].to(dtype))
    assert_three_way("y", ours, peers, truths, dtype)
    if not window.frames:
        for mine, best, truth in zip(ours, rounded, truths, strict=True):
            assert error(mine, truth) <= 1.02 * error(best, truth) + 1e-6


def test_the_image_is_zero_where_nothing_is() -> None:
    """Around it after normalisation, and in channels that it has not; inside, to the bit."""
    times, plus = torch.tensor([1 / 64, 1 / 32, -1 / 128]), torch.tensor([-1.5, 2.0, -0.25])
    frames = torch.randint(0, 256, (2, 5, 6, 3), dtype=torch.uint8)
    weight = torch.empty(8, 3, 3, 3)
    conv = Conv((2, 2), (1, 2, 3, 0), (1, 1), 1)
    values = frames * times + plus
    torch.use_deterministic_algorithms(True)  # empty memory is NaN
    try:
        for dtype in (torch.float64, torch.float32, torch.float16):
            w = weight.to(dtype)
            given = values.to(dtype).permute(0, 3, 1, 2).contiguous(memory_format=CHANNELS_LAST)
            copies = [image(frames, w, conv, (times, plus)), image(given, w, conv, None)]
            truth = torch.zeros_like(copies[0])
            truth[:, 1:6, 3:9, :3] = values.to(dtype)
            assert all(torch.equal(copy, truth) for copy in copies) and truth.size(2) % 4 == 0
        plain = image(frames, weight, conv, None)
        assert torch.equal(plain[:, 1:6, 3:9, :3], frames.float())
    finally:
        torch.use_deterministic_algorithms(False)


def test_frames_equal_the_normalised_image_to_the_bit() -> None:
    window = replace(STEMS[2], frames=True)
    t = window.inputs(Maker(torch.float16, CHANNELS_LAST))
    t["times"], t["plus"] = torch.full((3,), 1 / 64), torch.tensor([-1.5, -2.0, 0.25])
    values = (t["x"] * t["times"] + t["plus"]).half().permute(0, 3, 1, 2)
    given = t | {"x": values.contiguous(memory_format=CHANNELS_LAST)}
    assert torch.equal(window.ours(t), replace(window, frames=False).ours(given))


def test_rows_of_an_image_wider_than_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedres.triton_kernels import conv_act as host

    monkeypatch.setattr(host, "_LINE", 16)
    launches = check(replace(STEMS[2], frames=True))
    assert launches[0].grid[1] > 1


SPLIT = [  # and its steps in blocks of 16 channels
    (Window((2, 2), padding=(1, 0, 0, 1), shape=(2, 40, 4, 5), outs=17), 12),
    (Window((1, 1), padding=NONE, shape=(1, 100, 4, 5), outs=17, given=("bias",)), 7),
    (Window((7, 7), (2, 2), (3,) * 4, shape=(1, 3, 11, 13), outs=17), 7),
    (Window((2, 2), padding=(1, 0, 0, 1), shape=(1, 32, 4, 5), outs=17), 8),  # without masks of C
    (Window((1, 1), padding=NONE, shape=(1, 8, 4, 5)), 1),
]


@pytest.mark.parametrize("splits", range(1, 15))
@pytest.mark.parametrize(("window", "steps"), SPLIT, ids=str)
def test_a_divided_reduction(window: Window, steps: int, splits: int) -> None:
    """By any number of programs, in which none is without a step."""
    each = -(-steps // splits)
    taken = -(-steps // each)
    with taking(splits):
        gemm = check(window)[window.of_image]
    assert gemm.grid[1] == taken <= steps and gemm.arguments()["each"] == each


def test_the_rule_of_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs enough for the device, not more, and four steps for each of them."""
    monkeypatch.setattr(_gemm, "multiprocessors", lambda device: 132)
    cpu = torch.device("cpu")
    for steps, programs, wanted in (
        *((72, 8, (5, 15)), (72, 56, (36, 2)), (72, 67, (72, 1)), (72, 200, (72, 1))),
        *((7, 1, (7, 1)), (8, 1, (4, 2)), (16, 16, (4, 4)), (1, 1, (1, 1)), (0, 1, (1, 1))),
    ):
        each, splits = _gemm.divided(steps, programs, SMALL, cpu)
        assert (each, splits) == wanted, (steps, programs)
        assert splits == 1 or programs * splits <= 132


def test_the_rule_divides_here() -> None:
    """In the interpreter, whose device has two multiprocessors: one tile, and steps enough."""
    assert check(Window(shape=(1, 8, 4, 4)))[0].grid == (1, 2)


@pytest.mark.parametrize("splits", [1, 3])
def test_offsets_of_64_bits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the images of one tile have 2^31 elements."""
    monkeypatch.setattr(_spatial, "_WIDE_MAP", 1)
    with taking(splits):
        for window in (Window(stride=(2, 1)), STEMS[2]):
            gemm = check(window)[window.of_image]
            assert gemm.arguments()["WIDE"] and gemm.grid[1] == splits


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration(kernel: str, arch: int) -> None:
    window = Window(shape=(1, 24, 5, 6), outs=40) if kernel == "act" else STEMS[4]
    shape = Shape(window.shape[1], window.outs, window.kernel, window.stride)
    configs = _configs.candidates(kernel, shape, arch)
    assert len(set(configs)) == len(configs) > 5
    for config in configs:
        with _configs.trying({kernel: replace(config, programs=1)}):
            check(window)


POISON = [
    Window(given=("scale", "bias", "residual")),
    Window((1, 1), padding=NONE),
    replace(STEMS[2], shape=(2, 3, 10, 9)),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "weight", "scale", "bias", "residual"])
@pytest.mark.parametrize("window", POISON, ids=str)
def test_nan_and_inf_spread_as_in_torch(window: Window, where: str, value: float) -> None:
    """An infinite weight stands at a tap that never falls into the padding, whose product with a
    zero that is not there is a library's choice.
    """
    for splits, corner in product((1, 3), (0, -1)):
        t = window.inputs(Maker(torch.float32, CHANNELS_LAST))
        place = (corner,) * t[where].dim()
        if where == "weight":
            place = (corner, corner, window.kernel[0] // 2, window.kernel[1] // 2)
        t[where][place] = value
        if where == "scale":  # infinity by zero is no number, in whatever order
            t["x"].fill_(1.0)
        with taking(splits):
            ours = window.ours(t)
        theirs = window.plain(t)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours), kind(theirs)), kind


def test_results_do_not_rest_on_what_memory_held() -> None:
    """torch fills every empty tensor with NaN here."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        for splits, window in product((1, 3), (*WINDOWS[:7], *STEMS[:4])):
            with taking(splits):
                check(window)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_same_input_gives_the_same_bits(splits: int) -> None:
    """Whichever way the grid is walked, and with a weight that was packed before."""
    for window in (Window(shape=(2, 24, 5, 5)), STEMS[2], replace(STEMS[2], frames=True)):
        t = window.inputs(Maker(torch.float32, CHANNELS_LAST))
        packed = pack(t["weight"], window.conv)
        with taking(splits), _launch.recording() as launches:
            found = [window.ours(t), window.ours(t), window.ours(t, packed=packed)]
        assert all(torch.equal(found[0], other) for other in found[1:])
        ways = {launch.arguments()["down"] for launch in launches if launch.name == GEMM}
        assert ways == {0, 1}
