"""fuse and unfuse on models of plain torch.nn: numbers, identity of tensors, what is fused and why
not, hooks, copies, changes made later. The models of other packages: test_peers.py.
"""

from __future__ import annotations

import copy
import inspect
import io
import operator
import pickle
import random
import threading
import types
import warnings
from abc import ABC
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_resnet import PlainBottleneck
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres import fuse, report, unfuse, use_backend
from fusedres.nn.fuse import FusedByProgram
from fusedres.nn.program import ConvBN
from fusedres.testing import serving_backends

BACKENDS = serving_backends()


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options)


class Small(nn.Module):
    """A ResNet in little: stem, two stages of bottlenecks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 8, 7, stride=2), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        variant = (False, 1e-5, 0.1)
        self.layer1 = nn.Sequential(
            PlainBottleneck(8, 4, 1, *variant), PlainBottleneck(16, 4, 1, *variant)
        )
        self.layer2 = nn.Sequential(
            PlainBottleneck(16, 8, 2, *variant), PlainBottleneck(32, 8, 1, *variant)
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        h = self.layer2(self.layer1(h))
        return self.fc(torch.flatten(self.pool(h), 1))


class Layer(nn.Module):
    """Convolution, normalization, activation, by names of its own."""

    def __init__(self, i: int, o: int, k: int = 3, relu: bool = True, **options: Any) -> None:
        super().__init__()
        self.convolution = conv(i, o, k, **options)
        self.normalization = nn.BatchNorm2d(o)
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.normalization(self.convolution(hidden)))


class Nested(nn.Module):
    """A block whose convolutions lie deeper, and whose shortcut comes first in the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(Layer(8, 4, 1), Layer(4, 4, stride=2), Layer(4, 8, 1, False))
        self.shortcut = Layer(8, 8, 1, False, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.add(self.shortcut(x), self.layer(x)))


