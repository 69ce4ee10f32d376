"""The triton backend on a GPU, where bf16 can be trusted: ResNet-50's shapes, every configuration.

Needs torch, triton, numpy and pytest only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import Deferred, use_backend, use_plan
from fusedres.ops import conv_bn
from fusedres.testing import (
    CHANNELS_LAST,
    HALF_TYPES,
    Inputs,
    Maker,
    Outputs,
    check_case,
    eager_batch_norm,
    norm_arguments,
    run,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PLANS = ["fused", "split"]


@dataclass(frozen=True)
class Layer:
    """One 1x1 convolution of a ResNet-50 as it stands there: what it reads, and its shape."""

    source: str  # "tensor", "none", "tensor_residual", "deferred_residual"
    in_channels: int
    out_channels: int
    size: int  # of the input's map
    stride: int = 1
    emit: bool = False
    batch: int = 8
    relu: bool = True

    def __str__(self) -> str:
        flags = f"s{self.stride}" + (",emit" if self.emit else "")
        return f"{self.source},{self.in_channels}-{self.out_channels}@{self.size},{flags}"

    def inputs(self, make: Maker) -> Inputs:
        shape = (self.batch, self.in_channels, self.size, self.size)
        t = {"x": make.activation(*shape)} | make.norm("n0", self.in_channels)
        if self.source.endswith("residual"):
            t["r"] = make.activation(*shape)
        if self.source == "deferred_residual":
            t |= make.norm("nr", self.in_channels)
        t["w"] = make.weight(self.out_channels, self.in_channels, 1, 1)
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
            x, t["w"], *norm_arguments(t, "n"), stride=self.stride, emit=self.emit, relu=self.relu
        )
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
        value = eager_batch_norm(F.conv2d(a, t["w"], stride=self.stride), t, "n", True)
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
]


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


@pytest.mark.parametrize("layer", LAYERS[3:6], ids=str)
def test_chunks_of_several_tiles(layer: Layer) -> None:
    """A batch from which a program takes more than one tile of rows."""
    check(replace(layer, batch=96), torch.bfloat16, "fused")


@pytest.mark.parametrize("kernel", ["fwd", "dgrad", "wgrad"])
@pytest.mark.parametrize("layer", [LAYERS[2], LAYERS[3], LAYERS[6], LAYERS[12]], ids=str)
def test_every_configuration(layer: Layer, kernel: str) -> None:
    """Each candidate against fp64, not only the one that is taken."""
    from fusedres.triton_kernels import _configs

    tried = 0
    for config in _configs.candidates(kernel):
        try:
            with _configs.trying({kernel: config}):
                check(layer, torch.bfloat16, "fused")
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
