"""What training relies on beside numbers: modes of BatchNorm, frozen parameters and the work that
they spare, accumulation, changes in place, inference, half types and GradScaler. Our own blocks and
a fused model of plain modules, beside plain torch.nn.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dispatched import Dispatched
from live import Live
from test_fuse import Small
from torch import Tensor, nn

from fusedres import ConvBlock, ConvBNReLU, IdentityBlock, fuse, unfuse, use_backend
from fusedres.nn import BasicBlock, Stage
from fusedres.ops import conv_bn
from fusedres.testing import CHANNELS_LAST, HALF_TYPES, error, serves, serving_backends

BACKENDS = serving_backends()
TOLERANCE = 1e-10


class Blocks(nn.Module):
    """Our own blocks, of channels that the CPU's fused plan takes and of others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBNReLU(3, 32, 3, 2, 1)
        self.layer1 = Stage(ConvBlock(32, (32, 32, 64)), IdentityBlock(64, (32, 32, 64)))
        self.layer2 = Stage(ConvBlock(64, (8, 8, 24), stride_in_1x1=True), BasicBlock(24, 16, 2))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


# the model of plain modules, and what makes a fused one of it
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "blocks": (Blocks, lambda model: model),
    "fused": (Small, fuse),
    "recompute": (Small, lambda model: fuse(model, memory="recompute")),
}
KEPT_ANYHOW = ("recompute", "reference")  # which runs under ordinary autograd
every_model = pytest.mark.parametrize("name", ["blocks", "fused"])
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def norms(model: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def pair(
    name: str,
    dtype: torch.dtype = torch.float64,
    change: Callable[[nn.Module], object] = lambda model: None,
) -> tuple[nn.Module, nn.Module]:
    """Ours and a twin of plain torch.nn; no BatchNorm is an identity."""
    make, fused = MODELS[name]
    model = make()
    for bn in norms(model):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.uniform_(bn.bias, -0.3, 0.3)
        nn.init.uniform_(bn.running_mean, -0.3, 0.3)
        nn.init.uniform_(bn.running_var, 0.5, 1.5)
    change(model)
    model = model.to(dtype).to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
    twin = unfuse(copy.deepcopy(model))
    return fused(model), twin


def images(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 3, 19, 18, generator=generator, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=CHANNELS_LAST)


def assert_equal(
    ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], what: str = ""
) -> None:
    assert ours.keys() == theirs.keys()
    for key, truth in theirs.items():
        mine = ours[key]
        assert (mine is None) == (truth is None), (what, key)
        if mine is not None and truth is not None:
            assert mine.dtype == truth.dtype, (what, key)
            off = float((mine.detach() - truth.detach()).abs().max())
            assert off <= TOLERANCE * max(1.0, float(truth.detach().abs().max())), (what, key, off)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def state(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: t.clone() for n, t in model.state_dict().items()}


# --- modes of BatchNorm ---------------------------------------------------------------------------


def replaced(model: nn.Module, **options: Any) -> None:
    """Every second BatchNorm by one of these options."""
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and child_name[-1] in "1n":
                setattr(module, child_name, nn.BatchNorm2d(child.num_features, **options))


def cumulative(model: nn.Module) -> None:
    for bn in norms(model):
        bn.momentum = None


def every(count: int) -> Callable[[nn.Module], None]:
    """Puts every n-th BatchNorm of a model that trains into eval."""

    def freeze(model: nn.Module) -> None:
        for bn in list(norms(model))[::count]:
            bn.eval()

    return freeze


# what is changed before anything is fused, and what is after
NORMS: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "frozen": (lambda m: None, every(1)),
    "every second one frozen": (lambda m: None, every(2)),
    "momentum=None": (cumulative, lambda m: None),
    "track_running_stats=False": (
        lambda m: replaced(m, track_running_stats=False),
        lambda m: None,
    ),
    "affine=False": (lambda m: replaced(m, affine=False), lambda m: None),
}


