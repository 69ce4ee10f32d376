"""Tensors and numbers that no layer writes and a caller may bring: each is served right, or refused
by name and before anything was written. The fuzzers found them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedres
from fusedres import native, ops
from fusedres._conv import Conv
from fusedres.deferred import Sampled

built = pytest.mark.skipif(native.load() is None, reason="the extension is not built")


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def unaligned(t: Tensor) -> Tensor:
    flat = torch.frombuffer(bytearray(t.nbytes + 1), dtype=t.dtype, offset=1)
    return flat.view(t.shape).copy_(t)


def negated(t: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


X, W = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 1, 1)


@pytest.mark.parametrize("odd", [freed, unaligned])
def test_memory_that_cannot_be_read_is_refused_by_name(odd: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="residual cannot be read"):
        fusedres.add_relu(X, odd(X))
    with pytest.raises(ValueError, match="weight cannot be read"):
        fusedres.conv_bn_relu(X, odd(W), None, None)
    with pytest.raises(ValueError, match="running_var cannot be read"):
        fusedres.bn_add_relu(X, None, None, torch.zeros(3), odd(torch.ones(3)), residual=X)


@built
@pytest.mark.parametrize("odd", [freed, unaligned])
def test_nor_do_the_registered_ops_read_it(odd: Callable[[Tensor], Tensor]) -> None:
    v, joined = torch.ones(3), (None,) * 4
    for arguments in ((odd(X), v, v, v), (X, v, odd(v), v)):
        with pytest.raises(ValueError, match=r"without memory|no multiple of its element's size"):
            torch.ops.fusedres.bn_act_fwd(*arguments, *joined, True, "cpp")
    norm = (None, None, None, None, True, 0.1, None, 1e-5)
    conv = ([1, 1], [0] * 4, [1, 1], 1)
    with pytest.raises(ValueError, match="conv_bn_fwd: x cannot be read"):
        source = (odd(X), *(None,) * 7, False)
        torch.ops.fusedres.conv_bn_fwd(*source, W, None, *conv, False, *norm, "cpp", "split")
    with pytest.raises(ValueError, match="maxpool_fwd: weight cannot be read"):
        stem = (X, odd(W), None, *conv, 3, 2, 1, *norm, False, "cpp", "split")
        torch.ops.fusedres.conv_bn_relu_maxpool_fwd(*stem)


def test_a_negated_view_is_read_as_its_values_and_moved_by_nobody() -> None:
    expected = fusedres.bn_add_relu(X, None, None, residual=X)
    torch.testing.assert_close(fusedres.bn_add_relu(X, None, None, residual=negated(X)), expected)
    running = [torch.zeros(3), negated(torch.ones(3))]
    with pytest.raises(ValueError, match="running_var is a negated view"):
        fusedres.bn_add_relu(X, None, None, *running, residual=None)
    assert not running[0].any()


@built
def test_kernels_do_not_take_a_negated_view_for_its_memory() -> None:
    from fusedres.native.add_relu import add_relu_fwd

    with pytest.raises(ValueError, match="still to be negated"):
        add_relu_fwd(X, torch._neg_view(-X))


@built
def test_a_tensor_on_meta_among_others_brings_no_uninitialised_memory() -> None:
    with pytest.raises(ValueError, match="some of the tensors are on meta"):
        torch.ops.fusedres.add_relu_fwd(X, X.to("meta"), "cpp")
    both = torch.ops.fusedres.add_relu_fwd(X.to("meta"), X.to("meta"), "cpp")
    assert both.is_meta and both.shape == X.shape


@built
@pytest.mark.parametrize("window", [(0, 2, 1), (3, 2, 2), (9, 2, 0)], ids=str)
def test_a_stem_whose_window_does_not_fit_moves_nothing(window: tuple[int, int, int]) -> None:
    running = [torch.zeros(4), torch.ones(4)]
    geometry = ([1, 1], [0] * 4, [1, 1], 1, *window)
    norm = (None, None, *running, True, 0.1, None, 1e-5)
    with pytest.raises(ValueError, match=r"kernel_size|pool_padding"):
        torch.ops.fusedres.conv_bn_relu_maxpool_fwd(
            X, W, None, *geometry, *norm, False, "cpp", "split"
        )
    assert not running[0].any() and (running[1] == 1).all()


@built
def test_statistics_of_inference_mode_move_together_or_not_at_all() -> None:
    running = [torch.zeros(3), inference(torch.ones(3))]
    with pytest.raises(ValueError, match="running_var was made in inference mode"):
        norm = (None, None, *running, True, 0.1, None, 1e-5)
        torch.ops.fusedres.batch_norm_fwd(X, *norm, "cpp")
    assert not running[0].any()


def test_what_autograd_cannot_save_is_known_before_statistics_move() -> None:
    leaf, running = W.clone().requires_grad_(), [torch.zeros(4), torch.ones(4)]
    with pytest.raises(RuntimeError, match="input was made in inference mode"):
        fusedres.conv_bn_relu(inference(X), leaf, None, None, *running)
    assert not running[0].any()
    fusedres.conv_bn_relu(inference(X), W, None, None, *running)  # nothing is saved
    assert running[0].any()


# --- geometry -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [17, 2**16, 2**31 - 1])
def test_huge_strides_leave_one_window(step: int) -> None:
    w = torch.randn(4, 3, 3, 3)
    leaf = w.clone().requires_grad_()
    with fusedres.use_backend("auto"):
        out = fusedres.conv_bn_relu(X, leaf, None, None, stride=step, padding=1)
    plain = F.conv2d(X, w, None, 6, 1)
    assert plain.shape == out.shape == (2, 4, 1, 1)
    torch.testing.assert_close(out, F.batch_norm(plain, None, None, training=True).relu())
    out.sum().backward()
    conv = Conv((step, 1), (0, 0, 0, 0), (1, step), 1)
    assert conv.reduced(X.shape, W.shape) == Conv((5, 1), (0, 0, 0, 0), (1, 1), 1)


@pytest.mark.parametrize("extent", [1, 2])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bf16_weights_of_narrow_maps_get_their_gradient(backend: str, extent: int) -> None:
    """Which oneDNN leaves uninitialised where a padded map is narrower than the stride."""
    x = torch.randint(-2, 3, (3, 5, extent, extent)).bfloat16()
    w = torch.randint(-2, 3, (4, 5, 3, 3)).bfloat16().requires_grad_()
    wide = w.detach().float().requires_grad_()
    with fusedres.use_backend(backend):
        for leaf, image in ((w, x), (wide, x.float())):
            stem = {"stride": 3, "padding": 1, "training": False}
            running = (torch.zeros(4), torch.ones(4))
            fusedres.conv_bn_relu(image, leaf, None, None, *running, **stem).sum().backward()  # type: ignore[arg-type]
    assert w.grad is not None and wide.grad is not None
    torch.testing.assert_close(w.grad.float(), wide.grad, rtol=0.02, atol=0.02)


@built
def test_a_packed_weight_is_a_cast_of_the_weight() -> None:
    conv = ([1, 1], [0] * 4, [1, 1], 1)
    norm = (None, None, None, None, True, 0.1, None, 1e-5)
    source = (X, *(None,) * 7, False)
    for w, packed, said in ((W, W[:1], "packed must be a cast"), (W.cfloat(), None, "weight")):
        with pytest.raises(ValueError, match=said):
            torch.ops.fusedres.conv_bn_fwd(*source, w, packed, *conv, False, *norm, "cpp", "split")


# --- names ----------------------------------------------------------------------------------------

D = ops.batch_norm(X)
S = Sampled(X, X[:, :, ::2, ::2], (2, 2))
RUNNING = (torch.zeros(3), torch.ones(3))
COMPLEX, NESTED = torch.tensor(1j), torch.nested.as_nested_tensor([X[0], X[1]])
WRONG: list[tuple[str, Callable[[], Any]]] = [
    ("training must be a bool", lambda: ops.batch_norm(X, training=RUNNING[0])),  # type: ignore[arg-type]
    ("momentum must be finite", lambda: ops.batch_norm(X, momentum=10**400)),
    ("eps must be finite", lambda: ops.batch_norm(X, eps=10**400)),
    ("momentum must be float32", lambda: ops.batch_norm(X, momentum=COMPLEX)),
    ("x must be dense", lambda: fusedres.add_relu(NESTED, X)),
    ("stride must be below", lambda: ops.conv_bn(X, W, stride=2**63)),
    ("padding must be below", lambda: ops.conv_bn(X, W, padding=(2**31, 1))),
    ("pool_padding 0", lambda: ops.conv_bn_relu_maxpool(X, W, kernel_size=9, pool_padding=0)),
    ("input.relu must be a bool", lambda: replace(D, relu="yes").value()),  # type: ignore[arg-type]
    ("input.unmasked must be a Tensor", lambda: replace(D, unmasked="x").value()),  # type: ignore[arg-type]
    ("input.unmasked must be torch.float32", lambda: replace(D, unmasked=X[:1]).value()),
    ("input.sums is on meta", lambda: replace(D, sums=torch.zeros(2, 3, device="meta")).value()),
    ("input.value must be a Tensor", lambda: ops.conv_bn(S._replace(value=D), W, stride=2)),  # type: ignore[arg-type]
    ("input.carrier must be a Tensor", lambda: ops.conv_bn(S._replace(carrier=3), W, stride=2)),  # type: ignore[arg-type]
    ("input.stride must be an int", lambda: ops.conv_bn(S._replace(stride="x"), W, stride=2)),  # type: ignore[arg-type]
    ("kernel_size must be below", lambda: fusedres.ConvBNReLU(3, 4, 2**40)),
    ("in_channels must be an int", lambda: fusedres.ConvBNReLU("3", 4, 1)),  # type: ignore[arg-type]
    ("filters must be at least 1 and below", lambda: fusedres.ConvBlock(8, (2**40, 4, 8))),
    ("stride_in_1x1 must be a bool", lambda: fusedres.ConvBlock(8, (4, 4, 8), stride_in_1x1=2)),  # type: ignore[arg-type]
    ("num_classes must be a positive", lambda: fusedres.resnet18(2**40)),
    ("zero_init_residual must be a bool", lambda: fusedres.resnet18(zero_init_residual="no")),
    ("input must be a Tensor", lambda: fusedres.ConvBlock(8, (4, 4, 8))([1.0])),
]  # fmt: skip


@pytest.mark.parametrize(("said", "call"), WRONG, ids=[said for said, _ in WRONG])
def test_errors_name_the_argument(said: str, call: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        call()


def test_a_residual_that_cannot_be_cast_is_named_under_autocast() -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="residual must be dense"),
    ):
        fusedres.conv_bn_relu(X, W, None, None, residual=torch.zeros(2, 4, 5, 5).to_mkldnn())


@built
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (0, 2, 1, 2)])
@pytest.mark.parametrize("size", [(10, 8), (9, 9)])
def test_a_strided_1x1_of_any_size_goes_backward(
    size: tuple[int, int], padding: tuple[int, int, int, int]
) -> None:
    """oneDNN's own backward, of 10x8 in fp32, writes where it must not."""
    top, bottom, left, right = padding
    height, width = size[0] - top - bottom, size[1] - left - right
    x = torch.randn(3, 8, height, width).contiguous(memory_format=torch.channels_last)
    weight, grad = torch.randn(5, 8, 1, 1), torch.randn(3, 5, 5, -(-size[1] // 2))
    found = []
    for backend in ("cpp", "reference"):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with fusedres.use_backend(backend):
            for _ in range(20):
                y = ops.conv_bn(*leaves, stride=2, padding=padding, relu=False).value()
                y.backward(grad)
        found.append([y, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
