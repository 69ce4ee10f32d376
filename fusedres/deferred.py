"""Deferred: an activation that stands for its BatchNorm, residual add and ReLU without having run
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(eq=False)
class Deferred:
    """act((y - mean) * scale + bias [+ residual]), to be computed by whatever reads it next.

    `conv_bn` and `batch_norm` return one; `conv_bn`, `bn_act` and `bn_relu_maxpool` read one;
    :meth:`value` turns it into a Tensor.

    Args:
        y: [N, C, H, W], the raw convolution output in the compute dtype, never normalised in
            memory.
        mean, scale, bias: [C], fp32 (fp64 beside an fp64 y); scale is BatchNorm's weight * rstd.
        residual: what joins before the activation: None, a Tensor [N, C, H, W], or a Deferred of
            the same shape that has neither ReLU nor a residual of its own (the projection
            shortcut).
        relu: whether the activation ends in ReLU.
        sums: [2, C], the carrier of the gradient protocol, written by the op that made y. Its value
            is never read; its *gradient* is (sum g, sum g * (y - mean)).
        unmasked: [N, C, H, W] without memory of its own, another carrier, of an op that can mask g
            itself: its gradient is that of relu((y - mean) * scale + bias), not yet masked, while
            sums' gradient is of the masked one. For who reads that very activation; g then comes
            along here or along y, or along both.

    The gradient that flows along `y` is g = dL/du with u = (y - mean) * scale + bias, not dL/dy: a
    Deferred whose `sums` is set is read through fusedres' ops only, and backward raises where `y`
    alone was used. Where `sums` is None (backend "reference"), ordinary autograd runs through all
    fields.
    """

    y: Tensor
    mean: Tensor
    scale: Tensor
    bias: Tensor
    residual: Tensor | Deferred | None = None
    relu: bool = True
    sums: Tensor | None = field(default=None, repr=False)
    unmasked: Tensor | None = field(default=None, repr=False)

    @property
    def shape(self) -> torch.Size:
        """[N, C, H, W] of the value."""
        return self.y.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the value."""
        return self.y.dtype

    @property
    def device(self) -> torch.device:
        """Device of the value."""
        return self.y.device

    def value(self) -> Tensor:
        """The activation as a Tensor [N, C, H, W], in y's dtype and memory format."""
        from fusedres.ops.bn_act import bn_act  # the data type sits below the ops that read it

        return bn_act(self)

    def is_ordinary(self) -> bool:
        """Whether gradients run through plain autograd here, rather than through `sums`."""
        return self.sums is None and any(
            t.requires_grad for t in (self.y, self.mean, self.scale, self.bias)
        )

    def __repr__(self) -> str:
        residual = self.residual
        kind = "Tensor" if isinstance(residual, Tensor) else residual
        about = f"shape={list(self.shape)}, dtype={self.dtype}, relu={self.relu}"
        return f"Deferred({about}, residual={kind})"


class Sampled(NamedTuple):
    """An emitted activation of which one strided 1x1 convolution reads a part."""

    value: Tensor  # [N, C, H, W]
    carrier: Tensor  # [N, C, OH, OW] without memory: its gradient is that of the pixels read
    stride: tuple[int, int]


def _flatten(d: Deferred) -> tuple[list[Any], bool]:
    return [d.y, d.mean, d.scale, d.bias, d.residual, d.sums, d.unmasked], d.relu


def _unflatten(children: Iterable[Any], relu: Any) -> Deferred:
    y, mean, scale, bias, residual, sums, unmasked = children
    return Deferred(y, mean, scale, bias, residual, relu, sums, unmasked)


pytree.register_pytree_node(
    Deferred, _flatten, _unflatten, serialized_type_name="fusedres.Deferred"
)
