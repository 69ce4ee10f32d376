"""freeze: numbers against evaluation mode, what stays as it was, state_dicts, copies, changes made
later, and what sends a call to the plain modules. Models of other packages: test_peers.py.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from test_fuse import MODELS, Layer, Small, conv, image, made
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.utils import prune

import fusedres
from fusedres import freeze, fuse, report, use_backend
from fusedres.library import conv_act as library
from fusedres.models import stages
from fusedres.nn import frozen as frozen_module
from fusedres.nn.frozen import FrozenModule
from fusedres.nn.graphs import Graphs
from fusedres.testing import assert_three_way, serving_backends
from fusedres.training import Checkpoint, Recipe, load, train
from fusedres.training.preprocess import unit

BACKENDS = serving_backends()
FASTEST = BACKENDS[-1]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """With statistics and affine maps as training leaves them, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            for t, low, high in (
                (m.running_mean, -0.3, 0.3),
                (m.running_var, 0.5, 1.5),
                (m.weight, 0.5, 1.5),
                (m.bias, -0.3, 0.3),
            ):
                with torch.no_grad():
                    if t is not None:
                        t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)
    return model.eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: fusedres.resnet18(7),
    "resnet50": lambda: fusedres.FusedResNet50(7),
    "keras": lambda: fusedres.FusedResNet50(7, variant="keras"),
    "coursera": lambda: fusedres.FusedResNet50(6, variant="coursera"),
    "grouped": lambda: fusedres.FusedResNet50(7, groups=32, width_per_group=4),
    "dilated": lambda: fusedres.FusedResNet50(7, replace_stride_with_dilation=(False, True, True)),
    "fused": lambda: fuse(Small()),
    "plain": Small,
}


