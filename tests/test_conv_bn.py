"""conv_bn: every backend by the three-way rule, gradcheck, opcheck, what is saved, and the errors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusedres import Deferred, use_backend, use_plan
from fusedres.ops import bn_act, conv_bn
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
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = serving_backends()
PROTOCOL = [b for b in BACKENDS if b != "reference"]  # those whose gradients run through sums


@dataclass(frozen=True)
class Chain:
    """conv_bn of `source`, read through value().

    source: "tensor", or a Deferred with no residual, a Tensor, or a Deferred ("none", "tensor_residual",
    "deferred_residual").
    """

    source: str = "none"
    shape: tuple[int, int, int, int] = (4, 8, 7, 5)
    channels: int = 6
    first: int = 1  # side of the kernel in front
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    relu: bool = True  # of the source
    out_relu: bool = True
    emit: bool = False
    training: bool = True
    affine: bool = True

    def __str__(self) -> str:
        default = Chain()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return ",".join(f"{k}={v}" for k, v in changed.items()) or "default"

    def inputs(self, make: Maker) -> Inputs:
        c = self.shape[1]
        t = {"x": make.activation(*self.shape)}
        if self.source != "tensor":
            t |= {"w0": make.weight(c, c, self.first, self.first)} | make.norm("n0", c, self.affine)
        if self.source.endswith("residual"):
            t["r"] = make.activation(*self.shape)
        if self.source == "deferred_residual":
            t |= {"wr": make.weight(c, c, self.first, self.first)} | make.norm("nr", c, self.affine)
        t["w"] = make.weight(self.channels, c // self.groups, self.kernel, self.kernel)
        return t | make.norm("n", self.channels, self.affine)

    def ours(self, t: Inputs) -> Outputs:
        def op(x: Tensor | Deferred, suffix: str, **kwargs: Any) -> Any:
            norm = norm_arguments(t, f"n{suffix}")
            kwargs.setdefault("padding", self.first // 2)
            return conv_bn(x, t[f"w{suffix}"], *norm, training=self.training, **kwargs)

        x: Tensor | Deferred = t["x"]
        if self.source != "tensor":
            residual: Tensor | Deferred | None = t.get("r")
            if self.source == "deferred_residual":
                residual = op(t["r"], "r", relu=False)
            x = op(x, "0", relu=self.relu, residual=residual)
        h = op(
            x, "", stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.groups, emit=self.emit, relu=self.out_relu,
        )  # fmt: skip
        if self.emit:
            return {"value": h[0].value(), "emitted": h[1]}
        return {"value": h.value()}

    def eager(self, t: Inputs) -> Outputs:
        a = t["x"]
        if self.source != "tensor":
            a = eager_batch_norm(F.conv2d(a, t["w0"], padding=self.first // 2), t, "n0", self.training)
            if self.source == "tensor_residual":
                a = a + t["r"]
            if self.source == "deferred_residual":
                a = a + eager_batch_norm(F.conv2d(t["r"], t["wr"], padding=self.first // 2), t, "nr", self.training)
            a = a.relu() if self.relu else a
        y = F.conv2d(a, t["w"], None, self.stride, self.padding, self.dilation, self.groups)
        value = eager_batch_norm(y, t, "n", self.training)
        value = value.relu() if self.out_relu else value
        return {"value": value, "emitted": a} if self.emit else {"value": value}


SOURCES = ["tensor", "none", "tensor_residual", "deferred_residual"]
# every source with every flag; then each odd shape and geometry with the richest source
CHAINS = [
    *(Chain(source=s, emit=e) for s, e in itertools.product(SOURCES, (False, True))),
    *(Chain(source=s, relu=False, emit=True) for s in SOURCES[1:]),
    *(Chain(source=s, training=False) for s in SOURCES),
    Chain(source="deferred_residual", affine=False),
    Chain("deferred_residual", kernel=3, padding=1),
    Chain("deferred_residual", kernel=3, padding=1, stride=2),
    Chain("deferred_residual", stride=2),
    Chain("deferred_residual", kernel=2, padding=1),
    Chain("deferred_residual", kernel=3, padding=2, dilation=2),
    Chain("deferred_residual", kernel=3, padding=1, groups=2),
    Chain("tensor", (2, 3, 19, 17), 13, kernel=7, stride=2, padding=3),
    Chain("deferred_residual", (3, 3, 5, 7), 5, emit=True),  # fewer channels than any vector
    # one channel; BatchNorm hides the scale of a lone tap, so that its gradient is all cancellation
    Chain("deferred_residual", (5, 1, 4, 3), 2, first=3, kernel=3, padding=1),
    Chain("deferred_residual", (1, 8, 6, 6), 4, emit=True),  # one image
    Chain("deferred_residual", (7, 5, 1, 1), 11, emit=True),  # statistics over the batch alone
    Chain("deferred_residual", (2, 17, 13, 11), 19, emit=True),  # primes
    Chain("deferred_residual", (2, 64, 9, 9), 65, emit=True),  # one past a vector
]


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_three_way(
    chain: Chain, backend: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    if dtype in HALF_TYPES:  # masks flip by chance there: test_half_types_masks looks at them
        chain = replace(chain, relu=False, out_relu=False)
    if serves(backend, "conv_bn", dtype):
        check_case(chain, backend, dtype, memory_format)
    else:
        with use_backend(backend), pytest.raises(RuntimeError, match=f"'{backend}' serves"):
            chain.ours(chain.inputs(Maker(dtype)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_half_types_masks(source: str, dtype: torch.dtype, backend: str) -> None:
    if serves(backend, "conv_bn", dtype):
        chain = Chain(source, (16, 8, 17, 17), 8, emit=True)  # large: flips average out
        check_case(chain, backend, dtype, CHANNELS_LAST, trim=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "chain",
    [
        *(Chain(s, (2, 3, 3, 2), 2, emit=True) for s in SOURCES),
        Chain("deferred_residual", (2, 2, 4, 4), 3, kernel=3, stride=2, padding=1),
        Chain("deferred_residual", (2, 2, 4, 4), 3, kernel=2, stride=2),
        Chain("deferred_residual", (2, 2, 3, 3), 3, stride=2, training=False),
        Chain("none", (2, 2, 3, 3), 3, relu=False, emit=True, affine=False),
    ],
    ids=str,
)
def test_gradcheck(chain: Chain, backend: str) -> None:
    gradcheck(chain, backend)
