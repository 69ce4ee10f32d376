"""Deferred: its value, what it says of itself, and that it is a pytree."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from fusedres import Deferred, use_backend
from fusedres.ops import conv_bn


def made(relu: bool = True) -> Deferred:
    return conv_bn(torch.randn(2, 3, 5, 5), torch.randn(4, 3, 1, 1, requires_grad=True), relu=relu)


def test_value_is_the_formula() -> None:
    y, r = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mean, scale, bias = torch.randn(3), torch.randn(3), torch.randn(3)

    def affine(x: torch.Tensor) -> torch.Tensor:
        m, s, b = (v.view(1, -1, 1, 1) for v in (mean, scale, bias))
        return (x - m) * s + b

    torch.testing.assert_close(Deferred(y, mean, scale, bias).value(), affine(y).relu())
    torch.testing.assert_close(Deferred(y, mean, scale, bias, r, relu=False).value(), affine(y) + r)
    shortcut = Deferred(r, mean, scale, bias, relu=False)
    torch.testing.assert_close(
        Deferred(y, mean, scale, bias, shortcut).value(), (affine(y) + affine(r)).relu()
    )


def test_ordinary_autograd_reaches_every_field_of_one_built_by_hand() -> None:
    fields = [torch.randn(2, 3, 4, 4, dtype=torch.float64), *torch.randn(3, 3).double()]
    leaves = [f.clone().requires_grad_() for f in fields]
    assert torch.autograd.gradcheck(lambda *f: Deferred(*f, relu=False).value(), leaves)


def test_shape_dtype_device_and_repr() -> None:
    d = made()
    assert d.shape == (2, 4, 5, 5) and d.dtype == torch.float32 and d.device.type == "cpu"
    assert repr(d) == "Deferred(shape=[2, 4, 5, 5], dtype=torch.float32, relu=True, residual=None)"


def test_pytree_round_trip() -> None:
    d = made()
    d.residual = made(relu=False)
    leaves, spec = pytree.tree_flatten(d)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 10
    back = pytree.tree_unflatten(leaves, spec)
    assert isinstance(back, Deferred) and isinstance(back.residual, Deferred)
    torch.testing.assert_close(back.value(), d.value())


def test_no_gradient_machinery_under_no_grad() -> None:
    with torch.no_grad(), use_backend("auto"):
        d = made()
    assert not d.y.requires_grad and not d.value().requires_grad