class Gate(nn.Module):
    """Squeeze and excitation: it belongs to no BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class Gated(nn.Module):
    """A block with a gate between its last BatchNorm and the add."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(8, 8), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv(8, 8), nn.BatchNorm2d(8)
        self.gate, self.act = Gate(8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.gate(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        h += x
        return self.act(h)


class Odd(nn.Module):
    """Sums that broadcast, values read twice, functions with lists and keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(8, 8, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv(8, 8), nn.BatchNorm2d(8)
        self.offset = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x))
        wide = torch.cat([h, F.relu(h)], dim=1)[:, 4:12]
        h = F.relu(self.bn2(self.conv2(wide)) + self.offset)
        pooled = h + F.adaptive_avg_pool2d(h, output_size=1)
        return F.relu(pooled + x.mean(dim=1, keepdim=True)) + h.size(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many layers are fused
    "resnet": (Small, 15),
    "chain": (
        lambda: nn.Sequential(
            conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            conv(8, 4, groups=2), nn.BatchNorm2d(4), nn.Dropout(0.0), nn.ReLU(True), nn.Identity(),
            nn.Sequential(conv(4, 8, 1, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        ),
        3,
    ),
    "nested": (lambda: nn.Sequential(Nested(), nn.Sequential(Nested(), Nested())), 12),
    "gated": (lambda: nn.Sequential(Gated(), Gated()), 4),
    "odd": (Odd, 2),
}  # fmt: skip


def made(name: str) -> nn.Module:
    model = MODELS[name][0]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def image(name: str, batch: int = 3) -> Tensor:
    channels = 3 if name == "resnet" else 8
    return torch.randn(batch, channels, 21, 18, dtype=torch.float64)


def two_steps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of two steps."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    found: dict[str, Tensor] = {}
    for step in range(2):
        optimizer.zero_grad()
        leaf = (x + step).requires_grad_()
        out = model(leaf)
        out.square().mean().backward()
        grads = {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters()}
        found |= {
            f"{step}: {n}": t for n, t in {"out": out.detach(), "x": leaf.grad, **grads}.items()
        }
        optimizer.step()
    return found | {n: b.clone() for n, b in model.named_buffers()}


def assert_close(ours: dict[str, Tensor], truth: dict[str, Tensor], tol: float = 1e-9) -> None:
    assert ours.keys() == truth.keys()
    for name, true in truth.items():
        limit = tol * max(1.0, float(true.detach().abs().max()))
        torch.testing.assert_close(ours[name], true, rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_the_model(name: str, backend: str) -> None:
    plain, x = made(name), image(name)
    fused = fuse(copy.deepcopy(plain))
    rows = report(fused)
    assert sum(r.runs == "fused" for r in rows) == MODELS[name][1]
    truth = two_steps(plain, x)
    with use_backend(backend):
        assert_close(two_steps(fused, x), truth)
        plain.eval(), fused.eval()
        assert_close({"out": fused(x)}, {"out": plain(x)})


@pytest.mark.parametrize("name", MODELS)
def test_unfuse_gives_back_the_same_bits(name: str) -> None:
    plain, x = made(name), image(name)
    back = unfuse(fuse(copy.deepcopy(plain)))
    assert [type(m) for m in back.modules()] == [type(m) for m in plain.modules()]
    for ours, theirs in zip(back.modules(), plain.modules(), strict=True):
        assert vars(ours).keys() == vars(theirs).keys()
    found, truth = two_steps(back, x), two_steps(plain, x)
    assert all(torch.equal(found[k], truth[k]) for k in truth)


def test_unfuse_calls_our_own_blocks_plainly() -> None:
    model = fusedres.resnet18(4).double()
    plain = unfuse(model)
    assert {row.runs for row in report(plain)} == {"plain"}
    assert {row.runs for row in report(model)} == {"fused"}
    assert {row.runs for row in report(fuse(plain))} == {"fused"}


def test_fuse_and_unfuse_change_one_instance_and_no_key() -> None:
    model = Small()
    other = Small()
    classes = [type(m) for m in model.modules()]
    fused = fuse(model)
    assert fused is not model and [type(m) for m in model.modules()] == classes
    for (name, p), (n, q) in zip(
        fused.state_dict(keep_vars=True).items(), model.state_dict(keep_vars=True).items(),
        strict=True,
    ):  # fmt: skip
        assert name == n and p is q
    assert all(a is not b for a, b in zip(fused.modules(), model.modules(), strict=True))
    for ours, theirs in zip(fused.modules(), model.modules(), strict=True):
        assert isinstance(ours, type(theirs))
    assert not any(isinstance(m, FusedByProgram) for m in (*model.modules(), *other.modules()))
    assert fuse(other, inplace=True) is other and isinstance(other, FusedByProgram)
    assert unfuse(other, inplace=True) is other and type(other) is Small


def test_an_optimizer_made_before_keeps_working() -> None:
    model = Small().double()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3) for m in (model, twin)]
    fused, x = fuse(model), image("resnet")
    for m, optimizer in ((fused, optimizers[0]), (twin, optimizers[1])):
        for _ in range(2):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), 1e-7)
    assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), 1e-7)


def test_copies_pickles_and_safetensors(tmp_path: Path) -> None:
    fused, x = fuse(Small().double()), image("resnet")
    fused(x)
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    copies = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))]
    copies.append(torch.load(stream, weights_only=False))
    truth = two_steps(copy.deepcopy(fused), x)
    for other in copies:
        assert isinstance(other, Small) and isinstance(other.layer1[0], FusedByProgram)
        assert all(p is not q for p, q in zip(other.parameters(), fused.parameters(), strict=True))
        found = two_steps(other, x)
        assert all(torch.equal(found[k], truth[k]) for k in truth)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(fused, str(tmp_path / "model.safetensors"))
    new = Small().double()
    safetensors.load_model(new, str(tmp_path / "model.safetensors"))
    assert all(torch.equal(p, q) for p, q in zip(new.parameters(), fused.parameters(), strict=True))


def deferred_between(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each bottleneck was handed a Deferred."""
    seen = []
    forward = FusedByProgram.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, PlainBottleneck):
            seen.append(isinstance(args[0], fusedres.Deferred))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FusedByProgram, "forward", watched)
    model(x)
    return seen


def test_activations_stay_deferred_between_blocks_and_stages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with use_backend("reference"):
        seen = deferred_between(fuse(Small().double()), image("resnet"), monkeypatch)
    assert seen == [False, True, True, True]


