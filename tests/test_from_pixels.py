"""FromPixels: the step in front of a network that takes pixels."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from keras_models import assert_images_count, calmed, make, narrowed
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fusedres
from fusedres import freeze, models
from fusedres.nn import FromPixels
from fusedres.nn.frozen import FrozenModule

MEAN = (123.68, 116.779, 103.939)


@pytest.fixture(autouse=True, scope="module")
def _narrow() -> Iterator[None]:
    with narrowed(blocks=1):
        yield


def images() -> Tensor:
    return torch.randint(256, (2, 41, 47, 3), dtype=torch.uint8)


def network(mean: tuple[float, ...] = MEAN) -> Any:
    model: Any = calmed(make()).eval()
    with torch.no_grad():
        model.conv1.weight /= 100
    model.from_pixels = FromPixels(mean)
    return model


def truth_of(model: Any, frames: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The network behind a subtraction by hand."""
    plain = copy.deepcopy(model).to(dtype)
    plain.from_pixels = None
    mean = torch.tensor(model.from_pixels.values, dtype=torch.float64).view(-1, 1, 1)
    with torch.no_grad():
        logits: Tensor = plain((frames.permute(0, 3, 1, 2).double() - mean).to(dtype))
    assert_images_count(logits)
    return logits


def close(ours: Tensor, truth: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == truth.shape
    assert (ours.double() - truth.double()).abs().max() < tolerance * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_rounded_once(dtype: torch.dtype) -> None:
    """Also where the network is of a half type, which has no 123.68."""
    step = nn.Sequential(FromPixels(MEAN)).to(dtype)
    frames = images()
    pixels = frames.permute(0, 3, 1, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    truth = (pixels.to(wide) - torch.tensor(MEAN, dtype=wide).view(-1, 1, 1)).to(dtype)
    for x in (frames, pixels.to(dtype), pixels.to(dtype).contiguous()):
        out = step(x)
        assert torch.equal(out, truth) and out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(FromPixels((0, 0, 0)).to(dtype)(frames), pixels.to(dtype))


def test_it_is_no_part_of_a_state_dict() -> None:
    model = network()
    assert [*model.state_dict()] == [*make().state_dict()]
    assert next(iter(dict(model.named_children()))) == "from_pixels"
    assert make().from_pixels is None and "from_pixels" not in dict(make().named_children())
    tables = [str(models.summary(m, (64, 64, 3))) for m in (model, make())]
    assert tables[0] == tables[1]
    assert repr(model.from_pixels) == "FromPixels(123.68, 116.779, 103.939)"


def test_copies_moves_and_pickles() -> None:
    model, frames = network(), images()
    truth = truth_of(model, frames)
    with torch.no_grad():
        close(copy.deepcopy(model)(frames), truth)
        close(pickle.loads(pickle.dumps(model))(frames), truth)
        back = copy.deepcopy(model).half().double()
        assert torch.equal(
            back.from_pixels(frames), copy.deepcopy(model).double().from_pixels(frames)
        )
        close(copy.deepcopy(model).double()(frames), truth, 1e-12)
        close(fusedres.unfuse(model)(frames), truth)
        close(fusedres.fuse(fusedres.unfuse(model))(frames), truth)
        close(model.to("cpu").requires_grad_(False)(frames), truth)
        assert model.to("meta").from_pixels.mean.is_meta
        assert model.to_empty(device="cpu").from_pixels.mean[1] == torch.tensor(MEAN)[1]


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_it_is_trained_behind(backend: str) -> None:
    """A training step of pixels is that of what the step makes of them."""
    ours, frames = network().double().train(), images()
    plain = copy.deepcopy(ours)
    plain.from_pixels = None
    x = ours.from_pixels(frames)
    with fusedres.use_backend(backend):
        ours(frames).square().sum().backward()
        plain(x).square().sum().backward()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(ours.float().eval()(frames), plain.float().eval()(x.float()))


@pytest.mark.parametrize("frozen", [False, True], ids=["as it is", "frozen"])
def test_compiled_and_exported(frozen: bool) -> None:
    model = network().double()
    model = freeze(model) if frozen else model
    frames = images()
    with torch.no_grad():
        truth = truth_of(network(), frames)
        for x in (frames, frames.permute(0, 3, 1, 2).double()):
            close(torch.export.export(model, (x,)).module()(x), truth, 1e-9)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        close(compiled(frames), truth, 1e-9)
        assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("mean", [MEAN, (0.0, 0.0, 0.0)], ids=["mean", "none"])
def test_frozen(mean: tuple[float, ...]) -> None:
    model, frames = network(mean), images()
    truth = truth_of(model, frames)
    frozen: Any = freeze(model)
    assert isinstance(frozen, FrozenModule) and isinstance(frozen.from_pixels, FromPixels)
    assert all(row.runs == "fused" for row in fusedres.report(frozen))
    pixels = frames.permute(0, 3, 1, 2)
    with torch.no_grad():
        for x in (frames, pixels.float(), pixels.float().contiguous(), frames):
            close(frozen(x), truth)
        close(pickle.loads(pickle.dumps(frozen))(frames), truth)
        close(freeze(frozen)(frames), truth)
        close(freeze(model, dtype=torch.float64)(frames), truth, 1e-12)
        half = freeze(model, dtype=torch.bfloat16)
        close(half(frames), truth, 0.1)
        assert torch.equal(half(frames), half(pixels.bfloat16()))
        with pytest.raises(ValueError, match=r"uint8 images must be \[N, H, W, 3\], got"):
            frozen(frames[..., :2])
        with pytest.raises(ValueError, match=r"pixels must be \[N, 3, H, W\], got"):
            frozen(pixels.float()[:, :2])
        with pytest.raises(TypeError, match=r"must be torch.float32 as the weights or uint8"):
            frozen(pixels.int())
        outer = freeze(nn.Sequential(model, nn.Softmax(1)))
        close(outer(frames), truth.softmax(1))
    for taken in (model, nn.Sequential(model)):
        name = type(taken).__name__
        with pytest.raises(ValueError, match=f"{name} takes pixels already, by its from_pixels"):
            freeze(taken, mean=MEAN, std=(1.0, 1.0, 1.0))


def test_errors() -> None:
    for given, error, message in (
        (1.0, TypeError, "must be a number for each channel, got 1.0"),
        ("abc", TypeError, "got 'abc'"),
        ((True, 1.0), TypeError, "got "),
        ((), ValueError, "of 1 channel or more"),
        ((float("nan"),), ValueError, "must be finite"),
    ):
        with pytest.raises(error, match=message):
            FromPixels(given)  # type: ignore[arg-type]
    step = FromPixels(MEAN)
    for x, kind, message in (
        (
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            ValueError,
            r"uint8 \[N, H, W, 3\], got \[2, 3",
        ),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), ValueError, r"got \[8, 8, 3\]"),
        (torch.zeros(2, 8, 8, 3), ValueError, r"\[N, 3, H, W\], got \[2, 8, 8, 3\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), TypeError, "got torch.int64"),
    ):
        with pytest.raises(kind, match=message):
            step(x)
