"""The triton backend on a GPU, where bf16 can be trusted: ResNet-50's shapes, every configuration,
every dataflow.

Needs torch, triton, numpy and pytest only.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from test_conv_bn_relu_maxpool import Stem
from torch import Tensor

import fusedres
from fusedres import Deferred, use_backend, use_plan
from fusedres._conv import Conv, output_shape
from fusedres._plan_table import Shape
from fusedres._plans import DATAFLOWS
from fusedres.models import stages
from fusedres.ops import conv_bn
from fusedres.testing import (
    CHANNELS_LAST,
    HALF_TYPES,
    Inputs,
    Maker,
    Outputs,
    assert_three_way,
    check_case,
    eager_batch_norm,
    norm_arguments,
    run,
)

if TYPE_CHECKING:
    from fusedres.triton_kernels._launch import Launch

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PLANS = ["fused", "split"]
OPTIONED = ["fused+masks", "fused+merged", "epilogue", "split+keep"]


@dataclass(frozen=True)
class Layer:
    """One convolution of a ResNet-50 as it stands there: what it reads, and its shape."""

    source: str  # "tensor", "none", "tensor_residual", "deferred_residual"
    in_channels: int
    out_channels: int
    size: int  # of the input's map
    stride: int = 1
    emit: bool = False
    batch: int = 8
    relu: bool = True
    kernel: int = 1

    def __str__(self) -> str:
        flags = f"{self.kernel}x{self.kernel},s{self.stride}" + (",emit" if self.emit else "")
        return f"{self.source},{self.in_channels}-{self.out_channels}@{self.size},{flags}"

    def inputs(self, make: Maker) -> Inputs:
        shape = (self.batch, self.in_channels, self.size, self.size)
        t = {"x": make.activation(*shape)} | make.norm("n0", self.in_channels)
        if self.source.endswith("residual"):
            t["r"] = make.activation(*shape)
        if self.source == "deferred_residual":
            t |= make.norm("nr", self.in_channels)
        t["w"] = make.weight(self.out_channels, self.in_channels, self.kernel, self.kernel)
        return t | make.norm("n", self.out_channels)

    def ours(self, t: Inputs) -> Outputs:
        from fusedres.ops import batch_norm

        x: Tensor | Deferred = t["x"]
        residual: Tensor | Deferred | None = t.get("r")
        if self.source == "deferred_residual":
            residual = batch_norm(t["r"], *norm_arguments(t, "nr"), relu=False)
        if self.source != "tensor":
            x = batch_norm(t["x"], *norm_arguments(t, "n0"), residual=residual, relu=self.relu)
        h = conv_bn(
            x, t["w"], *norm_arguments(t, "n"), stride=self.stride, padding=self.kernel // 2,
            emit=self.emit, relu=self.relu,
        )  # fmt: skip
        if self.emit:
            return {"value": h[0].value(), "emitted": h[1]}  # type: ignore[index, union-attr]
        return {"value": h.value()}  # type: ignore[union-attr]

    def eager(self, t: Inputs) -> Outputs:
        a = t["x"]
        if self.source != "tensor":
            a = eager_batch_norm(a, t, "n0", True)
            if self.source == "tensor_residual":
                a = a + t["r"]
            if self.source == "deferred_residual":
                a = a + eager_batch_norm(t["r"], t, "nr", True)
            a = a.relu() if self.relu else a
        value = eager_batch_norm(
            F.conv2d(a, t["w"], None, self.stride, self.kernel // 2), t, "n", True
        )
        value = value.relu() if self.relu else value
        return {"value": value, "emitted": a} if self.emit else {"value": value}


LAYERS = [
    Layer("tensor", 64, 64, 56, emit=True),
    Layer("tensor", 64, 256, 56),
    Layer("none", 64, 256, 56),
    Layer("deferred_residual", 256, 64, 56, emit=True),
    Layer("tensor_residual", 256, 64, 56, emit=True),
    Layer("tensor_residual", 256, 128, 56, emit=True),
    Layer("tensor", 256, 512, 56, stride=2),
    Layer("none", 128, 512, 28),
    Layer("deferred_residual", 512, 128, 28, emit=True),
    Layer("tensor_residual", 512, 256, 28, emit=True),
    Layer("tensor", 512, 1024, 28, stride=2),
    Layer("none", 256, 1024, 14),
    Layer("tensor_residual", 1024, 256, 14, emit=True),
    Layer("tensor_residual", 1024, 512, 14, emit=True),
    Layer("tensor", 1024, 2048, 14, stride=2),
    Layer("none", 512, 2048, 7),
    Layer("deferred_residual", 2048, 512, 7, emit=True),
    Layer("none", 256, 512, 56, stride=2),  # a Deferred read with stride
    Layer("deferred_residual", 64, 128, 15, stride=2),
    Layer("tensor_residual", 24, 40, 13, emit=True),  # no power of two
    Layer("deferred_residual", 5, 11, 9, emit=True),  # no access of 16 bytes
    Layer("none", 64, 64, 56, kernel=3),
    Layer("none", 128, 128, 56, stride=2, kernel=3),
    Layer("none", 256, 256, 14, kernel=3),
    Layer("none", 512, 512, 14, stride=2, kernel=3),
    Layer("none", 512, 512, 7, kernel=3),
    Layer("deferred_residual", 24, 40, 13, kernel=3),
    Layer("tensor", 3, 64, 64, stride=2, kernel=7),  # the stem
]
SPATIAL = [layer for layer in LAYERS if layer.kernel == 3]


@pytest.fixture(autouse=True)
def _no_tf32():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def check(layer: Layer, dtype: torch.dtype, plan: str) -> None:
    """The three-way rule, with ReLU in fp32 and, where its mask flips by chance, without."""
    if dtype in HALF_TYPES:
        layer = replace(layer, relu=False)
    check_case(layer, "triton", dtype, CHANNELS_LAST, "cuda", plan=plan)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_resnet50_shapes(layer: Layer, dtype: torch.dtype, plan: str) -> None:
    check(layer, dtype, plan)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_masks_in_half_types(layer: Layer, dtype: torch.dtype) -> None:
    check_case(layer, "triton", dtype, CHANNELS_LAST, "cuda", trim=0.01, plan="fused")


@pytest.mark.parametrize("plan", OPTIONED)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_plans_with_options(layer: Layer, plan: str) -> None:
    check(layer, torch.bfloat16, plan)


@pytest.mark.parametrize("name", DATAFLOWS)
def test_dataflows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network in fp64 equals the reference."""
    monkeypatch.setattr(stages, "_PLANES", (64, 64, 64, 64))
    monkeypatch.setitem(stages._DEPTHS, 50, (2, 1, 1, 1))
    model = fusedres.FusedResNet50(10).cuda().double().to(memory_format=CHANNELS_LAST)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64, device="cuda")
    found = []
    for backend, plan in (("triton", name), ("reference", "auto")):
        twin = copy.deepcopy(model)
        with use_backend(backend), use_plan(plan):
            out = twin(x)
            out.square().sum().backward()
        found.append({"out": out.detach()} | {n: p.grad for n, p in twin.named_parameters()})
    for key, truth in found[1].items():
        ours = found[0][key]
        assert ours is not None and truth is not None and truth.any()
        assert (ours - truth).abs().max() <= 1e-10 * truth.abs().max(), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_the_stem(plan: str, dtype: torch.dtype) -> None:
    trim = 0.02 if dtype in HALF_TYPES else 0.0  # where rounding changes a window's winner
    check_case(Stem((4, 3, 64, 96), 64), "triton", dtype, CHANNELS_LAST, "cuda", trim, plan)


