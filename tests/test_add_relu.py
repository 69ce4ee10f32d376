"""add_relu: bit for bit against torch, strides of every kind, gradcheck, opcheck, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedres import add_relu, use_backend
from fusedres.testing import CHANNELS_LAST, serves, serving_backends

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = serving_backends()
SHAPES = [(2, 64, 7, 7), (3, 5), (1,), (), (0, 3, 4, 4), (2, 3, 1, 1), (17, 13, 11)]


def check(x: Tensor, residual: Tensor, backend: str) -> None:
    """Forward and backward equal to torch's, bit for bit: one rounding each, like torch's."""
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    with use_backend(backend):
        out = add_relu(x, residual)
    plain = (x + residual).relu()
    assert torch.equal(out.nan_to_num(99.0), plain.nan_to_num(99.0))
    assert out.dtype == plain.dtype and out.is_contiguous() | out.is_contiguous(
        memory_format=CHANNELS_LAST
    )
    grad = torch.randn(out.shape).to(out.dtype)
    ours, theirs = (torch.autograd.grad(o, (x, residual), grad) for o in (out, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(shape: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    if serves(backend, "add_relu", dtype):
        check(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_nan(backend: str) -> None:
    nhwc = torch.randn(2, 6, 5, 4).contiguous(memory_format=CHANNELS_LAST)
    nchw = torch.randn(2, 6, 5, 4)
    nchw[0, 1, 2, 3] = float("nan")
    check(nhwc, nchw, backend)
    check(nchw, nhwc, backend)
    check(nchw.transpose(2, 3), nhwc.transpose(2, 3), backend)
    check(nchw[:, ::2], nhwc[:, ::2], backend)
    check(nchw[:1].expand(2, 6, 5, 4), nhwc, backend)
    with use_backend(backend):
        assert add_relu(nhwc, nchw).is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    x, r = (torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with use_backend(backend):
        assert torch.autograd.gradcheck(add_relu, (x, r))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_opcheck(backend: str) -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=CHANNELS_LAST)
    r = torch.randn(2, 3, 4, 5).contiguous(memory_format=CHANNELS_LAST)
    torch.library.opcheck(torch.ops.fusedres.add_relu_fwd, (x, r, backend))
    torch.library.opcheck(torch.ops.fusedres.add_relu_bwd, (x, r, backend))


def test_autocast_casts_both() -> None:
    x, r = torch.randn(2, 3), torch.randn(2, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert add_relu(x, r).dtype == torch.bfloat16


X = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, X), TypeError, "x must be a Tensor, got int"),
        ((X, None), TypeError, "residual must be a Tensor, got NoneType"),
        ((X.int(), X), TypeError, "x must be float32"),
        ((X, X[:1]), ValueError, r"residual must have shape \[2, 3\], got \[1, 3\]"),
        ((X, X.double()), TypeError, "residual must be torch.float32.*got torch.float64"),
        ((X, X.to("meta")), ValueError, "residual is on meta"),
    ],
)
def test_errors_name_the_argument(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"add_relu: .*{message}"):
        add_relu(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_equals_torch(dtype: torch.dtype) -> None:
    for shape in (*SHAPES, (8, 256, 56, 56)):
        x, r = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
        x.requires_grad_()
        with use_backend("cuda"):
            out = add_relu(x, r)
        plain = (x + r).relu()
        assert torch.equal(out, plain)
        grad = torch.randn_like(plain)
        (ours,), (theirs,) = (torch.autograd.grad(o, x, grad) for o in (out, plain))
        assert torch.equal(ours, theirs)
