"""The ways of running a network: named, built, and all computing the same."""

from __future__ import annotations

import contextlib
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fusedres
from fusedres import backends
from fusedres.bench import Workload, build, default_names, providers
from fusedres.bench.networks import BLOCKS
from fusedres.bench.providers import Way

SMALL = Workload(batch=4, size=32, dtype=torch.float64, num_classes=10)
BLOCK = Workload(batch=2, size=9, dtype=torch.float64, block="ConvBlock 2")
OURS = ["fusedres", "fusedres-reference"]


@pytest.mark.parametrize(
    ("name", "shown", "model", "backend", "plan", "mode"),
    [
        ("eager", "eager", "eager", None, None, ""),
        ("graph", "graph", "eager", None, None, "graph"),
        ("compile-max", "compile-max", "eager", None, None, "compile-max"),
        ("compile-max-nograph", "compile-max-nograph", "eager", None, None, "compile-max-nograph"),
        ("eager-nchw", "eager-nchw", "eager-nchw", None, None, ""),
        ("torchvision-compile", "torchvision-compile", "torchvision", None, None, "compile"),
        ("fusedres", "fusedres", "fusedres", None, "auto", ""),
        ("fusedres-cuda", "fusedres-cuda", "fusedres", "cuda", "auto", ""),
        (
            "fusedres-triton-split-graph",
            "fusedres-triton-graph",
            "fusedres",
            "triton",
            "split",
            "graph",
        ),
        ("cudnn-fused-graph", "cudnn-fused-graph", "cudnn-fused", None, None, "graph"),
        ("fusedres-cpp-frozen", "fusedres-cpp-frozen", "fusedres", "cpp", "auto", ""),
        (
            "fusedres-auto-frozen-split-graph",
            "fusedres-auto-frozen-graph",
            "fusedres",
            "auto",
            "split",
            "graph",
        ),
    ],
)
def test_a_name_says_whose_and_how(
    name: str, shown: str, model: str, backend: str | None, plan: str | None, mode: str
) -> None:
    way = Way(name)
    found = (way.name, way.model, way.backend, way.plan, way.mode)
    assert found == (shown, model, backend, plan, mode)
    assert way.frozen == ("frozen" in name)


@pytest.mark.parametrize(
    "name", ["compiled", "fusedres-opencl", "fusedres-cpp-best", "fusedres-cpp-split-fused", ""]
)
def test_names_that_are_none(name: str) -> None:
    if name == "":
        assert Way(name).model == "eager"
        return
    with pytest.raises(ValueError, match=rf"got '{name}', accepted: eager, eager-nchw"):
        build(name, SMALL)