def test_a_projection_joins_without_a_tensor_of_its_own() -> None:
    program: Any = fuse(Nested()).program()  # type: ignore[operator]
    convolutions = [step for step in program.steps if isinstance(step, ConvBN)]
    assert len(program.steps) == len(convolutions) == 4
    (join,) = (step for step in convolutions if step.residual is not None)
    assert join.relu and join.residual in join.frees


# --- hooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("where", ["layer1.1.bn2", "layer2.0.downsample", "layer1", "bn1", "relu"])
def test_hooks_see_tensors_and_change_nothing(hook: str, where: str) -> None:
    plain = Small().double()
    for module in plain.modules():  # torch's own full hooks mind what changes in place
        if isinstance(module, nn.ReLU):
            module.inplace = False
    fused, x, seen = fuse(copy.deepcopy(plain)), image("resnet"), []

    def note(module: nn.Module, *values: Any) -> None:
        for group in values:
            seen.extend(group if isinstance(group, tuple) else (group,))

    getattr(fused.get_submodule(where), f"register_{hook}_hook")(note)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = two_steps(fused, x)
    assert_close(found, two_steps(plain, x))
    assert seen and all(isinstance(v, Tensor) for v in seen if v is not None)
    mine = [w for w in caught if "has a hook" in str(w.message)]
    reasons = {row.name: row.reason for row in report(fused)}
    if where == "layer1":  # a stage: it gives and takes Tensors, and stays fused
        assert not mine
    else:
        owner, _, child = where.rpartition(".")
        child = child if "downsample" not in where else "downsample"
        assert len(mine) == 1 and f"{child} has a hook" in str(mine[0].message)
        name = f"{owner}.conv1 + bn1".lstrip(".")
        assert f"{child} has a hook" in reasons[name]
        others = [n for n, why in reasons.items() if not n.startswith(owner or "conv1")]
        assert not any("hook" in reasons[n] for n in others)


def test_a_hook_that_is_there_when_it_is_fused() -> None:
    model, seen = Small().double(), []
    handle = model.layer1[0].conv2.register_forward_hook(lambda m, i, o: seen.append(o))
    fused = fuse(model)
    assert not seen
    with pytest.warns(UserWarning, match="conv2 has a hook"):
        fused(image("resnet"))
    assert len(seen) == 1
    handle.remove()


# --- what cannot be followed or fused -------------------------------------------------------------


