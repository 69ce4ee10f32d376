"""The networks: against plain torch.nn in fp64, state_dict both ways, variants, low precision,
compile, export.
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from live import Live
from plain_resnet import VARIANTS, PlainResNet50
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres import FusedResNet50, backends, report, use_backend
from fusedres.models import stages
from fusedres.nn.blocks import FusedModule, packed
from fusedres.ops import _packed
from fusedres.testing import CHANNELS_LAST, CONTIGUOUS, assert_three_way, serving_backends

BACKENDS = serving_backends()
unfuse = functools.partial(fusedres.unfuse, inplace=True)


def relative(ours: Tensor, truth: Tensor) -> float:
    """Largest error relative to the truth's largest element; one for an all-zero result."""
    truth = truth.double()
    return float((ours.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-300))


def pair(variant: str, **options: Any) -> tuple[FusedResNet50, PlainResNet50]:
    """A fused and a plain network with the same weights; no BatchNorm is an identity."""
    fused = FusedResNet50(6, variant=variant, **options)
    for module in fused.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    plain = PlainResNet50(6, **VARIANTS[variant])  # type: ignore[arg-type]
    plain.load_state_dict(fused.state_dict(), strict=True)
    return fused, plain


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fp64_equals_plain_pytorch(
    variant: str, backend: str, memory_format: torch.memory_format
) -> None:
    """1e-10: outputs and every gradient of the first step, running statistics after three."""
    fused, plain = (m.double().to(memory_format=memory_format) for m in pair(variant))
    # steps so small that training does not amplify the rounding that is measured
    optimizers = [torch.optim.SGD(m.parameters(), 1e-5) for m in (fused, plain)]
    for step in range(3):
        x = torch.randn(3, 3, 64, 64, dtype=torch.float64).to(memory_format=memory_format)
        x.requires_grad_()
        target = torch.randint(6, (3,))
        found = []
        for model, optimizer in zip((fused, plain), optimizers, strict=True):
            optimizer.zero_grad()
            with use_backend(backend):
                out = model(x)
                loss = F.cross_entropy(out, target)
            (x_grad,) = torch.autograd.grad(loss, x, retain_graph=True)
            loss.backward(inputs=list(model.parameters()))
            grads = {name: p.grad.clone() for name, p in model.named_parameters()}
            found.append({"output": out.detach(), "input gradient": x_grad, **grads})
            optimizer.step()
        if step == 0:
            assert len(found[0]) == 2 + 161
            for name, truth in found[1].items():
                assert truth.any(), name
                assert relative(found[0][name], truth) < 1e-10, name
    for (name, ours), (_, truth) in zip(fused.named_buffers(), plain.named_buffers(), strict=True):
        assert relative(ours, truth) < 1e-10, name
    fused.eval(), plain.eval()
    with use_backend(backend), torch.no_grad():
        assert relative(fused(x), plain(x)) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_outputs(dtype: torch.dtype, backend: str) -> None:
    fused, plain = (m.to(memory_format=CHANNELS_LAST) for m in pair("torchvision"))
    x = torch.randn(4, 3, 64, 64).to(memory_format=CHANNELS_LAST)
    wide = copy.deepcopy(plain).double()
    truth = wide(x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        theirs = plain(x)
        with use_backend(backend):
            ours = fused(x)
    assert_three_way("output", [ours.float()], [theirs.float()], [truth], dtype)
    for name, true in wide.named_buffers():
        if "running" in name:
            mine, theirs = fused.get_buffer(name), plain.get_buffer(name)
            assert_three_way(name, [mine], [theirs], [true], dtype)


def test_parameters_and_state_dict_are_torchvisions() -> None:
    fused, plain = FusedResNet50(), PlainResNet50()
    assert sum(p.numel() for p in fused.parameters()) == 25_557_032
    ours, theirs = fused.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[k].shape == theirs[k].shape for k in ours)
    fused.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(fused.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_family(depth: int, parameters: int) -> None:
    """Parameter counts as torchvision documents them."""
    with torch.device("meta"):
        model = getattr(fusedres, f"resnet{depth}")()
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_basic_blocks_equal_their_children(variant: str, backend: str) -> None:
    model = fusedres.resnet18(5, variant=variant).double()
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, FusedModule):
            module.fused = False
    x, target = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 3])
    with use_backend(backend):
        for m in (model, twin):
            F.cross_entropy(m(x), target).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert relative(p.grad, q.grad) < 1e-10, name