@every_backend
@every_model
@pytest.mark.parametrize("mode", NORMS)
def test_modes_of_batch_norm(mode: str, name: str, backend: str) -> None:
    """Three steps of SGD, then eval."""
    before, after = NORMS[mode]
    found = []
    for model in pair(name, change=before):
        after(model)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        results: dict[str, Tensor | None] = {}
        with use_backend(backend):
            for step in range(3):
                optimizer.zero_grad()
                x = images(step).requires_grad_()
                out = model(x)
                out.square().mean().backward()
                results |= {f"out {step}": out, f"x {step}": x.grad}
                results |= {f"{n} {step}": g for n, g in gradients(model).items()}
                optimizer.step()
            model.eval()
            results |= {"eval": model(images(9))} | state(model)
        found.append(results)
    assert_equal(*found)
    moved = [n for n in found[0] if n.endswith("num_batches_tracked")]
    steps = {"frozen": {0}, "every second one frozen": {0, 3}}.get(mode, {3})
    assert {int(found[0][n]) for n in moved} == steps  # type: ignore[arg-type]


@every_backend
def test_a_number_for_eps_and_momentum_that_changes_later(backend: str) -> None:
    found = []
    for model in pair("fused"):
        results: dict[str, Tensor | None] = {}
        for step, (eps, momentum) in enumerate([(1e-5, 0.1), (1e-2, 0.5), (1e-2, None)]):
            for bn in norms(model):
                bn.eps, bn.momentum = eps, momentum
            with use_backend(backend):
                results[f"out {step}"] = model(images(step))
        found.append(results | state(model))
    assert_equal(*found)


@every_backend
@every_model
def test_what_happens_to_frozen_statistics_before_backward(name: str, backend: str) -> None:
    """Their node keeps copies: a new value counts from the next forward on."""
    ours, plain = pair(name)
    for model in (ours, plain):
        every(1)(model)
    with use_backend(backend):
        out = ours(images())
        with torch.no_grad():
            for bn in norms(ours):
                bn.running_mean.add_(1)  # type: ignore[union-attr]
                bn.running_var.mul_(2)  # type: ignore[union-attr]
        if backend == "reference":
            return  # plain torch, which refuses
        out.square().sum().backward()
    plain(images()).square().sum().backward()
    assert_equal(gradients(ours), gradients(plain))


# --- accumulation ---------------------------------------------------------------------------------


@every_backend
@every_model
def test_gradients_accumulate(name: str, backend: str) -> None:
    """Over several forwards and over several backwards, of several graphs and of one."""
    models = pair(name)
    for order in ("one backward", "a backward each", "last first", "twice"):
        found = []
        for model in models:
            model.zero_grad()
            xs = [images(seed).requires_grad_() for seed in range(3)]
            with use_backend(backend):
                if order == "a backward each":
                    for x in xs:
                        model(x).square().sum().backward()
                else:
                    losses = [model(x).square().sum() for x in xs]
            if order == "one backward":
                torch.stack(losses).sum().backward()
            if order == "last first":
                for loss in reversed(losses):
                    loss.backward()
            if order == "twice":
                for loss in (*losses, losses[0]):
                    loss.backward(retain_graph=True)
            grads = {f"x {i}": x.grad for i, x in enumerate(xs)}
            found.append(gradients(model) | grads | state(model))
        assert_equal(*found, order)


# --- what needs no gradient -----------------------------------------------------------------------

BACKWARDS = {"fusedres::conv_bn_bwd", "fusedres::conv_bn_relu_maxpool_bwd"}