class Body(nn.Module):
    """A convolution and its BatchNorm within a forward of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(8, 8), nn.BatchNorm2d(8)
        self.constant = torch.ones(8, 1, 1, dtype=torch.float64)
        self.count = 0

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class ByShape(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.shape[0] > 2 else self.body(x) + 1


class WithoutGradient(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.body(x)
        return h + self.bn(x)


class UnderAutocast(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.body(x)


class Checkpointed(Body):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class AtRandom(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if random.random() < 2 else x


class AtTorchsRandom(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if torch.rand(()).item() < 2 else x


class WithAConstant(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.constant


class Counting(Body):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.body(x)


class ChangingInPlace(Body):
    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.conv(x))
        return operator.iadd(h, 1) + h


class Keeping(Body):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.body(x)
        return self.kept * 2


class Collecting(Body):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.found.append(self.body(x))
        return self.found[-1] * 2


class AtNumpysRandom(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if np.random.rand() < 2 else x


class AtItsOwnRandom(Body):
    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.random.random() < 0.5 else x


class ByATensor(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * float(self.constant.sum())


class ByAMethodOfOurs(Body):
    def units(self) -> int:
        return 3

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.units()


class ByAnAttributeOfOurs(Body):
    def __init__(self) -> None:
        super().__init__()
        self.memory = 2

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.memory


class ByAnArgumentOfOurs(Body):
    def forward(self, x: Tensor, defer: bool = False) -> Tensor:
        return self.body(x) * (2 if defer else 1)


class TwoResults(Body):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x), x


class WithAKeyword(Body):
    def forward(self, x: Tensor, *, scale: float = 1.0, extra: Tensor | None = None) -> Tensor:
        h = self.body(x) * scale
        return h if extra is None else h + extra


REFUSED = {
    ByShape: "its forward cannot be followed: symbolically traced variables",
    WithoutGradient: "parts of it run under autocast, no_grad or checkpointing",
    UnderAutocast: "parts of it run under autocast, no_grad or checkpointing",
    Checkpointed: "parts of it run under autocast, no_grad or checkpointing",
    Reentrant: "parts of it run under autocast, no_grad or checkpointing",
    AtRandom: "its forward draws random numbers itself",
    AtTorchsRandom: "its forward draws random numbers itself",
    WithAConstant: "it uses a tensor that is no parameter or buffer",
    Counting: "its forward changes attributes",
    ChangingInPlace: "changes in place what others read",
    Keeping: "its forward changes attributes",
    Collecting: "its forward changes attributes",
    AtNumpysRandom: "its forward draws random numbers itself",
    AtItsOwnRandom: "it reads random, with Random in it, which may change unseen",
    ByATensor: "it uses a tensor that is no parameter or buffer",
    ByAMethodOfOurs: "it has a units of its own",
    ByAnAttributeOfOurs: "it has a memory of its own",
    ByAnArgumentOfOurs: "its forward takes a defer",
    TwoResults: "it returns more than one tensor",
}


@pytest.mark.parametrize("cls", REFUSED)
def test_what_cannot_be_followed_stays_as_it_is(cls: type[Body]) -> None:
    model = cls().double()
    held, state = set(vars(model)), (random.getstate(), torch.get_rng_state())
    numpys = np.random.get_state()[1].copy()
    with pytest.warns(UserWarning, match=f"nothing in this {cls.__name__} can be fused"):
        fused = fuse(model)
    assert state[0] == random.getstate() and torch.equal(state[1], torch.get_rng_state())
    assert (np.random.get_state()[1] == numpys).all()
    assert type(fused) is cls and set(vars(fused)) == held and not getattr(fused, "found", None)
    assert getattr(fused, "count", 0) == 0 and getattr(fused, "memory", 2) == 2
    (row,) = report(fused)
    assert row.runs == "plain" and REFUSED[cls] in row.reason and cls.__name__ in row.reason


def test_a_part_that_can_be_followed_is_fused_within_one_that_cannot() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Layer(8, 8), nn.Sequential(Layer(8, 8), Layer(8, 8))])

        def forward(self, x: Tensor, twice: bool = False) -> dict[str, Tensor]:
            assert x.shape[1] == 8
            for part in self.parts:
                x = part(x)
            return {"out": x}

    plain = Whole().double()
    fused, x = fuse(copy.deepcopy(plain)), image("chain")
    assert type(fused) is Whole and [r.runs for r in report(fused)] == ["fused"] * 3
    assert_close({"out": fused(x)["out"]}, {"out": plain(x)["out"]})


def test_calls_with_other_arguments_run_the_class_own_forward() -> None:
    plain, x = WithAKeyword().double(), image("chain")
    fused = fuse(copy.deepcopy(plain))
    assert isinstance(fused, FusedByProgram)
    for options in ({}, {"scale": 2.0}, {"extra": x}):
        assert_close({"out": fused(x, **options)}, {"out": plain(x, **options)})


def test_signatures_are_those_of_the_classes() -> None:
    fused = fuse(WithAKeyword())
    assert isinstance(fused, FusedByProgram)
    assert inspect.signature(fused.forward) == inspect.signature(WithAKeyword().forward)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "1", nn.GroupNorm(2, 8)), "no BatchNorm follows 0"),
        (lambda m: setattr(m, "0", conv(8, 8).requires_grad_(True)), None),
        (lambda m: setattr(m, "0", nn.Conv2d(8, 8, 3, padding=1)), "0 has a bias"),
        (lambda m: setattr(m, "0", nn.LazyConv2d(8, 3)), "0 is a LazyConv2d, a subclass"),
    ],
)
def test_reasons(change: Callable[[Any], None], reason: str | None) -> None:
    model = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), nn.ReLU())
    change(model)
    if reason is None:
        assert report(fuse(model))[0].runs == "fused"
        return
    with pytest.warns(UserWarning, match="can be fused"):
        fused = fuse(model)
    assert all(row.runs == "plain" and reason in row.reason for row in report(fused))


def test_a_layer_that_runs_twice_stays_as_it_is() -> None:
    class Twice(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.body(x))

    with pytest.warns(UserWarning, match="is called more than once"):
        fuse(Twice())


def test_report_of_a_model_that_was_not_fused_says_how() -> None:
    rows = report(Small())
    assert len(rows) == 15 and all(r.reason == "fusedres.fuse(model) would fuse it" for r in rows)


# --- changes after fusing -------------------------------------------------------------------------


def test_changes_made_later_count() -> None:
    plain, x = Small().double(), image("resnet")
    fused = fuse(copy.deepcopy(plain))
    fused(x)

    def change(model: Any) -> None:
        model.layer1[0].downsample = nn.Sequential(
            nn.AvgPool2d(1), model.layer1[0].downsample[0], model.layer1[0].downsample[1]
        )
        model.layer1[1].relu = nn.SiLU()
        model.layer2[0].bn3 = nn.GroupNorm(2, 32).double()
        model.layer2[1] = nn.Identity()
        model.fc = nn.Identity()
        model.pool = nn.MaxPool2d(2)

    change(plain), change(fused)
    for name, buffer in plain.named_buffers():
        buffer.copy_(fused.get_buffer(name))
    assert_close(two_steps(fused, x), two_steps(plain, x))


class Switched(Body):
    """A switch that its forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.doubled = False

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.body(x), 0.5, self.training)
        return 2 * h if self.doubled else h


