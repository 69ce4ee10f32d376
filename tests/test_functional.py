"""conv_bn_relu and bn_add_relu on plain tensors, against plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import fusedres
from fusedres.testing import (
    CHANNELS_LAST,
    CONTIGUOUS,
    Inputs,
    Maker,
    Outputs,
    check_case,
    eager_batch_norm,
    norm_arguments,
    serving_backends,
)

BACKENDS = serving_backends()


@dataclass(frozen=True)
class ConvBnRelu:
    """conv_bn_relu with all of its arguments in use."""

    residual: bool = True
    relu: bool = True

    def inputs(self, make: Maker) -> Inputs:
        t = {"x": make.activation(3, 4, 9, 8), "w": make.weight(6, 4, 3, 3)}
        if self.residual:
            t["r"] = make.activation(3, 6, 5, 4)
        return t | make.norm("n", 6)

    def ours(self, t: Inputs) -> Outputs:
        norm = norm_arguments(t, "n")
        options = {"stride": 2, "padding": 1, "residual": t.get("r"), "relu": self.relu}
        return {"out": fusedres.conv_bn_relu(t["x"], t["w"], *norm, **options)}  # type: ignore[arg-type]

    def eager(self, t: Inputs) -> Outputs:
        u = eager_batch_norm(F.conv2d(t["x"], t["w"], None, 2, 1), t, "n", True)
        u = u + t["r"] if self.residual else u
        return {"out": u.relu() if self.relu else u}


@dataclass(frozen=True)
class BnAddRelu:
    """bn_add_relu."""

    def inputs(self, make: Maker) -> Inputs:
        t = {"y": make.activation(3, 6, 5, 4), "r": make.activation(3, 6, 5, 4)}
        return t | make.norm("n", 6)

    def ours(self, t: Inputs) -> Outputs:
        return {"out": fusedres.bn_add_relu(t["y"], *norm_arguments(t, "n"), residual=t["r"])}

    def eager(self, t: Inputs) -> Outputs:
        return {"out": (eager_batch_norm(t["y"], t, "n", True) + t["r"]).relu()}


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [ConvBnRelu(), ConvBnRelu(residual=False), ConvBnRelu(relu=False), BnAddRelu()],
    ids=str,
)
def test_three_way(
    case: ConvBnRelu | BnAddRelu,
    backend: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    check_case(case, backend, dtype, memory_format)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_what_it_is_given(backend: str) -> None:
    make = Maker(torch.float32)
    t = ConvBnRelu().inputs(make)
    with fusedres.use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        out = ConvBnRelu().ours(t)["out"]
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    for name, x in t.items():
        if x.requires_grad:
            assert x.grad is not None and x.grad.dtype == torch.float32, name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = ConvBnRelu().eager(t)["out"]
    torch.testing.assert_close(out.float(), plain.float(), rtol=0.05, atol=0.05)


def test_errors_name_the_argument_and_write_nothing() -> None:
    x, w = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1)
    running = [torch.zeros(5), torch.ones(5)]
    with pytest.raises(ValueError, match=r"residual must have shape \[2, 5, 4, 4\]"):
        fusedres.conv_bn_relu(x, w, None, None, *running, residual=x)
    with pytest.raises(ValueError, match=r"residual must have shape \[2, 3, 4, 4\]"):
        fusedres.bn_add_relu(x, None, None, residual=x[:1])
    assert not running[0].any() and (running[1] == 1).all()