class Asked(Dispatched):
    """Which gradients, of the input and of the weight, each convolution was asked for: our backward
    ops, and the library's, within ours too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ours: dict[int, tuple[bool, bool]] = {}  # by the weight's address
        self.library: dict[int, tuple[bool, bool]] = {}

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if func.name() == "aten::convolution_backward":
            needs_input, needs_weight, needs_bias = args[10]
            assert not needs_bias
            self.library[args[2].data_ptr()] = (needs_input, needs_weight)
        if func.name() in BACKWARDS:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=True))
            self.ours[given["weight"].data_ptr()] = (given["need_input"], given["need_weight"])


def named(model: nn.Module, asked: dict[int, tuple[bool, bool]]) -> dict[str, tuple[bool, bool]]:
    """By the names of weights; only what was asked for."""
    found = {
        n: asked.get(p.data_ptr(), (False, False))
        for n, p in model.named_parameters()
        if p.dim() == 4
    }
    assert {p.data_ptr() for p in model.parameters()} >= asked.keys()
    return {n: needs for n, needs in found.items() if any(needs)}


def is_conv(name: str, p: Tensor) -> bool:
    return p.dim() == 4


def in_batch_norm(name: str, p: Tensor) -> bool:
    return p.dim() == 1 and not name.startswith("fc")


FROZEN: dict[str, Callable[[str, Tensor], bool]] = {
    "nothing": lambda n, p: False,
    "one convolution": lambda n, p: n == "layer1.1.conv2.weight",
    "a shortcut": lambda n, p: "layer1.0.downsample" in n,
    "a main branch": lambda n, p: n.startswith(("layer1.0.conv", "layer1.0.bn")),
    "the stem": lambda n, p: n.startswith(("stem", "conv1", "bn1")),
    "the stem and the first stage": lambda n, p: n.startswith(("stem", "conv1", "bn1", "layer1")),
    "the second stage": lambda n, p: n.startswith("layer2"),
    "every convolution": is_conv,
    "every BatchNorm": in_batch_norm,
    "BatchNorm's weights": lambda n, p: in_batch_norm(n, p) and n.endswith("weight"),
    "BatchNorm's biases": lambda n, p: in_batch_norm(n, p) and n.endswith("bias"),
    "all but one bias": lambda n, p: n != "layer1.0.bn1.bias",
    "all but the head": lambda n, p: not n.startswith("fc"),
    "everything": lambda n, p: True,
}


@pytest.mark.parametrize(
    ("name", "backend"), [(n, b) for n in MODELS for b in BACKENDS if (n, b) != KEPT_ANYHOW]
)
def test_what_is_frozen_costs_no_work(name: str, backend: str) -> None:
    """The gradients of the rest stay the same, and each convolution computes those that autograd
    asks of plain torch's.
    """
    models = pair(name)
    for frozen, of_x in itertools.product(FROZEN, (True, False)):
        found, works = [], []
        for model in models:
            model.zero_grad()
            for n, p in model.named_parameters():
                p.requires_grad_(not FROZEN[frozen](n, p))
            x = images().requires_grad_(of_x)
            with use_backend(backend), Asked() as asked:
                out = model(x)
                if out.requires_grad:
                    out.square().sum().backward()
            assert out.requires_grad == (of_x or frozen != "everything")
            works.append(asked)
            found.append(gradients(model) | {"x": x.grad} | state(model))
        assert_equal(*found, frozen)
        ours, plain = models
        expected = named(plain, works[1].library)
        library = named(ours, works[0].library)
        if backend == "reference":
            assert library == expected, frozen
            continue
        assert named(ours, works[0].ours) == expected, frozen
        for weight, needs in library.items():  # it computes none of what was not asked for
            asked_for = zip(needs, expected[weight], strict=True)
            assert all(wanted or not need for need, wanted in asked_for), (frozen, weight)


# --- inference ------------------------------------------------------------------------------------


@every_backend
@every_model
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_inference_has_the_same_bits_and_keeps_nothing(
    training: bool, name: str, backend: str
) -> None:
    """Under no_grad, in inference mode, and where every parameter is frozen."""
    model = pair(name, torch.float32)[0].train(training)
    x = images(dtype=torch.float32)
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    start, found = state(model), []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode, None):
        model.load_state_dict(start)
        if mode is None:
            model.requires_grad_(False)
        live = Live()
        with use_backend(backend), (mode or torch.enable_grad)(), live, hooks:
            out = model(x)
        found.append({"out": out} | state(model))
        assert out.is_inference() == (mode is torch.inference_mode)
        assert out.requires_grad == (mode is torch.enable_grad)
        if mode is torch.enable_grad:
            assert saved and live.bytes(model, x, out) > 0
            del out
            saved.clear()
        else:
            assert not saved and live.bytes(model, x, out) == 0
    for other in found[1:]:
        for key, expected in found[0].items():
            assert torch.equal(other[key], expected), key  # type: ignore[arg-type]


# --- changes in place -----------------------------------------------------------------------------


def chain(backend: str, plain: bool, kept: dict[str, Tensor], recompute: bool) -> Tensor:
    """Two blocks, whose tensors are kept by their names."""
    first, second = ConvBlock(32, (32, 32, 64)).double(), IdentityBlock(64, (32, 32, 64)).double()
    for n, block in (("first", first), ("second", second)):
        block.fused, block.memory = not plain, "recompute" if recompute else "exact"
        kept |= {f"{n}.{m}": p for m, p in block.named_parameters() if p.dim() == 4}
    kept["leaf"] = torch.randn(2, 32, 6, 6, dtype=torch.float64).requires_grad_()
    kept["input"] = 1 * kept["leaf"].contiguous(memory_format=CHANNELS_LAST)
    with use_backend(backend):
        kept["first's output"] = first(kept["input"])
        kept["second's output"] = second(kept["first's output"])
    return kept["second's output"].sum()  # which saves nothing of its own


CHANGED = ["input", "first's output", "second's output", "first.conv1.weight"]
CHANGED += ["first.downsample.0.weight", "first.conv3.weight", "second.conv2.weight"]


@every_backend
@pytest.mark.parametrize("changed", CHANGED)
@pytest.mark.parametrize("way", ["plain", "exact", "recompute"])
def test_a_change_in_place_of_what_is_saved_raises(way: str, changed: str, backend: str) -> None:
    kept: dict[str, Tensor] = {}
    loss = chain(backend, way == "plain", kept, way == "recompute")
    with torch.no_grad():
        kept[changed].mul_(1.0)
    if changed == "input" and backend == "reference" and way != "plain":
        loss.backward()  # it pads, and keeps what it made of that
        return
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        loss.backward()


@every_backend
def test_a_change_in_place_of_what_a_node_emitted_raises(backend: str) -> None:
    x = torch.randn(2, 32, 6, 6).requires_grad_()
    w = [torch.randn(32, 32, 1, 1).requires_grad_() for _ in range(2)]
    with use_backend(backend):
        h, a = conv_bn(conv_bn(x, w[0]), w[1], emit=True)
        loss = h.value().sum() + (2 * a).sum()
        with torch.no_grad():
            a.mul_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with use_backend(backend):  # of a Tensor an alias of the input
        _, a = conv_bn(1 * x, w[1], emit=True)
        if backend != "reference":
            with pytest.raises(RuntimeError, match="modified inplace"):
                a.mul_(1.0)


@every_backend
@every_model
def test_parameters_of_batch_norm_may_change_before_backward(name: str, backend: str) -> None:
    """Plain torch raises; ours keeps the scale that forward used, so its gradients are right."""
    ours, plain = pair(name)
    with use_backend(backend):
        out = ours(images())
    with torch.no_grad():
        for bn in norms(ours):
            bn.weight.mul_(2)
            bn.bias.add_(1)
    plain(images()).square().sum().backward()
    if backend == "reference":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.square().sum().backward()
        return
    out.square().sum().backward()
    assert_equal(gradients(ours), gradients(plain))


# --- half types -----------------------------------------------------------------------------------

TARGETS = torch.tensor([0, 3, 1])
HALF_WAYS = [(b, d) for b in BACKENDS for d in HALF_TYPES if serves(b, "conv_bn", d)]
every_half = pytest.mark.parametrize(("backend", "dtype"), HALF_WAYS)


@every_backend
@every_model
def test_a_model_in_bf16_trains(name: str, backend: str) -> None:
    model = pair(name)[0].bfloat16()
    x, optimizer = images(dtype=torch.bfloat16), torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with use_backend(backend):
            loss = F.cross_entropy(model(x).float(), TARGETS)
        loss.backward()
        losses.append(loss.item())
        assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]
        optimizer.step()
    assert all(b < a for a, b in itertools.pairwise(losses)) and losses[4] < losses[0] / 2
    assert {b.dtype for b in model.buffers()} == {torch.bfloat16, torch.int64}


class Scaled:
    """A model that trains under autocast on fixed data, by a GradScaler or without one."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, **options: Any) -> None:
        self.model, self.dtype = model, dtype
        self.optimizer = torch.optim.SGD(model.parameters(), 0.02)
        self.scaler = torch.amp.GradScaler("cpu", **options)
        self.scales, self.stepped, self.norms = [self.scaler.get_scale()], [], []  # type: ignore[var-annotated]

    def step(self, clip: float | None = None) -> float:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", self.dtype):
            loss = F.cross_entropy(self.model(images(dtype=torch.float32)), TARGETS)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.norms.append(float(norm))
        self.grads = gradients(self.model)
        before = [p.detach().clone() for p in self.model.parameters()]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        after = self.model.parameters()
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert all(same) or not any(same)
        self.stepped.append(not all(same))
        self.scales.append(self.scaler.get_scale())
        return loss.item()


