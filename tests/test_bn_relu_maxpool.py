"""bn_relu_maxpool: three-way rule, ties, NaN, windows of every kind, gradcheck, opcheck, errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fusedres import Deferred, use_backend
from fusedres.ops import batch_norm, bn_relu_maxpool
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


@dataclass(frozen=True)
class Pooled:
    """max_pool2d(relu(bn(y)))."""

    shape: tuple[int, int, int, int] = (2, 3, 8, 7)
    kernel_size: int = 3
    stride: int = 2
    padding: int = 1

    def inputs(self, make: Maker) -> Inputs:
        return {"y": make.activation(*self.shape)} | make.norm("n", self.shape[1])

    def ours(self, t: Inputs) -> Outputs:
        d = batch_norm(t["y"], *norm_arguments(t, "n"))
        return {"pooled": bn_relu_maxpool(d, self.kernel_size, self.stride, self.padding)}

    def eager(self, t: Inputs) -> Outputs:
        a = eager_batch_norm(t["y"], t, "n", True).relu()
        return {"pooled": F.max_pool2d(a, self.kernel_size, self.stride, self.padding)}


CASES = [
    Pooled((2, 64, 16, 16)),  # the stem
    Pooled((2, 16, 15, 17), padding=0),  # the assignment's
    Pooled((3, 1, 9, 5)),
    Pooled((1, 5, 7, 7), 2, 2, 0),  # windows that do not overlap
    Pooled((2, 3, 6, 6), 2, 3, 1),  # gaps that no window covers
    Pooled((2, 4, 9, 9), 5, 1, 2),  # every pixel in 25 windows
    Pooled((9, 5, 1, 1), 3, 2, 1),  # nothing but padding around one pixel
    Pooled((2, 3, 4, 4), 1, 1, 0),
]


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_way(
    case: Pooled, backend: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    if not serves(backend, "bn_relu_maxpool", dtype):
        return
    if dtype in HALF_TYPES:  # large, and without the few that flip: the winner changes by rounding
        case = replace(case, shape=(8, case.shape[1], *case.shape[2:]))
        check_case(case, backend, dtype, memory_format, trim=0.02)
    else:
        check_case(case, backend, dtype, memory_format)


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nan", [False, True])
def test_ties_and_nan_go_where_torch_sends_them(
    backend: str, dtype: torch.dtype, memory_format: torch.memory_format, nan: bool
) -> None:
    if not serves(backend, "bn_relu_maxpool", dtype):
        return
    y = torch.randint(-2, 3, (3, 5, 11, 9)).to(dtype).contiguous(memory_format=memory_format)
    if nan:
        y[torch.rand(y.shape) < 0.1] = float("nan")
    y.requires_grad_()
    identity = (torch.ones(5), torch.zeros(5), torch.zeros(5), torch.ones(5))
    with use_backend(backend):
        d = batch_norm(y, *identity, training=False, eps=0.0)
        pooled = bn_relu_maxpool(d)
    plain = F.max_pool2d(y.relu(), 3, 2, 1)
    assert torch.equal(pooled.nan_to_num(99.0), plain.nan_to_num(99.0))
    grad = torch.randint(1, 9, pooled.shape).to(dtype)
    (ours,), (theirs,) = (torch.autograd.grad(out, y, grad) for out in (pooled, plain))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [Pooled((2, 2, 5, 4)), Pooled((2, 2, 5, 5), 2, 2, 0)], ids=str)
def test_gradcheck(case: Pooled, backend: str) -> None:
    gradcheck(case, backend)


@pytest.mark.parametrize("backend", PROTOCOL)
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
def test_opcheck(backend: str, memory_format: torch.memory_format) -> None:
    y = torch.randn(2, 4, 7, 6).contiguous(memory_format=memory_format)
    arguments = (y, torch.rand(4), torch.rand(4), torch.rand(4), 3, 2, 1, backend)
    torch.library.opcheck(torch.ops.fusedres.bn_relu_maxpool_fwd, arguments)
    pooled = torch.ops.fusedres.bn_relu_maxpool_fwd(*arguments)
    backward = (torch.randn_like(pooled), *arguments)
    torch.library.opcheck(torch.ops.fusedres.bn_relu_maxpool_bwd, backward)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    t = Pooled((0, 3, 8, 8)).inputs(Maker(torch.float32))
    with use_backend(backend):
        pooled = Pooled((0, 3, 8, 8)).ours(t)["pooled"]
        pooled.sum().backward()
    assert pooled.shape == (0, 3, 4, 4)
    assert t["n.weight"].grad is not None and not t["n.weight"].grad.any()


V = torch.ones(3)
D = Deferred(torch.randn(2, 3, 4, 4), V, V, V)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((D.y,), TypeError, "input must be a Deferred, got Tensor"),
        ((Deferred(D.y, V, V, V, relu=False),), ValueError, "with ReLU and no residual"),
        ((Deferred(D.y, V, V, V, D.y),), ValueError, "with ReLU and no residual"),
        ((D, 0), ValueError, "kernel_size must be at least 1"),
        ((D, 16), ValueError, "kernel_size must be at most 15"),
        ((D, 2.0), TypeError, "kernel_size must be an int"),
        ((D, 3, 0), ValueError, "stride must be at least 1"),
        ((D, 3, 2, -1), ValueError, "padding must be at least 0"),
        ((D, 3, 2, 2), ValueError, "padding must be at most half of kernel_size 3"),
        ((D, 7, 2, 1), ValueError, "kernel_size 7 does not fit the padded input"),
    ],
)
def test_errors_name_the_argument(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"bn_relu_maxpool: .*{message}"):
        bn_relu_maxpool(*arguments)