@pytest.mark.parametrize(
    ("name", "work", "reason"),
    [
        ("graph", SMALL, "graph needs a GPU"),
        ("cudnn-fused", replace(SMALL, training=False), "cudnn-fused needs a GPU"),
        ("compile-freeze", SMALL, "for inference"),
        ("fusedres-auto-frozen", SMALL, "fusedres-auto-frozen is for inference"),
        ("timm", BLOCK, "runs whole networks"),
        ("fusedres-cuda", SMALL, "'cuda' serves cuda tensors, not cpu"),
    ],
)
def test_what_cannot_run_is_said_before_it_is_built(name: str, work: Workload, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        build(name, work)
    assert name not in default_names(work)


@pytest.mark.parametrize("work", [SMALL, replace(SMALL, training=False), BLOCK], ids=str)
def test_providers_compute_the_same(work: Workload) -> None:
    truth = build("eager", work)
    truth.run()
    inferring = ["eager-nchw", "fusedres-auto", "fusedres-auto-frozen", "fusedres-reference-frozen"]
    for name in OURS if work.training else inferring:
        ours = build(name, work)
        result = ours.run()
        torch.testing.assert_close(ours.output[0], truth.output[0], rtol=1e-10, atol=1e-10)
        assert not result.requires_grad
        if not work.training:
            continue
        for mine, true in zip(ours.leaves, truth.leaves, strict=True):
            assert mine.grad is not None and true.grad is not None
            off, norm = (mine.grad - true.grad).norm(), true.grad.norm()
            assert off <= 1e-6 * norm  # four values a channel in the last stage: ill-conditioned


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_have_their_places_shape(name: str) -> None:
    stage = int(name[-1])
    filters = 64 * 2 ** (stage - 1)
    work = Workload(1, 8, block=name)
    provider = build("eager", work)
    out = provider.run()
    halved = name.startswith("Conv") and stage > 1
    assert tuple(out.shape) == (1, 4 * filters, 4 if halved else 8, 4 if halved else 8)
    assert provider.leaves[-1].shape == work.shape


def test_a_training_step_trains() -> None:
    provider = build("fusedres", Workload(batch=2, size=32, num_classes=10))
    first, second = provider.run(), provider.run()
    assert first.dim() == 0 and not first.requires_grad and first != second


def test_half_types_train_under_autocast_and_infer_with_cast_weights() -> None:
    work = replace(SMALL, dtype=torch.bfloat16)
    trained, served = build("fusedres", work), build("fusedres", replace(work, training=False))
    trained.run()
    served.run()
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
    assert {p.dtype for p in served.model.parameters()} == {torch.bfloat16}
    assert trained.output[0].dtype == served.output[0].dtype == torch.bfloat16
    assert trained.model.training and not served.model.training
    frozen = build("fusedres-auto-frozen", replace(work, training=False))
    frozen.run()
    assert frozen.backend == trained.backend and isinstance(frozen.model.bn1, torch.nn.Identity)
    torch.testing.assert_close(frozen.output[0], served.output[0], rtol=0.1, atol=0.1)


def test_providers_say_what_runs_them() -> None:
    model = fusedres.FusedResNet50(10).double()
    found = {name: build(name, SMALL).backend for name in ("fusedres", "eager")}
    assert found == {"fusedres": fusedres.report(model)[0].backend, "eager": "torch"}
    with fusedres.use_backend("reference"):
        assert build("fusedres", SMALL).backend == "reference"


def test_building_a_provider_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    build("eager", SMALL)
    assert torch.equal(before, torch.get_rng_state())


def test_eager_comes_first_and_all_defaults_can_run() -> None:
    for work in (SMALL, BLOCK, replace(SMALL, training=False, dtype=torch.bfloat16)):
        names = default_names(work)
        assert names[0] == "eager" and len(names) == len(set(names))
        assert "fusedres-reference" in names and "compile" in names
        assert set(default_names(work, quick=True)) < set(names)


def test_hand_fused_inference_is_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """With cuDNN's two functions in plain torch: weights, strides, order and shortcuts."""

    def conv_relu(x, weight, bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def conv_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z)

    fake = types.SimpleNamespace(
        cudnn_convolution_relu=conv_relu, cudnn_convolution_add_relu=conv_add_relu
    )
    monkeypatch.setattr(providers, "aten", fake)
    torch.manual_seed(3)
    model = fusedres.FusedResNet50(10).double()
    with torch.no_grad():
        for bn in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            bn.running_mean.uniform_(-0.5, 0.5)
            bn.running_var.uniform_(0.5, 1.5)
            bn.bias.uniform_(-0.5, 0.5)
        images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        expected = model.eval()(images)
        found = providers._cudnn_fused(model, torch.float64)(images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_providers_on_a_gpu_compute_the_same(training: bool) -> None:
    work = Workload(4, 64, torch.float32, "cuda", 10, training=training)
    truth = build("eager", replace(work, dtype=torch.float64))
    truth.run()
    pool = torch.cuda.graph_pool_handle()
    names = ["graph", "fusedres-auto", "fusedres-auto-graph", "compile"]
    for name in names + ([] if training else ["cudnn-fused", "cudnn-fused-graph"]):
        provider = build(name, work, pool)
        if training:
            fresh = build("eager", work).model
            with torch.no_grad():
                pairs = zip(provider.model.parameters(), fresh.parameters(), strict=True)
                for mine, start in pairs:
                    mine.copy_(start)
        provider.run()
        torch.testing.assert_close(
            provider.output[0].double(), truth.output[0], rtol=2e-2, atol=2e-2
        )


def test_only_ours_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    unfused: list[torch.nn.Module] = []
    monkeypatch.setattr(providers, "unfuse", lambda model, inplace: unfused.append(model))
    models = {name: build(name, SMALL).model for name in ("eager", "eager-nchw", "fusedres")}
    assert unfused == [models["eager"], models["eager-nchw"]]


def test_backend_plan_and_layout_are_those_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build("fusedres-reference", SMALL).backend == "reference"
    weights = {n: build(n, SMALL).model.layer1[0].conv2.weight for n in ("eager", "eager-nchw")}
    assert weights["eager-nchw"].is_contiguous()
    assert weights["eager"].is_contiguous(memory_format=torch.channels_last)
    asked = []

    def use_plan(name: str) -> contextlib.AbstractContextManager[None]:
        asked.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr(backends, "use_plan", use_plan)
    build("fusedres-reference-split", SMALL).run()
    assert set(asked) == {"split"}


def test_gradients_do_not_pile_up() -> None:
    provider = build("eager", BLOCK)
    provider.run()
    first = [leaf.grad.clone() for leaf in provider.leaves]
    provider.run()
    for leaf, grad in zip(provider.leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, grad)