@every_half
@every_model
def test_a_scale_changes_nothing_but_rounding(name: str, backend: str, dtype: torch.dtype) -> None:
    model = pair(name, torch.float32)[0]
    found = []
    with use_backend(backend):
        for scale in (1.0, 256.0):
            training = Scaled(copy.deepcopy(model), dtype, init_scale=scale)
            loss = training.step()
            found.append((loss, training.grads))
            assert training.stepped == [True] and training.step() < loss
    assert found[0][0] == found[1][0]
    for key, exact in found[0][1].items():
        assert exact is not None
        # bf16 has fp32's range, so a power of two rounds nowhere; fp16 loses what is below 2**-24
        limit = 0.0 if dtype == torch.bfloat16 else 0.02
        assert error(found[1][1][key], exact.double()) <= limit, key  # type: ignore[arg-type]


@every_half
@every_model
def test_a_step_without_finite_gradients_is_skipped(
    name: str, backend: str, dtype: torch.dtype
) -> None:
    """By ours where by plain torch, and training goes on. What is not finite comes in through our
    backward; the head's own gradients are.
    """

    def spoilt(_: nn.Module, inputs: tuple[Tensor]) -> None:
        inputs[0].register_hook(lambda g: g * float("inf"))

    ours, plain = (
        Scaled(model, dtype, init_scale=1024.0, growth_interval=3)
        for model in pair(name, torch.float32)
    )
    losses = []
    for training in (ours, plain):
        with use_backend(backend):
            for step in range(6):
                spoil = training.model.fc.register_forward_pre_hook(spoilt)  # type: ignore[union-attr]
                if step != 2:
                    spoil.remove()
                losses.append(training.step())
                spoil.remove()
    assert ours.stepped == plain.stepped == [True, True, False, True, True, True]
    assert ours.scales == plain.scales == [1024, 1024, 1024, 512, 512, 512, 1024]
    assert losses[5] < losses[0] and losses[3] == losses[2]  # of the same parameters


