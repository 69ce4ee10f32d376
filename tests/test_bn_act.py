"""bn_act: a Deferred built by hand against the formula, NaN, opcheck, errors; gradients are
test_conv_bn's too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fusedres import Deferred, use_backend
from fusedres.ops import batch_norm, bn_act
from fusedres.testing import (
    CHANNELS_LAST,
    CONTIGUOUS,
    HALF_TYPES,
    Inputs,
    Maker,
    Outputs,
    check_case,
    eager_batch_norm,
    gradcheck,
    norm_arguments,
    serves,
    serving_backends,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = serving_backends()
PROTOCOL = [b for b in BACKENDS if b != "reference"]
SHAPES = [(4, 64, 9, 7), (2, 3, 5, 5), (5, 1, 3, 3), (6, 7, 1, 1), (1, 65, 4, 4)]


@dataclass(frozen=True)
class Joined:
    """act(bn(y) [+ residual | + bn(residual)])."""

    residual: str  # "none", "tensor" or "deferred"
    shape: tuple[int, int, int, int] = (2, 3, 3, 2)
    relu: bool = True

    def inputs(self, make: Maker) -> Inputs:
        t = {"y": make.activation(*self.shape), "r": make.activation(*self.shape)}
        if self.residual == "none":
            del t["r"]
        if self.residual == "deferred":
            t |= make.norm("nr", self.shape[1])
        return t | make.norm("n", self.shape[1])

    def ours(self, t: Inputs) -> Outputs:
        r: Any = t.get("r")
        if self.residual == "deferred":
            r = batch_norm(r, *norm_arguments(t, "nr"), relu=False)
        d = batch_norm(t["y"], *norm_arguments(t, "n"), relu=self.relu, residual=r)
        return {"value": bn_act(d)}

    def eager(self, t: Inputs) -> Outputs:
        u = eager_batch_norm(t["y"], t, "n", True)
        if self.residual == "tensor":
            u = u + t["r"]
        if self.residual == "deferred":
            u = u + eager_batch_norm(t["r"], t, "nr", True)
        return {"value": u.relu() if self.relu else u}


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual", ["none", "tensor", "deferred"])
def test_three_way(
    residual: str,
    shape: tuple[int, int, int, int],
    backend: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    if serves(backend, "bn_act", dtype):
        relu = dtype not in HALF_TYPES  # its mask flips by chance there; the next test looks at it
        check_case(Joined(residual, shape, relu), backend, dtype, memory_format)


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", PROTOCOL)
def test_backward_kernel_to_the_bit(
    backend: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    make = Maker(dtype, memory_format)
    grad, a, y, r = (make.activation(3, 17, 9, 5, grad=False) for _ in range(4))
    a = a.relu()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean, res_mean = torch.randn(17, dtype=wide), torch.randn(17, dtype=wide)
    g, sums, res_sums = torch.ops.fusedres.bn_act_bwd(grad, a, y, mean, r, res_mean, backend)
    assert torch.equal(g, torch.where(a > 0, grad, torch.zeros_like(grad)))
    assert g.stride() == y.stride()
    for result, other, center in ((sums, y, mean), (res_sums, r, res_mean)):
        exact = g.double()
        centered = other.double() - center.double().view(1, -1, 1, 1)
        truth = torch.stack([exact.sum((0, 2, 3)), (exact * centered).sum((0, 2, 3))])
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", ["none", "tensor", "deferred"])
@pytest.mark.parametrize("relu", [True, False])
def test_gradcheck(backend: str, residual: str, relu: bool) -> None:
    gradcheck(Joined(residual, relu=relu), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
def test_relu_keeps_nan_both_ways(backend: str, memory_format: torch.memory_format) -> None:
    y = torch.randn(2, 4, 3, 3).contiguous(memory_format=memory_format)
    y[0, 1, 2, 0] = float("nan")
    y.requires_grad_()
    running = (torch.zeros(4), torch.ones(4))
    with use_backend(backend):
        value = batch_norm(y, None, None, *running, training=False).value()
    assert value.isnan().nonzero().tolist() == [[0, 1, 2, 0]]
    grad = torch.randn_like(value)
    (g,) = torch.autograd.grad(value, y, grad)
    (plain,) = torch.autograd.grad(y.relu(), y, grad)
    assert torch.equal(g == 0, plain == 0)


@pytest.mark.parametrize("backend", PROTOCOL)
@pytest.mark.parametrize("residual", ["none", "tensor", "deferred"])
@pytest.mark.parametrize("relu", [True, False])
def test_opcheck(backend: str, residual: str, relu: bool) -> None:
    y = torch.randn(2, 4, 5, 5).contiguous(memory_format=CHANNELS_LAST)
    vectors = [torch.rand(4) for _ in range(6)]
    r = None if residual == "none" else torch.randn_like(y)
    joined = (r, *(vectors[3:] if residual == "deferred" else (None, None, None)))
    forward = (y, *vectors[:3], *joined, relu, backend)
    torch.library.opcheck(torch.ops.fusedres.bn_act_fwd, forward)
    a = torch.ops.fusedres.bn_act_fwd(*forward) if relu else None
    other = (r, vectors[3]) if residual == "deferred" else (None, None)
    backward = (torch.randn_like(y), a, y, vectors[0], *other, backend)
    torch.library.opcheck(torch.ops.fusedres.bn_act_bwd, backward)


def test_bias_changed_between_forward_and_backward_is_noticed() -> None:
    y = torch.randn(2, 4, 3, 3, requires_grad=True)
    weight, bias = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    with use_backend("reference"):
        value = batch_norm(y, weight, bias).value()
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_errors_name_the_argument() -> None:
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(TypeError, match="bn_act: input must be a Deferred, got Tensor"):
        bn_act(x)  # type: ignore[arg-type]
    vector = torch.zeros(3)
    with pytest.raises(ValueError, match=r"bn_act: input.bias must have shape \[3\], got \[2\]"):
        bn_act(Deferred(x, vector, vector, vector[:2]))
    with pytest.raises(TypeError, match=r"bn_act: input\.y must be a Tensor, got list"):
        bn_act(Deferred([1.0], vector, vector, vector))  # type: ignore[arg-type]