def test_variants_and_overrides() -> None:
    model = FusedResNet50(6, variant="coursera")
    block: Any = model.layer2[0]
    assert block.conv1.stride == (2, 2) and block.conv2.stride == (1, 1)
    assert (block.bn1.eps, block.bn1.momentum, model.maxpool.padding) == (1e-3, 0.01, 0)
    assert not model.fc.bias.any()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 6)
    keras = FusedResNet50(6, variant="keras")
    assert (keras.bn1.eps, keras.bn1.momentum, keras.maxpool.padding) == (1.001e-5, 0.01, 1)
    own = FusedResNet50(
        6, variant="keras", stride_in_1x1=False, eps=1e-4, momentum=None, stem_pool_padding=0,
        initializer="ones", in_channels=1, zero_init_residual=True,
    )  # fmt: skip
    block = own.layer3[0]
    assert block.conv1.stride == (1, 1) and block.bn2.eps == 1e-4 and block.bn2.momentum is None
    assert own.maxpool.padding == 0 and (own.conv1.weight == 1).all() and own.conv1.in_channels == 1
    assert not block.bn3.weight.any() and block.bn2.weight.all()


def test_the_same_seed_gives_the_same_bits() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(fusedres.resnet18(4, variant="keras").state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "caffe"}, ValueError, "variant: got 'caffe', accepted: 'torchvision'"),
        ({"memory": "less"}, ValueError, "memory must be 'exact' or 'recompute', got 'less'"),
        ({"epsilon": 1e-3}, TypeError, "unknown argument 'epsilon'"),
        ({"num_classes": 0}, ValueError, "num_classes must be a positive int"),
        ({"in_channels": 1.5}, ValueError, "in_channels must be a positive int"),
        ({"stem_pool_padding": 2}, ValueError, "stem_pool_padding must be 0 or 1"),
        ({"initializer": "he"}, ValueError, "initializer: got 'he'"),
    ],
)
def test_errors_name_the_argument(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"resnet50: .*{message}|^{message}"):
        FusedResNet50(**options)


def test_stride_in_a_1x1_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="resnet34: stride_in_1x1=True"):
        fusedres.resnet34(stride_in_1x1=True)