@pytest.mark.parametrize("layer", LAYERS[3:6], ids=str)
def test_chunks_of_several_tiles(layer: Layer) -> None:
    """A batch from which a program takes more than one tile of rows."""
    check(replace(layer, batch=96), torch.bfloat16, "fused")


SWEPT = [LAYERS[2], LAYERS[3], LAYERS[6], LAYERS[12], *SPATIAL[:3]]


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [(layer, kernel) for kernel in ("fwd", "dgrad", "wgrad") for layer in SWEPT]
    + [(LAYERS[-1], "fwd"), (LAYERS[-1], "wgrad"), (LAYERS[2], "bwd"), (LAYERS[3], "bwd")],
    ids=str,
)
def test_every_configuration(layer: Layer, kernel: str) -> None:
    """Each candidate against fp64, not only the one that is taken."""
    from fusedres.triton_kernels import _configs

    sides = (layer.kernel, layer.kernel), (layer.stride, layer.stride)
    shape = Shape(layer.in_channels, layer.out_channels, *sides)
    tried = 0
    for config in _configs.candidates(kernel, shape):
        try:
            with _configs.trying({kernel: config}):
                check(layer, torch.bfloat16, "fused+merged" if kernel == "bwd" else "fused")
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise AssertionError(f"{config}: {error}") from error
            continue
        tried += 1
    assert tried


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype) -> None:
    for layer in (LAYERS[3], LAYERS[6]):
        with use_backend("triton"), use_plan("fused"):
            first, second = (
                dict(run(layer.ours, layer.inputs(Maker(dtype, CHANNELS_LAST, "cuda"))))
                for _ in range(2)
            )
        for name, result in first.items():
            assert torch.equal(result, second[name]), (layer, name)