@pytest.mark.parametrize("backend", [b for b, d in HALF_WAYS if d == torch.float16])
def test_a_scale_that_is_too_large_falls_until_it_fits(backend: str) -> None:
    """fp16 alone overflows; ours at the scales at which plain torch does."""
    ours, plain = (
        Scaled(model, torch.float16, init_scale=2.0**24) for model in pair("fused", torch.float32)
    )
    for training in (ours, plain):
        with use_backend(backend):
            for _ in range(12):
                training.step()
    assert ours.stepped == plain.stepped and ours.scales == plain.scales
    assert not ours.stepped[0] and all(ours.stepped[-3:])


@every_half
@every_model
def test_clipped_gradients(name: str, backend: str, dtype: torch.dtype) -> None:
    """unscale_, clip_grad_norm_, step: the norm is plain torch's up to rounding."""
    ours, plain = (Scaled(model, dtype, init_scale=256.0) for model in pair(name, torch.float32))
    for training in (ours, plain):
        with use_backend(backend):
            training.step(clip=0.1)
        total = torch.stack([g.norm() for g in training.grads.values()]).norm()  # type: ignore[union-attr]
        assert training.norms[0] > 1 and abs(float(total) - 0.1) < 1e-3
    assert abs(ours.norms[0] / plain.norms[0] - 1) < 0.1