def test_report_says_what_runs() -> None:
    model = fusedres.resnet18(4)
    with use_backend("reference"):
        assert {row.backend for row in report(model)} == {"reference"}
    rows = report(model)
    assert len(rows) == 20 and {row.runs for row in rows} == {"fused"}
    assert "20 of 20 layers fused" in str(rows)
    model.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    assert "maxpool is not a plain square max pool" in report(model)[0].reason
    with pytest.raises(TypeError, match=r"report: model must be an nn\.Module, got int"):
        report(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("child", ["maxpool", "relu", "conv1"])
def test_a_stem_that_cannot_fuse_runs_as_it_is(child: str) -> None:
    model = fusedres.resnet18(4).double()
    seen: list[Tensor] = []
    twin = copy.deepcopy(model)
    model.get_submodule(child).register_forward_hook(lambda m, i, o: seen.append(o))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert relative(model(x), twin(x)) < 1e-10 and len(seen) == 1


def test_gradients_accumulate_over_forwards() -> None:
    model = fusedres.resnet18(4).double()
    batches = [torch.randn(2, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    sum(model(x).square().sum() for x in batches).backward()  # type: ignore[union-attr]
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for x in batches:
        model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert relative(p.grad, together[name]) < 1e-9, name


def test_half_precision_and_inference_modes() -> None:
    model = fusedres.resnet18(4).bfloat16().to(memory_format=CHANNELS_LAST)
    x = torch.randn(2, 3, 64, 64).bfloat16()
    assert model(x).dtype == torch.bfloat16
    model.eval()
    with torch.inference_mode():
        out = model(x)
    torch.testing.assert_close(model(x), out.clone(), rtol=0, atol=0)


def test_a_network_made_in_inference_mode_runs_under_autocast() -> None:
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        out = fusedres.resnet18(3).eval()(x)
    torch.manual_seed(0)
    model = fusedres.resnet18(3).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), out)


def test_only_weights_that_are_fused_are_cast_together() -> None:
    """Where there is a GPU; there is none, so a choice of its backend stands in for it."""
    model, x = fusedres.resnet18(3).eval(), torch.randn(1, 3, 32, 32)
    fused = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    first = model.layer1[0]  # type: ignore[index]
    counts = []
    choice = replace(backends.choose("conv_bn", "cpu", torch.bfloat16), backend="cuda")
    for change in (lambda: None, lambda: setattr(first, "fused", False), lambda: unfuse(model)):
        change()
        with (
            mock.patch.object(backends, "choose", return_value=choice),
            PackedTogether() as cast,
            torch.autocast("cpu", torch.bfloat16),
            packed(model, x),
        ):
            counts.append(cast.elements)
    plain = sum(m.weight.numel() for m in first.modules() if isinstance(m, nn.Conv2d))
    assert counts == [fused, fused - plain, 0]


class PackedTogether(TorchDispatchMode):
    """Counts the elements that a multi-tensor copy casts."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "aten::_foreach_copy_":
            self.elements += sum(t.numel() for t in args[1])
        return func(*args, **(kwargs or {}))


def test_casts_are_freed_by_backward() -> None:
    """A loss that is kept for the log keeps no weights."""
    model, x = fusedres.resnet18(3), torch.randn(2, 3, 32, 32)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    views = []
    get = _packed.PackedWeights.get

    def seen(self: _packed.PackedWeights, *args: Any) -> Tensor | None:
        cast = get(self, *args)
        views.append(weakref.ref(cast))
        return cast

    with (
        mock.patch.object(_packed.PackedWeights, "get", seen),
        _packed.packing(weights, torch.bfloat16, torch.device("cpu")),
        torch.autocast("cpu", torch.bfloat16),
    ):
        loss = model(x).sum()
    loss.backward()
    gc.collect()
    assert len(views) == 20 and not any(view() is not None for view in views)


def test_no_cast_of_a_weight_is_held_on_a_cpu() -> None:
    model, x = fusedres.resnet18(3), torch.randn(2, 3, 32, 32)
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 4}
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert {tuple(t.shape) for t in saved if t.dtype == torch.float32} >= shapes
    assert not {tuple(t.shape) for t in saved if t.dtype == torch.bfloat16} & shapes


def test_statistics_that_cannot_move_are_refused_before_anything_does() -> None:
    with torch.inference_mode():
        model = fusedres.IdentityBlock(8, (4, 4, 8))
    before = model.bn1.running_mean.clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="running_mean was made in"):
        model(torch.randn(2, 8, 4, 4))
    assert torch.equal(model.bn1.running_mean, before)


def test_autocast_casts_a_changed_weight_anew() -> None:
    """In the next forward, and within one where a hook changes it."""
    model, x = fusedres.resnet18(3).eval(), torch.randn(1, 3, 32, 32)
    last = model.layer4[1].conv2.weight  # type: ignore[index, union-attr]

    def run() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(x)

    before = run()
    with torch.no_grad():
        last.mul_(2)
    after = run()
    assert not torch.equal(before, after)
    with torch.no_grad():
        last.div_(2)

    def double(*_: object) -> None:
        with torch.no_grad():
            last.mul_(2)

    with model.layer1.register_forward_hook(double):  # type: ignore[union-attr]
        assert torch.equal(run(), after)


@pytest.mark.slow  # test_compile.py has smaller models
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    model = fusedres.resnet18(4)
    twin = copy.deepcopy(model)
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    with use_backend(backend):
        F.cross_entropy(model(x), target).backward()
        compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
        F.cross_entropy(compiled(x), target).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=name)
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=name)


def test_a_traced_network_can_be_saved(tmp_path: Path) -> None:
    model = fusedres.resnet18(4).eval()
    x = torch.randn(2, 3, 64, 64)
    traced = torch.jit.trace(model, x)
    traced.save(tmp_path / "traced.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(x), model(x))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_needs_four_fifths_of_the_memory(dtype: torch.dtype) -> None:
    """What is alive after forward on the CPU, beside that of the plain modules."""
    images = torch.randn(4, 3, 224, 224).contiguous(memory_format=CHANNELS_LAST)
    found = []
    for plain in (True, False):
        model = FusedResNet50().to(memory_format=CHANNELS_LAST)
        if plain:
            unfuse(model)
        live = Live()
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with use_backend("cpp"), autocast, live:
            logits = model(images)
        found.append(live.bytes(model, images))
        assert logits.requires_grad  # until here it holds what backward needs
    assert 0.7 * found[0] < found[1] <= 0.8 * found[0]


def test_gradients_per_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch.func, which goes through the reference."""
    monkeypatch.setattr(stages, "_PLANES", (8, 8, 16, 16))
    monkeypatch.setitem(stages._DEPTHS, 50, (1, 1, 1, 1))
    model = FusedResNet50(4).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    state = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out = torch.func.functional_call(model, (parameters, state[1]), (x[None],))
        return out.square().sum()

    with use_backend("reference"):
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(state[0], x)
    for i in range(len(x)):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert relative(found[name][i].detach(), parameter.grad) < 1e-10