def close(ours: Any, truth: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


# --- numbers --------------------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of few channels and blocks."""
    monkeypatch.setattr(stages, "_PLANES", (16, 16, 24, 32))
    for depth in (18, 50):
        monkeypatch.setitem(stages._DEPTHS, depth, (1, 2, 1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_variants_against_evaluation_mode(name: str, dtype: torch.dtype, narrow: None) -> None:
    test_against_evaluation_mode(name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["resnet50"])
def test_against_evaluation_mode(name: str, dtype: torch.dtype) -> None:
    """Error against fp64 at most twice that of plain evaluation mode in the same dtype."""
    torch.manual_seed(0)
    model = moved(NETWORKS[name]())
    frozen = freeze(model, dtype=dtype)
    assert isinstance(frozen, FrozenModule) and isinstance(frozen, nn.Module)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    ours, peer, truth = [], [], []
    with torch.no_grad():
        for batch in (1, 3, 3):
            x = torch.randn(batch, 3, 64, 96)
            truth.append(copy.deepcopy(model).double()(x.double()))
            peer.append(fusedres.unfuse(copy.deepcopy(model)).to(dtype)(x.to(dtype)))
            ours.append(frozen(x.to(dtype)))
    assert_three_way(name, ours, peer, truth, dtype)
    assert all(row.runs == "fused" for row in report(frozen)) or dtype == torch.float16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_models_of_ones_own(name: str, backend: str) -> None:
    """Also what is no ResNet: sums that broadcast, gates, nested blocks."""
    model, x = moved(made(name)), image(name)
    frozen = freeze(model)
    with use_backend(backend), torch.no_grad():
        for batch in (x, x[:1], x[:0], x.contiguous(memory_format=torch.channels_last)):
            out, truth = frozen(batch), model(batch)
            close(out, truth)
            order = fusedres._tensors.stored_format(batch)
            assert out.dim() != 4 or out.is_contiguous(memory_format=order)


class Aliases(nn.Module):
    """Residuals that somebody else still has: a view, the input, an output, a dropout's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (Layer(8, 8, 1, relu=False) for _ in range(5))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x) + x)
        kept = self.dropout(h)  # in evaluation mode h itself
        h = F.relu(self.b(h) + h)
        i = F.relu(self.c(h) + kept)
        view = i[:, 2:]
        j = F.relu(self.d(i) + i)
        k = F.relu(self.e(j) + x)
        return torch.cat([k, view, kept, h, j], 1)


class ReadAgain(Aliases):
    """Residuals that are no input of their convolution: one a call has kept, one is read again."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        kept = self.dropout(h)
        i = F.relu(self.c(F.relu(self.b(h))) + h)
        j = F.relu(self.e(F.relu(self.d(i))) + i)
        return torch.cat([kept, F.relu(self.b2(F.relu(self.a2(j))) + i)], 1)

    def __init__(self) -> None:
        super().__init__()
        self.a2, self.b2 = Layer(8, 8, 1, relu=False), Layer(8, 8, 1, relu=False)


@pytest.mark.parametrize("of", [Aliases, ReadAgain])
def test_no_residual_is_overwritten_that_somebody_has(of: type[nn.Module]) -> None:
    for dtype in (torch.float64, torch.float32):
        model = moved(of()).to(dtype)
        x = torch.randn(2, 8, 6, 5, dtype=dtype)
        before, frozen = x.clone(), freeze(model)
        with torch.no_grad():
            for _ in range(2):
                close(frozen(x), model(x), 1e-9 if dtype == torch.float64 else 1e-4)
        assert torch.equal(x, before)


class Others(nn.Module):
    """Convolutions with a bias, without a BatchNorm, with one that tracks nothing, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.biased, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.alone = nn.Conv2d(8, 8, 1)
        self.untracked, self.bn2 = conv(8, 8), nn.BatchNorm2d(8, track_running_stats=False)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.reflected = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.bn3, self.bn4 = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.biased(x)))
        h = F.relu(self.alone(h) + h)
        h = self.bn2(self.untracked(h))
        h = self.twice(self.twice(h))
        return self.bn4(self.bn3(self.reflected(h)))


def test_convolutions_of_all_kinds() -> None:
    model, x = moved(Others()).double(), torch.randn(2, 3, 9, 8).double()
    frozen = freeze(model)
    with torch.no_grad():
        close(frozen(x), model(x))
    rows = {row.name: row for row in report(frozen)}
    assert {n for n, row in rows.items() if row.runs == "fused"} == {"biased", "alone", "untracked"}
    assert rows["twice"].reason == "twice is called more than once"
    assert "pads by 'reflect'" in rows["reflected"].reason
    kinds = [type(m) for m in (frozen.bn, frozen.bn2, frozen.bn3)]
    assert kinds == [nn.Identity, nn.BatchNorm2d, nn.BatchNorm2d]


class Shared(nn.Module):
    """One convolution in two places, with a BatchNorm of its own in each; not to be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(self.first[0], nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) if float(x.sum()) > 1e9 else self.first(self.second(x))


def test_a_convolution_of_two_places_is_folded_twice() -> None:
    model = moved(Shared()).double()
    model.second[1].weight.data.mul_(3)
    x = torch.randn(2, 4, 6, 6).double()
    frozen = freeze(model)
    assert not isinstance(frozen, FrozenModule)  # it looks at its input
    assert [isinstance(m, FrozenModule) for m in (frozen.first, frozen.second)] == [True] * 2
    assert frozen.state_dict().keys() >= {"first.0.weight", "second.0.weight"}
    with torch.no_grad():
        close(frozen(x), model(x))


def test_no_image_is_too_odd(narrow: None) -> None:
    """Views, crops, a batch of none, sizes in turn: nothing bound for one is used for another."""
    model = moved(fusedres.resnet18(4)).double()
    frozen, big = freeze(model), torch.randn(5, 3, 90, 80).double()
    shapes = [big[:2, :, :64, :64], big[1:2, :, ::2, 5:69], big[:, :, :33, :34], big[:0], big[3:]]
    with torch.no_grad():
        for x in [*shapes, *(s.contiguous() for s in shapes), *shapes]:
            close(frozen(x), model(x))


@pytest.mark.slow
def test_digits_are_taken_for_the_same(tmp_path: Path) -> None:
    """By a trained network: every picture in fp32, as good as every one in bf16."""
    pytest.importorskip("sklearn")
    run = train("digits", tmp_path, Recipe(epochs=3), model="resnet18", progress=False)
    assert run.test_accuracy > 0.9
    found = Checkpoint.load(tmp_path)
    model, normal = found.model(), found.preprocess
    pictures = load("digits").test
    frames = pictures.read(range(len(pictures)))
    with torch.inference_mode():
        for dtype, least in ((torch.float32, 1.0), (torch.bfloat16, 0.99)):
            frozen = freeze(model, dtype=dtype, mean=normal.mean, std=normal.std)
            x = normal(unit(frames))
            plain = fusedres.unfuse(copy.deepcopy(model)).to(dtype)(x.to(dtype)).argmax(1)
            for images in (frames, x.to(dtype)):
                same = (frozen(images).argmax(1) == plain).float().mean()
                assert same >= least, (dtype, images.dtype, same)


# --- what stays, what is kept, what comes back ----------------------------------------------------


def test_the_original_stays_as_it_was(narrow: None) -> None:
    model = moved(fusedres.resnet18(4)).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = freeze(model, dtype=torch.bfloat16)
    with torch.no_grad():
        frozen(torch.randn(2, 3, 64, 64).bfloat16())
    frozen.to(torch.float64)
    with torch.no_grad():
        for p in frozen.parameters():
            p.zero_()
    assert model.training and all(p.requires_grad for p in model.parameters())
    found = model.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    assert {row.runs for row in report(model)} == {"fused"}
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert not pointers & {t.data_ptr() for t in frozen.state_dict().values()}


def test_a_state_dict_is_loaded_without_the_original(narrow: None) -> None:
    x = torch.randn(2, 3, 64, 64)
    first = freeze(moved(fusedres.resnet18(4)))
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    second = freeze(fusedres.resnet18(4))
    with torch.no_grad():
        before = second(x)
        second.load_state_dict(torch.load(stream, weights_only=True))
        assert torch.equal(second(x), first(x)) and not torch.equal(before, second(x))
    names = first.state_dict()
    assert "layer1.0.conv1.bias" in names and not any("bn" in n or "running" in n for n in names)


def test_copies_and_pickles() -> None:
    frozen, x = (
        freeze(moved(fuse(Small())), mean=(0.5,) * 3, std=(0.2,) * 3),
        torch.randn(2, 3, 48, 48),
    )
    frames = torch.randint(256, (2, 40, 40, 3), dtype=torch.uint8)
    with torch.no_grad():
        truth, of_frames = frozen(x), frozen(frames)
        stream = io.BytesIO()
        torch.save(frozen, stream)
        stream.seek(0)
        for again in (
            copy.deepcopy(frozen),
            pickle.loads(pickle.dumps(frozen)),
            torch.load(stream, weights_only=False),
            freeze(frozen, mean=(0.5,) * 3, std=(0.2,) * 3),
            copy.deepcopy(copy.deepcopy(frozen)),
        ):
            assert isinstance(again, FrozenModule) and isinstance(again, Small)
            assert type(again).__mro__.count(FrozenModule) == 1
            assert torch.equal(again(x), truth) and torch.equal(again(frames), of_frames)
            next(again.parameters()).zero_()
            assert not torch.equal(again(x), truth) and torch.equal(frozen(x), truth)


def test_slices_and_replicas_are_plain() -> None:
    model = moved(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4))).double()
    frozen, x = freeze(model), torch.randn(2, 3, 9, 9).double()
    with torch.no_grad():
        close(frozen[:3](x), model[:3](x))
        close(frozen[3](frozen[:3](x)), frozen(x))
        replica = frozen._replicate_for_data_parallel()
        replica._modules = {k: copy.deepcopy(m) for k, m in frozen._modules.items()}
        replica._modules["0"].weight.zero_()
        assert torch.equal(replica(x), replica.forward_plainly(x))
        assert not torch.equal(replica(x), frozen(x))
        close(frozen(x), model(x))
        close(frozen[:3].float()(x.float()), model[:3].float()(x.float()), 1e-4)


def test_another_dtype_packs_anew(narrow: None) -> None:
    model = moved(fusedres.resnet18(4))
    frozen, x = freeze(model), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wide = frozen(x)
        half = frozen.to(torch.bfloat16)(x.bfloat16())
        assert torch.equal(half, freeze(model, dtype=torch.bfloat16)(x.bfloat16()))
        assert half.dtype == torch.bfloat16
        again = frozen.to(torch.float32)(x)
        close(again, wide, 0.1)
        assert not torch.equal(again, wide)  # the weights were rounded


def test_weights_and_modules_that_change_are_noticed() -> None:
    model = moved(fusedres.resnet18(4)).double()
    x = torch.randn(2, 3, 64, 64).double()

    def scaled(m: Any) -> None:
        m.layer1[0].conv1.weight.mul_(1.5)

    def another_weight(m: Any) -> None:
        m.layer2[0].conv1.weight = nn.Parameter(m.layer2[0].conv1.weight * 2, requires_grad=False)

    def another_convolution(m: Any) -> None:
        old = m.layer2[1].conv2
        m.layer2[1].conv2 = nn.Conv2d(128, 128, 1).double().requires_grad_(False)
        assert old is not m.layer2[1].conv2

    def another_block(m: Any) -> None:
        m.layer3[1] = nn.Identity()

    def another_head(m: Any) -> None:
        m.fc = nn.Linear(512, 3).double()

    def data(m: Any) -> None:
        m.conv1.bias.data = m.conv1.bias.data + 1
        m.conv1.bias.add_(1)

    frozen = freeze(model)
    for change in (scaled, another_weight, another_convolution, another_block, another_head, data):
        with torch.no_grad():
            before = frozen(x)
            change(frozen)
            ours = frozen(x)
            close(ours, frozen.forward_plainly(x))
        assert ours.shape != before.shape or not torch.equal(ours, before), change.__name__
    frozen.layer4 = nn.Sequential(nn.Flatten(), nn.LazyLinear(7))  # and no longer to be followed
    frozen.avgpool, frozen.fc = nn.Identity(), nn.Identity()
    with torch.no_grad():
        frozen.layer4.double()(torch.randn(2, 256, 4, 4).double())
        assert frozen(x).shape == (2, 7)


class Reading(nn.Module):
    """A forward that reads what may change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = Layer(4, 4), nn.ModuleList([Layer(4, 4), Layer(4, 4)])
        self.flag, self.gains, self.extra = True, [2.0], None
        self.tail = nn.Sequential(conv(4, 4), nn.ReLU(), nn.MaxPool2d(3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) * self.gains[0] if self.flag else self.first(x)
        for block in self.blocks:
            h = block(h)
        h = self.tail(h if self.extra is None else self.extra(h))
        return h + torch.rand_like(h) if self.training else h


def test_what_a_forward_reads_may_change() -> None:
    def plain(**options: Any) -> nn.Module:
        return nn.Conv2d(4, 4, 1, **options).requires_grad_(False)

    changes: list[Callable[[Any], object]] = [
        lambda m: setattr(m, "flag", False),
        lambda m: m.gains.__setitem__(0, 3.0),
        lambda m: setattr(m, "extra", plain()),
        lambda m: m.blocks.append(plain()),
        lambda m: m.tail.append(nn.Sigmoid()),
        lambda m: setattr(m, "blocks", nn.ModuleList([plain()])),
        lambda m: setattr(m.first.convolution, "stride", (2, 2)),
        lambda m: setattr(m.first.convolution, "padding", (0, 0)),
        lambda m: setattr(m.tail[2], "stride", 1),
        lambda m: setattr(m.first.convolution, "bias", None),
        lambda m: setattr(m.tail[0], "bias", nn.Parameter(torch.ones(4), requires_grad=False)),
        lambda m: setattr(m.first.convolution.weight, "data", torch.ones(4, 4, 3, 3)),
        lambda m: m.first.bfloat16().float(),  # a part of it: the rounding stays
        lambda m: nn.utils.parametrizations.weight_norm(m.first.convolution),
        lambda m: prune.random_unstructured(m.first.convolution, "weight", 0.5),
        lambda m: (setattr(m, "flag", False), m.load_state_dict(m.state_dict())),
    ]
    x = torch.randn(2, 4, 10, 10)
    for i, change in enumerate(changes):
        frozen = freeze(moved(Reading()))
        with torch.no_grad():
            before = frozen(x)
            change(frozen)
            ours = frozen(x)
            close(ours, frozen.forward_plainly(x), 1e-5)
        assert ours.shape != before.shape or not torch.equal(ours, before), i
    frozen = freeze(moved(nn.Sequential(Reading(), nn.ReLU())))
    with torch.no_grad():
        assert torch.equal(frozen(x), frozen(x))
        frozen[0].train()
        assert not torch.equal(frozen(x), frozen(x))


def test_weights_written_to_in_inference_mode() -> None:
    frozen, x = freeze(moved(Reading())), torch.randn(2, 4, 10, 10)
    with torch.inference_mode():
        frozen.to(torch.float64).to(torch.float32)
        frozen(x)
        frozen.load_state_dict({k: v * 2 for k, v in frozen.state_dict().items()})
        close(frozen(x), frozen.forward_plainly(x), 1e-4)


def test_what_is_bound_while_weights_move_is_forgotten() -> None:
    """As by another thread that calls it meanwhile."""
    frozen, x = freeze(moved(Reading())), torch.randn(2, 4, 10, 10)

    def moves(t: Tensor) -> Tensor:
        frozen(x)
        return t * 2

    with torch.no_grad():
        frozen._apply(moves)
        close(frozen(x), frozen.forward_plainly(x), 1e-4)
        assert len(frozen._frozen._bound) == 1


class Kept(nn.Module):
    """Its modules in a list of its own; weights that it reads beside, and that hooks compute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv(4, 4), nn.BatchNorm2d(4), nn.ReLU()
        self.order = [self.conv, self.bn, self.relu]
        self.read, self.bn2 = conv(4, 4), nn.BatchNorm2d(4)
        self.asked, self.bn3 = conv(4, 4), nn.BatchNorm2d(4)
        self.pruned, self.bn4 = conv(4, 4), nn.BatchNorm2d(4)
        prune.random_unstructured(self.pruned, "weight", 0.5)
        self.normed, self.bn5 = nn.utils.weight_norm(conv(4, 4)), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.order:
            x = module(x)
        x = F.conv2d(self.bn2(self.read(x)), self.read.weight, padding=1)
        x = self.bn3(self.asked(x)) * self.bn3.weight.mean() + self.bn3.eps
        return self.bn5(self.normed(self.bn4(self.pruned(x))))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_what_is_seen_from_elsewhere_is_not_folded_away() -> None:
    with torch.no_grad():  # of what is computed deepcopy takes no other
        model, x = moved(Kept().double()), torch.randn(2, 4, 9, 9).double()
    frozen = freeze(model)
    assert isinstance(frozen, FrozenModule)
    with torch.no_grad():
        close(frozen(x), model(x))
        close(frozen.forward_plainly(x), model(x))
    assert type(frozen.bn) is nn.Identity and frozen.order[1] is frozen.bn
    reasons = {row.name: row.reason for row in report(frozen) if row.runs == "plain"}
    assert "computes its weight" in reasons["pruned"] and "computes" in reasons["normed"]


class Tied(nn.Module):
    """One weight in convolutions that differ in bias and dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.b.weight = self.c.weight = self.a.weight
        self.c.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tied_weights_are_packed_for_each_convolution(dtype: torch.dtype) -> None:
    model, x = Tied().to(dtype), torch.randn(2, 4, 9, 9, dtype=dtype)
    with torch.no_grad():
        close(freeze(model)(x), model(x), 1e-5)


class Shrinking(nn.Module):
    """The size of what its second convolution gets depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Layer(4, 4), Layer(4, 4), Layer(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(self.b(h[..., torch.nonzero(x[0, 0, 0]).flatten()]))


def test_shapes_that_depend_on_values() -> None:
    model = moved(Shrinking())
    frozen = freeze(model)
    assert isinstance(frozen, FrozenModule)
    for zeros in (0, 3, 0, 5):
        x = torch.randn(2, 4, 9, 9)
        x[0, 0, 0, :zeros] = 0
        with torch.no_grad():
            close(frozen(x), model(x), 1e-5)


class Modes(nn.Module):
    """It turns autocast off for a part of it, or on."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.layer, self.on = Layer(4, 4), on

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.on):
            return self.layer(x.float())


def test_autocast_within_a_forward() -> None:
    for on in (False, True):
        model, x = moved(Modes(on)), torch.randn(2, 4, 9, 9)
        frozen = freeze(model)
        assert isinstance(frozen.layer, FrozenModule)
        for outside in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=outside):
                ours, truth = frozen(x), model(x)
            assert ours.dtype == truth.dtype
            close(ours, truth, 0.05)


def test_autocast_is_part_of_what_is_bound() -> None:
    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Layer(3, 4), Layer(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.softmax(self.a(x), 1))

    model = moved(Soft())
    frozen = freeze(model, mean=(0.5,) * 3, std=(0.2,) * 3)
    frames = torch.randint(256, (2, 9, 9, 3), dtype=torch.uint8)
    for on in (False, True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=on):
            ours = frozen(frames)
            truth = frozen.forward_plainly(frozen._frozen.plain_input(frozen, frames))
        assert ours.dtype == truth.dtype
        close(ours, truth, 0.05 if on else 1e-5)
    half, x = freeze(model, dtype=torch.bfloat16), torch.randn(2, 3, 9, 9).bfloat16()
    for on in (False, True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=on):
            close(half(x), half.forward_plainly(x), 0.05)
    assert all(key[3] in (True, False) for key in half._frozen._bound) and half._frozen._bound


# --- where the plain modules run ------------------------------------------------------------------


def test_gradients_where_they_are_wanted() -> None:
    model = moved(Small()).double()
    frozen, x = freeze(model), torch.randn(2, 3, 32, 32).double()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outs = [m(leaf) for m, leaf in zip((frozen, model), leaves, strict=True)]
    close(outs[0], outs[1])
    grads = [torch.autograd.grad(o.sum(), leaf)[0] for o, leaf in zip(outs, leaves, strict=True)]
    close(grads[0], grads[1])
    assert not frozen(x).requires_grad
    frozen.layer1.requires_grad_()
    frozen(x).sum().backward()
    assert frozen.layer1[0].conv1.weight.grad.any() and frozen.layer1[0].conv1.bias.grad.any()
    frozen.requires_grad_(False)
    frozen.fc = nn.Linear(32, 3).double()  # as for a probe of what was learnt
    frozen(x).sum().backward()
    assert frozen.fc.weight.grad.any()


def test_hooks_see_tensors() -> None:
    model = moved(Small()).double()
    frozen, x = freeze(model), torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        truth = frozen(x)
        seen: list[Tensor] = []
        handle = frozen.layer1[0].conv2.register_forward_hook(lambda m, a, out: seen.append(out))
        close(frozen(x), truth)
        assert len(seen) == 1
        handle.remove()
        frozen(x)
        assert len(seen) == 1
        frozen.layer2[0].relu.forward = lambda h: h * 0  # as tools that patch one do
        assert not torch.equal(frozen(x), truth)
        del frozen.layer2[0].relu.forward
        close(frozen(x), truth)
        outer = frozen.register_forward_hook(lambda m, a, out: out + 1)
        close(frozen(x), truth + 1)
        outer.remove()
        everywhere = nn.modules.module.register_module_forward_hook(lambda *a: seen.append(a[2]))
        frozen(x)
        everywhere.remove()
        assert len(seen) > 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_goes_through(dtype: torch.dtype, value: float) -> None:
    """oneDNN's ReLU would make zeros of it."""
    model = moved(Small()).to(dtype)
    frozen, x = freeze(model), torch.randn(2, 3, 32, 32).to(dtype)
    with torch.no_grad():
        frozen(x)
        x[1, 2, 16, 16] = value
        ours, truth = frozen(x), model(x)
        assert torch.equal(ours.isnan(), truth.isnan()) and truth.isnan().any()
        frozen.conv1.weight[0] = float("nan")
        assert frozen(x[:1]).isnan().all()


def test_training_mode_is_that_of_the_modules() -> None:
    frozen, x = (
        freeze(moved(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Dropout(0.5)))),
        torch.ones(2, 3, 8, 8),
    )
    with torch.no_grad():
        assert torch.equal(frozen(x), frozen(x))
        frozen.train()
        assert not torch.equal(frozen(x), frozen(x))
        frozen.eval()
        assert torch.equal(frozen(x), frozen(x))


def test_transforms_and_subclasses() -> None:
    model = moved(Small()).double()
    frozen, x = freeze(model), torch.randn(3, 3, 32, 32).double()
    with torch.no_grad(), forward_ad.dual_level():
        frozen(x)
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        ours, true = (forward_ad.unpack_dual(m(dual)).tangent for m in (frozen, model))
        close(ours, true)
    with torch.no_grad():
        close(torch.func.vmap(lambda i: frozen(i[None])[0])(x), model(x))
    close(
        torch.func.jacrev(lambda i: frozen(i).sum())(x),
        torch.func.jacrev(lambda i: model(i).sum())(x),
    )


def test_autocast_and_inference_mode(narrow: None) -> None:
    model = moved(fusedres.resnet18(4))
    frozen, x = freeze(model), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            ours, plain = frozen(x), model(x)
        assert ours.dtype == plain.dtype == torch.bfloat16
        close(ours, plain, 0.05)
        wide = frozen(x)
    assert wide.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(frozen(x), wide)
    with torch.inference_mode():
        made_there, y = freeze(model), frozen.to(torch.float64)(x.double())
    with torch.no_grad():
        assert torch.equal(made_there(x), wide)
        close(frozen(x.double()), y)


def test_compiled_and_exported_it_is_plain_ops() -> None:
    model = moved(Small()).double()
    frozen = freeze(model, mean=(0.5,) * 3, std=(0.25,) * 3)
    x = torch.randn(2, 3, 32, 32).double()
    frames = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(frozen, backend=counter, fullgraph=True)
    with torch.no_grad():
        close(compiled(x), model(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()
    for images in (x, frames):
        exported = torch.export.export(frozen, (images,))
        targets = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
        assert any("conv2d" in t for t in targets)
        assert not any("fusedres" in t or "batch_norm" in t or "mkldnn" in t for t in targets)
        with torch.no_grad():
            close(exported.module()(images), frozen(images))


# --- images of uint8 ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frames_as_they_are(dtype: torch.dtype, narrow: None) -> None:
    """Normalised, then padded with zeros: borders count most where the map is small."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = moved(fusedres.resnet18(4))
    frozen = freeze(model, dtype=dtype, mean=mean, std=std)
    frames = torch.randint(256, (3, 40, 50, 3), dtype=torch.uint8)
    frames[0], frames[1] = 0, 255

    def normalised(dtype: torch.dtype) -> Tensor:
        x = frames.permute(0, 3, 1, 2).to(dtype) / 255
        m, s = (torch.tensor(v, dtype=dtype).view(-1, 1, 1) for v in (mean, std))
        return (x - m) / s

    with torch.no_grad():
        truth = copy.deepcopy(model).double()(normalised(torch.float64))
        plain = fusedres.unfuse(copy.deepcopy(model)).to(dtype)(normalised(torch.float32).to(dtype))
        ours = frozen(frames)
        assert_three_way("frames", [ours], [plain], [truth], dtype)
        crop = torch.randint(256, (2, 60, 60, 3), dtype=torch.uint8)[:, 3:43, 5:55]
        assert torch.equal(frozen(crop), frozen(crop.contiguous()))
        assert frozen(normalised(torch.float32).to(dtype)).shape == (3, 4)  # as without


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_by_each_backend(backend: str) -> None:
    """Also where its kernel reads the image itself, and where others want it too."""
    mean, std = (0.4, 0.5), (0.3, 0.2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Layer(2, 4, 5, stride=2), Layer(2, 4, 1, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    frames = torch.randint(256, (2, 11, 12, 2), dtype=torch.uint8)
    m, s = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
    x = (frames.permute(0, 3, 1, 2).double() / 255 - m) / s
    for made_of in (
        lambda: Layer(2, 4, 5, stride=2),
        lambda: nn.Sequential(Layer(2, 3), Layer(3, 4)),
        Twice,
    ):
        model = moved(made_of()).double()
        frozen = freeze(model, mean=mean, std=std)
        with use_backend(backend), torch.no_grad():
            for batch in (slice(0, 2), slice(1, 2), slice(0, 0)):
                close(frozen(frames[batch]), model(x[batch]))
            wide = torch.zeros(2, 20, 20, 2, dtype=torch.uint8)
            wide[:, 3:14, 4:16] = frames
            close(frozen(wide[:, 3:14, 4:16]), model(x))


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_threads_give_the_bits_of_one(dtype: torch.dtype, narrow: None) -> None:
    """Also while it is bound for the first time, for several shapes at once."""
    state = moved(fusedres.resnet18(4)).state_dict()
    images = [torch.randn(1 + i % 3, 3, 64, 64 + 32 * (i % 2)).to(dtype) for i in range(24)]

    def loaded() -> nn.Module:
        model = fusedres.resnet18(4)
        model.load_state_dict(state)
        return freeze(model, dtype=dtype)

    with torch.no_grad():
        one = loaded()
        truth = [one(x) for x in images]
    shared, start = loaded(), threading.Barrier(8)

    def work(thread: int) -> list[tuple[int, Tensor]]:
        start.wait()
        own = loaded() if thread % 4 == 0 else shared
        order = range(thread, thread + len(images))
        with torch.inference_mode():
            return [(i % len(images), own(images[i % len(images)])) for i in order]

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(work, range(8)):
            for i, y in found:
                assert torch.equal(y, truth[i]), i


# --- CUDA graphs, their bookkeeping ---------------------------------------------------------------


class Replayed:
    """Stands in for a recorded graph: input and output stay where they are."""

    made: ClassVar[list[Replayed]] = []

    def __init__(self, run: Callable[[Tensor], Any], x: Tensor) -> None:
        self.run, self.x, self.retired, self.busy = run, x.clone(), False, threading.Lock()
        self.out = run(self.x)
        Replayed.made.append(self)

    def replay(self, x: Tensor) -> Any:
        assert self.busy.acquire(blocking=False), "two at once"
        self.x.copy_(x)
        self.out.copy_(self.run(self.x))
        result = self.out.clone()
        self.busy.release()
        return result

    def retire(self) -> None:
        self.retired = True


def test_graphs_are_kept_for_the_last_shapes() -> None:
    Replayed.made = []
    graphs = Graphs(3, Replayed)

    def double(t: Tensor) -> Tensor:
        return t * 2

    for size in (4, 5, 6, 4, 5, 7, 4, 6):
        x = torch.randn(size)
        assert torch.equal(graphs.run(size, double, x), x * 2)
    assert [len(g.x) for g in Replayed.made] == [4, 5, 6, 7, 6]
    assert [g.retired for g in Replayed.made] == [False, True, True, False, False]

    def work(seed: int) -> bool:
        x = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        return all(torch.equal(graphs.run(4, double, x), x * 2) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))

    def tripled(t: Tensor) -> Tensor:  # another run by a known key: weights changed meanwhile
        return t * 3

    x = torch.randn(4)
    assert torch.equal(graphs.run(4, tripled, x), x * 3) and len(graphs._recorded) == 3
    held = weakref.ref(tripled)
    del tripled
    Replayed.made.pop().run = None  # type: ignore[assignment]
    gc.collect()
    assert held() is not None  # its memory is what a replay reads
    graphs.forget()
    gc.collect()
    assert held() is None
    assert all(g.retired for g in Replayed.made)


def test_a_graph_is_recorded_anew_where_any_tensor_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a stand-in for a GPU: a graph holds the addresses of all that it reads."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(frozen_module, "_on_gpu", lambda x: True)
    frozen, x = freeze(moved(Small()), cuda_graph=True), torch.randn(2, 3, 32, 32)
    frozen._frozen._graphs = Graphs(8, Replayed)
    Replayed.made = []
    with torch.no_grad():
        close(frozen(x), frozen.forward_plainly(x), 1e-4)
        frozen(x)
        assert len(Replayed.made) == 1
        frozen.fc.weight = nn.Parameter(frozen.fc.weight * 2, requires_grad=False)
        close(frozen(x), frozen.forward_plainly(x), 1e-4)
        assert len(Replayed.made) == 2 and Replayed.made[0].retired
        frozen(x[:1])
        frozen(torch.randn(2, 3, 32, 32))
        assert len(Replayed.made) == 3


def test_cuda_graph_needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cuda_graph=True needs a CUDA device"):
            freeze(Small(), cuda_graph=True)


# --- backends, errors -----------------------------------------------------------------------------


def test_the_backend_in_force_runs() -> None:
    frozen, x = freeze(moved(Small())), torch.randn(2, 3, 32, 32)
    for backend in (*BACKENDS, *BACKENDS):
        with use_backend(backend), torch.no_grad():
            frozen(x)
            assert {row.backend for row in report(frozen)} == {backend}
        runner = list(frozen._frozen._bound.values())
        assert {way[1] for way in runner[BACKENDS.index(backend)].ways} == {backend}


def test_packed_weights_are_shared_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Any] = []
    pack = library.pack
    monkeypatch.setattr(library, "pack", lambda *a: packed.append(a) or pack(*a))
    frozen = freeze(moved(Small()))
    with use_backend(FASTEST), torch.no_grad():
        for batch in (2, 3, 5, 2):
            frozen(torch.randn(batch, 3, 32, 32))
        assert len(packed) == (15 if FASTEST == "cpp" else 0)
        frozen(torch.randn(1, 3, 32, 32))
        assert len(packed) == (30 if FASTEST == "cpp" else 0)
        for size in range(33, 53):
            frozen(torch.randn(1, 3, size, 32))
    assert len(frozen._frozen._bound) <= 8 and len(frozen._frozen._packs) <= 8


def test_errors_are_one_clear_line(narrow: None) -> None:
    frozen = freeze(fusedres.resnet18(4))
    frames = freeze(fusedres.resnet18(4), mean=(0.5,) * 3, std=(0.2,) * 3)
    x = torch.randn(2, 3, 64, 64)
    wrong: list[tuple[nn.Module, Tensor, type[Exception], str]] = [
        (frozen, x.double(), TypeError, "ResNet: the input must be torch.float32 as the weights, "
         "got torch.float64"),
        (frozen, x.byte(), TypeError, "must be torch.float32 as the weights, got torch.uint8"),
        (frames, x.int(), TypeError, r"as the weights or uint8 \[N, H, W, C\], got torch.int32"),
        (frozen, x[0], ValueError, r"must be \[N, C, H, W\], got \[3, 64, 64\]"),
        (frozen, x[:, :1], ValueError, r"must have 3 channels, got \[2, 1, 64, 64\]"),
        (frames, x.byte(), ValueError, r"uint8 images must be \[N, H, W, 3\], got \[2, 3, 64"),
        (frozen, x[..., :0], ValueError, "the input is too small: nothing is left of it"),
        (frames, torch.zeros(1, 9, 9, 3, dtype=torch.uint8, device="meta"), ValueError,
         "the input is on meta, the weights on cpu"),
        (frozen, x.to("meta"), ValueError, "the input is on meta, the weights on cpu"),
    ]  # fmt: skip
    for model, images, kind, match in wrong:
        for _ in range(2):
            with pytest.raises(kind, match=match) as caught, torch.no_grad():
                model(images)
            assert "\n" not in str(caught.value)
    with torch.no_grad():
        assert frozen(x).shape == (2, 4)
    for kind, match, arguments in (
        (TypeError, "model must be an nn.Module, got int", {"model": 3}),
        (ValueError, "dtype must be float32, .* got torch.int8", {"dtype": torch.int8}),
        (TypeError, "cuda_graph must be a bool, got 1", {"cuda_graph": 1}),
        (TypeError, "std must be a number for each channel, got None", {"mean": (1, 2)}),
        (TypeError, "mean must be a number .* got 'abc'", {"mean": "abc", "std": (1,)}),
        (ValueError, "as many channels, got 2 and 1", {"mean": (1, 2), "std": (1,)}),
        (ValueError, "std above 0", {"mean": (1,), "std": (0,)}),
        (ValueError, "mean and std are for .* Shared cannot be followed",
         {"model": Shared(), "mean": (0.5,), "std": (1,)}),
        (ValueError, "must be of the model's 3 channels, got 1", {"mean": (0.5,), "std": (1,)}),
        (ValueError, "meta device", {"model": Small().to("meta")}),
    ):  # fmt: skip
        with pytest.raises(kind, match=match):
            freeze(**{"model": Small(), **arguments})  # type: ignore[arg-type]