def test_a_switch_that_the_forward_reads_counts() -> None:
    plain, x = Switched().double(), image("chain")
    fused: Any = fuse(copy.deepcopy(plain))
    for doubled in (False, True):
        for training in (True, False):
            for model in (plain, fused):
                model.doubled = doubled
                model.train(training)
                torch.manual_seed(3)
                model.result = model(x)
            torch.testing.assert_close(fused.result, plain.result, rtol=1e-9, atol=1e-9)


def test_a_compiled_model_sees_a_switch_too() -> None:
    fused: Any = fuse(Switched().double()).eval()
    compiled, x = torch.compile(fused, backend="eager", fullgraph=True), image("chain")
    once = compiled(x)
    fused.doubled = True
    torch.testing.assert_close(compiled(x), 2 * once)


def test_a_memory_that_was_chosen_is_kept() -> None:
    model = fusedres.resnet18(4, memory="recompute")
    assert fuse(model).layer1[0].memory == "recompute"  # type: ignore[union-attr, index]
    assert fuse(model, memory="exact").layer1[0].memory == "exact"  # type: ignore[union-attr, index]


class Settings(Body):
    """A forward that reads settings of every kind."""

    flags = (False,)

    def __init__(self) -> None:
        super().__init__()
        self.act: Callable[[Tensor], Tensor] = torch.tanh
        self.dims, self.scale, self.config = [2, 3], 1.5, types.SimpleNamespace(negate=False)
        self.drop, self.norm = nn.Dropout(0.0), nn.BatchNorm2d(8)
        self.parts, self.inner = nn.ModuleList([nn.Identity(), nn.ReLU6()]), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.body(x)) * self.scale
        for part in self.parts.children():
            h = part(h)
        bn = self.norm
        h = F.batch_norm(h, bn.running_mean, bn.running_var, training=bn.training)
        h = self.inner.forward(h)
        h = -h if self.config.negate else h
        h = h + 1 if self.drop.p > 0 or self.flags[0] else h
        h = h * 3 if hasattr(self, "extra") else h
        return (2 * h if torch.is_grad_enabled() else h).mean(self.dims)


class Scaled(nn.Module):
    scale = 2

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


