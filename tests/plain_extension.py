"""fusedres._C once more, in plain torch, of what conv_bn on a GPU calls: the same addresses and
numbers go in. With it the backend "cuda" runs on CPU tensors, its Python as on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import plain_ops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import backends, native
from fusedres._tensors import per_channel, stat_dtype
from fusedres.native import _args

DTYPES = {number: dtype for dtype, number in _args.DTYPES.items()}
Head = tuple[int, tuple[int, int, int, int], int, int, int]
Numbered = tuple[int, int]


def _view(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The tensor of so many elements that lies there; None at 0."""
    if address == 0:
        return None
    count = max(1, torch.Size(shape).numel())
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Extension:
    """What replaces fusedres._C; what it has not comes from there.

    Attributes:
        products: of the calls of conv_bn_fwd and conv_bn_dgrad.
    """

    cuda_built = wgmma_built = True

    def __init__(self) -> None:
        self.products: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(_BUILT, name)

    def _full(self, head: Head, address: int, channels: int | None = None) -> Any:
        dtype, (n, c, h, w), layout, *where = head
        assert where == [0, 0]
        c = c if channels is None else channels
        if layout == _args.NHWC:
            found = _view(address, (n, h, w, c), DTYPES[dtype])
            return None if found is None else found.permute(0, 3, 1, 2)
        return _view(address, (n, c, h, w), DTYPES[dtype])

    def _vectors(self, head: Head, *addresses: int, channels: int | None = None) -> list[Any]:
        count = head[1][1] if channels is None else channels
        return [_view(address, (count,), stat_dtype(DTYPES[head[0]])) for address in addresses]

    def _sums(self, head: Head, address: int, channels: int | None = None) -> Any:
        count = head[1][1] if channels is None else channels
        return _view(address, (2, count), stat_dtype(DTYPES[head[0]]))

    # --- light passes ---

    def _activation(self, head: Head, relu: bool, t: tuple[int, ...]) -> Any:
        x, residual = self._full(head, t[0]), self._full(head, t[4])
        own, joined = self._vectors(head, *t[1:4]), self._vectors(head, *t[5:8])
        return x if t[1] == 0 else plain_ops.bn_act_fwd(x, *own, residual, *joined, relu)

    def bn_act_fwd(self, head: Head, relu: bool, t: tuple[int, ...]) -> None:
        if 0 in head[1]:
            return
        self._full(head, t[8]).copy_(self._activation(head, relu, t))

    def bn_act_bwd_workspace(self, *_: Any) -> int:
        return 0

    def bn_act_bwd(self, head: Head, t: tuple[int, ...]) -> None:
        if 0 in head[1]:
            for address in filter(None, t[10:12]):
                self._sums(head, address).zero_()
            return
        grad, extra, a, y = (self._full(head, address) for address in t[:4])
        mean, scale, bias, res_mean = self._vectors(head, *t[4:7], t[8])
        if scale is not None:
            a = plain_ops.bn_act_fwd(y, mean, scale, bias, None, None, None, None, True)
        res_y = None if res_mean is None else self._full(head, t[7])
        g, sums, res_sums = plain_ops.bn_act_bwd(grad, extra, a, y, mean, res_y, res_mean)
        if t[9]:
            self._full(head, t[9]).copy_(g)
        self._sums(head, t[10]).copy_(sums)
        if res_sums is not None:
            self._sums(head, t[11]).copy_(res_sums)

    def batch_norm_fwd_workspace(self, *_: Any) -> int:
        return 0

    def batch_norm_fwd(
        self, head: Head, training: bool, momentum: float, eps: float, vectors: Any, t: Any
    ) -> None:
        self._statistics(head, head[1][1], training, momentum, eps, vectors, t)

    def _statistics(
        self, head: Head, channels: int, training: bool, momentum: float, eps: float, given: Any,
        t: Any,
    ) -> None:  # fmt: skip
        weight, bias, amount, *running = (
            _view(address, (channels if i != 2 else 1,), DTYPES[dtype])
            for i, (dtype, address) in enumerate(given)
        )
        moved = momentum if amount is None else amount.view(())
        n, _, *sizes = head[1]
        empty = torch.empty(n, channels, *sizes, dtype=DTYPES[head[0]]) if n == 0 else None
        y = self._full(head, t[0], channels) if empty is None else empty
        found = plain_ops.batch_norm_fwd(y, weight, bias, *running, training, moved, eps)
        for into, value in zip(self._vectors(head, *t[1:6], channels=channels), found, strict=True):
            into.copy_(value)

    def batch_norm_bwd(self, head: Head, training: bool, t: Any, *gradients: Numbered) -> None:
        self._dy(head, head[1][1], training, t, gradients)

    def _dy(self, head: Head, channels: int, training: bool, t: Any, gradients: Any) -> Tensor:
        g, y = (self._full(head, address, channels) for address in t[:2])
        mean, scale, rstd, bias = self._vectors(head, *t[2:5], t[6], channels=channels)
        sums = self._sums(head, t[5], channels)
        if bias is not None:
            u = (y.to(mean.dtype) - per_channel(mean)) * per_channel(scale) + per_channel(bias)
            g = torch.where(u <= 0, 0, g)
        types = [DTYPES[dtype] if address else None for dtype, address in gradients]
        dy, *found = plain_ops.batch_norm_bwd(g, y, mean, scale, rstd, sums, training, *types)  # type: ignore[arg-type]
        if t[7]:
            self._full(head, t[7], channels).copy_(dy)
        for (dtype, address), value in zip(gradients, found, strict=True):
            if address:
                _view(address, (channels,), DTYPES[dtype]).copy_(value)
        return dy

    # --- convolutions ---

    def conv_bn_fwd_workspace(self, head: Head, filters: int, training: bool, product: int) -> int:
        return 16 * filters

    def conv_bn_fwd(
        self, head: Head, filters: int, relu: bool, act: Any, training: bool, momentum: float,
        eps: float, vectors: Any, t: Any, weight: Numbered, product: int,
    ) -> None:  # fmt: skip
        self._called(head, product, *act, t[0], weight[1])
        a = self._activation(head, relu, act)
        if act[8]:
            self._full(head, act[8]).copy_(a)
        y = F.conv2d(a.float(), self._weight(head, filters, weight).float())
        self._full(head, t[0], filters).copy_(y)
        if training:
            self._statistics(head, filters, True, momentum, eps, vectors, t)

    def conv_bn_dgrad_workspace(self, head: Head, filters: int, act: Any, product: int) -> int:
        return 16 * filters

    def conv_bn_dgrad(
        self, head: Head, filters: int, training: bool, t: Any, gradients: Any, weight: Numbered,
        act: Any, sampled: int, steps: tuple[int, int], product: int,
    ) -> None:  # fmt: skip
        self._called(head, product, *act[:10], *t[:8], sampled, weight[1])
        dy = self._dy(head, filters, training, t, gradients)
        w = self._weight(head, filters, weight)
        da = F.conv_transpose2d(dy.float(), w.float())
        if sampled:
            dtype, (n, c, h, width), *_ = head
            small = (n, -(-h // steps[0]), -(-width // steps[1]), c)
            joins = _view(sampled, small, DTYPES[dtype]).permute(0, 3, 1, 2)
            da[:, :, :: steps[0], :: steps[1]] += joins
        rounded = self._full(head, act[0])
        assert act[0] == act[9]
        rounded.copy_(da)
        if act[10]:
            self.bn_act_bwd(head, act)
        elif act[1]:
            rounded.add_(self._full(head, act[1]))

    def _weight(self, head: Head, filters: int, weight: Numbered) -> Tensor:
        assert weight[0] == head[0]
        found: Tensor = _view(weight[1], (filters, head[1][1], 1, 1), DTYPES[weight[0]])
        return found

    def _called(self, head: Head, product: int, *addresses: int) -> None:
        assert DTYPES[head[0]] in (torch.float16, torch.bfloat16) and head[2] == _args.NHWC
        assert all(address % 16 == 0 for address in addresses)
        self.products.append(product)


_BUILT = native.load()


@contextmanager
def installed(extension: Extension) -> Iterator[None]:
    """The backend "cuda" on it, for CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_import", lambda: (extension, None))
        patch.setattr(_args, "where", lambda _: (0, 0))
        not_ready = backends.not_ready
        patch.setattr(backends, "not_ready", lambda n: None if n == "cuda" else not_ready(n))
        patch.setattr(backends, "product_problem", lambda *_: None)
        cuda = replace(backends.BACKENDS["cuda"], devices=("cpu",))
        patch.setitem(backends.BACKENDS, "cuda", cuda)
        patch.setitem(
            backends.BACKENDS, "cpp", replace(backends.BACKENDS["cpp"], devices=("none",))
        )
        backends._choose.cache_clear()
        try:
            yield
        finally:
            patch.undo()
            backends._choose.cache_clear()