@dataclass(frozen=True)
class Act:
    """A convolution of an inference, with all that may follow it; `frames`: of a camera's bytes."""

    in_channels: int
    out_channels: int
    size: int
    kernel: int = 1
    stride: int = 1
    residual: bool = False
    batch: int = 8
    frames: bool = False

    def __str__(self) -> str:
        flags = f"{self.kernel}x{self.kernel},s{self.stride},n{self.batch}"
        flags += ",residual" * self.residual + ",frames" * self.frames
        return f"{self.in_channels}-{self.out_channels}@{self.size},{flags}"

    @property
    def conv(self) -> Conv:
        return Conv((self.stride,) * 2, (self.kernel // 2,) * 4, (1, 1), 1)

    def inputs(self, make: Maker) -> Inputs:
        shape = (self.batch, self.in_channels, self.size, self.size)
        t = {"x": make.activation(*shape, grad=False)}
        if self.frames:
            pixels = (shape[0], *shape[2:], shape[1])
            t["x"] = torch.randint(0, 256, pixels, dtype=torch.uint8, device="cuda")
            t["times"] = torch.tensor([0.0171, 0.0175, 0.0174], device="cuda")
            t["plus"] = torch.tensor([-2.1, -2.0, -1.8], device="cuda")
        weight = make.weight(self.out_channels, self.in_channels, self.kernel, self.kernel)
        t["weight"] = weight.detach()
        norm = make.norm("n", self.out_channels)
        t |= {"scale": norm["n.weight"].detach(), "bias": norm["n.bias"].detach()}
        if self.residual:
            out = output_shape(shape, weight.shape, self.conv)
            t["residual"] = make.activation(*out, grad=False)
        return t

    def ours(self, t: Inputs) -> Tensor:
        from fusedres.triton_kernels.conv_act import conv_act

        normalize = (t["times"], t["plus"]) if self.frames else None
        own = (t["scale"], t["bias"], t.get("residual"), True)
        return conv_act(t["x"], t["weight"], self.conv, *own, normalize=normalize)

    def plain(self, t: Inputs) -> Tensor:
        x, dtype = t["x"], t["weight"].dtype
        if self.frames:
            x = (x * t["times"] + t["plus"]).to(dtype).permute(0, 3, 1, 2)
        u = F.conv2d(x, t["weight"], None, self.stride, self.kernel // 2)
        u = u * t["scale"].view(-1, 1, 1).to(dtype) + t["bias"].view(-1, 1, 1).to(dtype)
        return (u + t["residual"] if self.residual else u).relu()


ACTS = [
    Act(64, 64, 56),
    Act(64, 256, 56, residual=True),
    Act(256, 64, 56),
    Act(256, 512, 56, stride=2),
    Act(128, 512, 28, residual=True),
    Act(1024, 256, 14),
    Act(1024, 2048, 14, stride=2),
    Act(512, 2048, 7, residual=True),
    Act(2048, 512, 7),
    Act(64, 64, 56, 3),
    Act(128, 128, 56, 3, 2),
    Act(128, 128, 28, 3),
    Act(256, 256, 14, 3),
    Act(512, 512, 14, 3, 2),
    Act(512, 512, 7, 3),
    Act(512, 512, 7, 3, residual=True),
    Act(24, 40, 13, 3, residual=True),  # no power of two
    Act(5, 11, 9, 3),  # no access of 16 bytes
    Act(3, 64, 224, 7, 2),
    Act(3, 64, 224, 7, 2, frames=True),
    Act(4, 96, 64, 11, 4),
]


def check_act(layer: Act, dtype: torch.dtype) -> list[Launch]:
    """The three-way rule; which kernels ran."""
    from fusedres.triton_kernels import _launch

    t = layer.inputs(Maker(dtype, CHANNELS_LAST, "cuda"))
    wide = {n: v if v.dtype == torch.uint8 else v.double() for n, v in t.items()}
    with _launch.recording() as launches:
        y = layer.ours(t)
    assert_three_way("y", [y], [layer.plain(t)], [layer.plain(wide)], dtype)
    return launches


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", ACTS, ids=str)
def test_conv_act(layer: Act, dtype: torch.dtype, batch: int) -> None:
    check_act(replace(layer, batch=batch), dtype)


@pytest.mark.parametrize("programs", [2, 5, 64])
@pytest.mark.parametrize("layer", [ACTS[5], ACTS[7], ACTS[14], ACTS[16], ACTS[19]], ids=str)
def test_conv_act_by_several_programs(layer: Act, programs: int) -> None:
    """A reduction divided; the same bits each time, and in a graph."""
    from fusedres.triton_kernels import _configs

    few = _configs.Config(64, 64, 64, 4, 3, programs)
    with _configs.trying({"act": few, "act_stem": few}):
        launches = check_act(replace(layer, batch=1), torch.bfloat16)
        assert launches[-1].name == "conv_act_sum_kernel"
        t = layer.inputs(Maker(torch.bfloat16, CHANNELS_LAST, "cuda"))
        first, second = layer.ours(t), layer.ours(t)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            third = layer.ours(t)
        graph.replay()
    assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize("layer", [*ACTS[:4], *ACTS[9:11], *ACTS[15:19]], ids=str)
def test_every_configuration_of_conv_act(layer: Act, programs: int) -> None:
    from fusedres.triton_kernels import _configs

    kernel = "act_stem" if layer.in_channels <= 4 else "act"
    sides = (layer.kernel, layer.kernel), (layer.stride, layer.stride)
    shape = Shape(layer.in_channels, layer.out_channels, *sides)
    arch = _configs.arch_of(torch.device("cuda", torch.cuda.current_device()))
    for config in _configs.candidates(kernel, shape, arch):
        with _configs.trying({kernel: replace(config, programs=programs)}):
            check_act(layer, torch.bfloat16)