CHANGES: dict[str, Callable[[Any], Any]] = {
    "function": lambda m: setattr(m, "act", torch.sin),
    "list": lambda m: m.dims.pop(),
    "number": lambda m: setattr(m, "scale", 2.5),
    "object": lambda m: setattr(m.config, "negate", True),
    "child's number": lambda m: setattr(m.drop, "p", 0.5),
    "child's mode": lambda m: m.norm.eval(),
    "class's tuple": lambda m: setattr(m, "flags", (True,)),
    "new attribute": lambda m: setattr(m, "extra", 1),
    "new part": lambda m: m.parts.append(nn.Tanh()),
    "fewer parts": lambda m: setattr(m, "parts", m.parts[:1]),
    "followed child": lambda m: setattr(m.inner, "scale", 5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_forward_reads_counts(change: str) -> None:
    plain, x = Settings().double(), image("chain")
    fused = fuse(copy.deepcopy(plain))
    assert report(fused)[0].runs == "fused"
    assert_close({"out": fused(x)}, {"out": plain(x)})
    CHANGES[change](plain), CHANGES[change](fused)
    assert_close({"out": fused(x)}, {"out": plain(x)})
    with torch.no_grad():
        assert_close({"out": fused(x)}, {"out": plain(x)})


def test_a_compiled_model_keeps_up_with_what_the_forward_reads() -> None:
    """With numbers too, of which torch.compile would make inputs of its graph."""
    plain, x = Settings().double().eval(), torch.ones(2, 8, 9, 9).double().cumsum(3)
    fused: Any = fuse(copy.deepcopy(plain))
    torch._dynamo.reset()
    run: Any = torch.compile(fused, fullgraph=True, backend="aot_eager")
    changes = [CHANGES[c] for c in ("list", "child's number", "new part")]
    numbers = [lambda m, v=v: setattr(m, "scale", v) for v in (2.5, 3.5, 4.5)]
    with torch.no_grad():
        assert_close({"out": run(x)}, {"out": plain(x)})
        for change in (*changes, *numbers):
            change(plain), change(fused)
            assert_close({"out": run(x)}, {"out": plain(x)})


def test_weights_tied_when_fused_can_be_untied() -> None:
    class Tied(Body):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.layer = self.conv, Layer(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.body(x)) + self.second(x)

    plain, x = Tied().double(), image("chain")
    fused: Any = fuse(copy.deepcopy(plain))
    fused(x), plain(x)
    new = conv(8, 8).double()
    for model in (plain, fused):
        model.second = new
    assert_close({"out": fused(x)}, {"out": plain(x)})


@pytest.mark.parametrize("where", ["convolution's input", "residual", "block's input", "input"])
def test_what_is_called_may_change_its_input(where: str) -> None:
    """In evaluation nobody else would notice."""

    class Block(Body):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x)) + x)

    class Changing(Body):
        def __init__(self) -> None:
            super().__init__()
            self.change = nn.Sequential(nn.ReLU(inplace=True), nn.Sigmoid())
            self.blocks, self.pool = nn.ModuleList([Block(), Block()]), nn.AvgPool2d(1)
            self.offset = nn.Parameter(torch.randn(2, 8, 9, 9))

        def forward(self, x: Tensor) -> Tensor:
            if where == "convolution's input":
                h = self.bn(self.conv(x))
                return F.relu(h + self.change(x))
            if where == "input":
                return self.bn(self.conv(F.relu(x.add_(self.offset))))
            r = self.pool(x)
            if where == "residual":
                h = F.relu(self.bn(self.conv(F.hardtanh(r))) + r)
                return h.add(self.change(r))
            h, gate = self.blocks[0](r), self.change(r)
            return self.blocks[1](h) * gate

    plain = Changing().double().eval()
    fused = fuse(copy.deepcopy(plain))
    assert any(row.runs == "fused" for row in report(fused))
    found = []
    for model in (fused, plain):
        x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(1)).double()
        with torch.no_grad():
            found.append({"out": model(x), "x": x})
    assert_close(*found)


def test_names_of_children_and_the_signature_stay() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), nn.ReLU())
            self.last = Layer(8, 8, relu=False)

        def forward(self, x: Tensor, *, flip: bool = False) -> Tensor:
            return F.relu(self.last(self.op(x)) + x)

    plain, x = Cell().double(), image("chain")
    fused = fuse(copy.deepcopy(plain))
    assert [row.runs for row in report(fused)] == ["fused"] * 2
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    assert_close({"out": fused(x)}, {"out": plain(x)})


class Registered(Body):
    """A class that wants to know of its subclasses."""

    known: ClassVar[list[type]] = []

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Registered.known.append(cls)


class Abstract(ABC, nn.Module):
    """Whose objects cannot change their class, for what stands in front of nn.Module."""


class Odder(Registered):
    def __init__(self, k: int = 1) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.k


class MadeByArguments(Odder):
    def __reduce__(self) -> Any:
        return type(self), (self.k,), self.__getstate__()


class MadeByAFunction(Odder):
    def __reduce__(self) -> Any:
        return remade, (self.k, self.state_dict())


def remade(k: int, weights: dict[str, Tensor]) -> MadeByAFunction:
    model = MadeByAFunction(k).double()
    model.load_state_dict(weights)
    return model


class Below(Abstract):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("cls", [Odder, MadeByArguments, MadeByAFunction, Below])
def test_classes_with_ways_of_their_own(cls: type[nn.Module]) -> None:
    known = list(Registered.known)
    plain, x = cls().double().eval(), image("chain")
    fused = fuse(copy.deepcopy(plain))
    assert Registered.known == known
    for model in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert isinstance(model, cls) and report(model)[0].runs == "fused"
        assert isinstance(model, FusedByProgram) is (cls is not Below)
        assert_close({"out": model.eval()(x)}, {"out": plain(x)})


def test_scripted_modules_are_called_as_they_are() -> None:
    scripted: Any = torch.jit.script(Layer(8, 8).double())
    with pytest.warns(UserWarning, match="can be fused"):
        fuse(scripted)
    plain, x = nn.Sequential(scripted, Layer(8, 8).double()).eval(), image("chain")
    fused = fuse(copy.deepcopy(plain))
    assert [row.name for row in report(fused)] == ["1.convolution + normalization"]
    assert_close({"out": fused(x)}, {"out": plain(x)})


def test_threads_may_run_while_another_follows() -> None:
    """torch.fx changes nn.Module for all of them meanwhile."""
    plain, x, errors = Small().double().eval(), image("resnet"), []
    fused = fuse(copy.deepcopy(plain))
    before = vars(nn.Module).copy()
    with torch.no_grad():
        truth = plain(x)

    def run(model: nn.Module) -> None:
        try:
            for _ in range(8):
                for module in model.modules():
                    if isinstance(module, FusedByProgram):
                        module._programs.clear()
                with torch.no_grad():
                    assert_close({"out": model(x)}, {"out": truth})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(m,)) for m in (fused, plain, fused, plain)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and vars(nn.Module) == before


def test_buffers_move_when_it_runs_and_not_when_it_is_followed() -> None:
    class Seen(Body):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)  # type: ignore[operator]
            return self.body(x)

    plain, x = Seen().double(), image("chain")
    fused: Any = fuse(copy.deepcopy(plain))
    assert isinstance(fused, FusedByProgram) and not fused.seen.any()
    assert_close(two_steps(fused, x), two_steps(plain, x))
    assert (fused.seen == 2).all()


def test_what_nobody_reads_any_more_is_freed() -> None:
    """In inference, where autograd keeps nothing."""

    class Probe(nn.Module):
        given: ClassVar[list[StorageWeakRef]] = []

        def forward(self, x: Tensor) -> Tensor:
            alive.append(sum(not given.expired() for given in self.given))
            out = x.clone()
            self.given.append(StorageWeakRef(out.untyped_storage()))
            return out

    alive: list[int] = []
    model = nn.Sequential(*(part for _ in range(4) for part in (Layer(8, 8), Probe())))
    fused = fuse(model.double())
    assert isinstance(fused, FusedByProgram)
    with torch.no_grad():
        fused(image("chain"))
    assert alive == [0, 0, 0, 0]


def test_a_sequential_can_be_sliced_and_extended() -> None:
    model = nn.Sequential(Layer(8, 8), Layer(8, 8), Layer(8, 8)).double()
    fused, x = fuse(copy.deepcopy(model)), image("chain")
    assert_close({"out": fused[:2](x)}, {"out": model[:2](x)})  # type: ignore[index]
    fused.append(nn.ReLU6()), model.append(nn.ReLU6())  # type: ignore[operator]
    assert_close({"out": fused(x)}, {"out": model(x)})


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="fuse: memory must be 'exact' or 'recompute', got 'l"):
        fuse(Small(), memory="less")
    for function in (fuse, unfuse):
        name = function.__name__
        with pytest.raises(TypeError, match=rf"{name}: model must be an nn\.Module, got list"):
            function([])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=rf"{name}: inplace must be a bool, got 1"):
            function(Small(), inplace=1)  # type: ignore[arg-type]
