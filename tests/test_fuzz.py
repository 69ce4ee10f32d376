"""Wrong calls end in exceptions: 10,000 random ones per backend, of the registered ops and of the
functions behind them, where a bare pointer is nearest.

A call is made right first, with one to three of its arguments then replaced. What comes back may be
an exception or, where the replacement happened to be right, a result; never a crash (with the
emulator's sanitizers, an access out of bounds is one), and never, from a registered op, a
running statistic half moved.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedres import backends

BACKENDS = [
    b
    for b in ("cpp", "cuda", "triton")
    if backends.unavailable(b, "bn_act", "cpu", torch.float32) is None
]
CALLS = {"cpp": 10_000, "cuda": 10_000, "triton": 3_000}  # Triton's interpreter is slow
Call = tuple[Callable[..., Any], list[Any]]


class Wrong:
    """Random replacements of an argument."""

    def __init__(self, random: random.Random) -> None:
        self.random = random

    def tensor(self, t: Tensor) -> Any:
        pick = self.random.choice
        ways: list[Callable[[], Any]] = [
            lambda: t.to(pick([torch.float64, torch.float16, torch.int32, torch.complex64])),
            lambda: torch.empty_like(t, device="meta"),
            lambda: t.to_sparse(),
            lambda: t[..., :0],
            lambda: t.new_zeros(()),
            lambda: t.new_zeros([*t.shape, 2])[..., 0],  # every second element
            lambda: t.new_zeros(1).expand(t.shape),
            lambda: t.new_zeros([s + pick([-1, 1, 7]) if s else s for s in t.shape]),
            lambda: t.new_zeros([pick([0, 1, 2, 3, 5, 9]) for _ in t.shape]),
            lambda: t.flatten(),
            lambda: t.unsqueeze(pick([0, -1])),
            lambda: t.transpose(0, -1),
            lambda: t.new_zeros(t.numel() * 2).as_strided(t.shape, [0] * t.dim()),
            lambda: pick([None, 0, "", [], True, 2.5]),
        ]
        return pick(ways)()

    def value(self, v: Any) -> Any:
        if isinstance(v, Tensor):
            return self.tensor(v)
        pick = self.random.choice
        if isinstance(v, bool):
            return pick([None, 1, "yes", not v])
        if isinstance(v, int):
            return pick([-1, 0, 2**31, 2**63, -(2**63), 16, 255, 1.5, None, "3"])
        if isinstance(v, float):
            return pick([None, "x", float("nan"), float("inf"), -1.0])
        if isinstance(v, str):
            return pick(["reference", "nope", "", "triton", None, 3])
        if isinstance(v, list):
            return pick([[], [0] * len(v), [-1] * len(v), [64] * len(v), [1], [3] * len(v), None])
        if v is None:
            return pick([torch.zeros(3), torch.zeros(2, 3, 4, 4), 1, "x", torch.float32])
        return pick([None, torch.int8, torch.complex64, 7, "float32"])


def calls(random: random.Random, backend: str) -> Call:
    """A right call with random small inputs."""
    types = [torch.float32, torch.float64, torch.bfloat16]
    dtype = random.choice(types[:2] if backend == "triton" else types)
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    c = random.choice([1, 3, 8, 16])
    layouts = [torch.channels_last, torch.contiguous_format]
    layout = random.choice(layouts[:1] if backend == "triton" else layouts)
    shape = (random.choice([1, 2, 3]), c, random.choice([2, 5, 8]), random.choice([2, 5, 7]))

    def full() -> Tensor:
        return torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)

    def vector() -> Tensor:
        return torch.zeros(c, dtype=stat)

    y, ops = full(), torch.ops.fusedres
    running = [torch.zeros(c), torch.ones(c)]
    norm = [vector(), vector(), *running, True, 0.1]
    act = [y, vector(), vector(), vector(), full(), vector(), vector(), vector(), True]
    bwd = [full(), y, vector(), vector(), vector(), torch.zeros(2, c, dtype=stat), True]
    pooled = torch.zeros(shape[0], c, shape[2] // 2, shape[3] // 2, dtype=dtype)
    pooled = pooled.contiguous(memory_format=layout)
    pool, window = [y, vector(), vector(), vector()], [2, 2, 0]
    w = torch.zeros(5, c, 1, 1, dtype=dtype)
    conv = [*act, w, None, [1, 1], [0, 0, 0, 0], [1, 1], 1]
    out = torch.zeros(shape[0], 5, *shape[2:], dtype=dtype).contiguous(memory_format=layout)
    own = [torch.zeros(5, dtype=stat) for _ in range(3)]
    conv_norm = [own[0].clone(), own[1].clone(), torch.zeros(5), torch.ones(5), True, 0.1, None]
    conv_bwd = [full(), None, out, torch.zeros(2, 5, dtype=stat), full(), out.clone(), *own]
    conv_bwd += [None, True]
    names = ("bn_act", "batch_norm", "bn_relu_maxpool", "add_relu")
    bn_act, batch_norm, bn_relu_maxpool, add_relu = (backends.kernels(backend, n) for n in names)
    native: list[Call] = [
        (bn_act.bn_act_fwd, act),
        (bn_act.bn_act_bwd, [full(), full(), full(), y, vector(), full(), vector(), full()]),
        (batch_norm.batch_norm_fwd, [y, *norm, 1e-5]),
        (batch_norm.batch_norm_act_fwd, [y, *norm, 1e-5, full(), True]),
        (batch_norm.batch_norm_bwd, [*bwd, torch.float32, torch.float64]),
        (bn_relu_maxpool.bn_relu_maxpool_fwd, [*pool, *window]),
        (bn_relu_maxpool.bn_relu_maxpool_bwd, [pooled, *pool, *window]),
        (add_relu.add_relu_fwd, [full(), full()]),
        (add_relu.add_relu_bwd, [full(), full()]),
    ]
    registered: list[Call] = [
        (ops.bn_act_fwd, [*act, backend]),
        (ops.bn_act_bwd, [full(), full(), y, vector(), full(), vector(), backend]),
        (ops.batch_norm_fwd, [y, *norm, None, 1e-5, backend]),
        (ops.batch_norm_act_fwd, [y, *norm, None, 1e-5, full(), True, backend]),
        (ops.batch_norm_bwd, [*bwd, torch.float32, torch.float64, backend]),
        (ops.bn_relu_maxpool_fwd, [*pool, *window, backend]),
        (ops.bn_relu_maxpool_bwd, [pooled, *pool, *window, backend]),
        (ops.conv_bn_fwd, [*conv, True, *conv_norm, 1e-5, backend, "split"]),
        (ops.conv_bn_bwd, [*conv, *conv_bwd, True, True, None, torch.float32, backend, "split"]),
        (ops.add_relu_fwd, [full(), full(), backend]),
        (ops.add_relu_bwd, [full(), full(), backend]),
    ]
    return random.choice(random.choice([native, registered]))


@pytest.mark.skipif(not BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("backend", BACKENDS)
def test_right_calls_of_the_fuzzer_are_right(backend: str) -> None:
    source = random.Random(1)
    for _ in range(CALLS[backend] // 30):
        function, arguments = calls(source, backend)
        function(*arguments)


def plain(arguments: list[Any]) -> list[Tensor]:
    """The tensors among them that can be compared."""
    tensors = [t for t in arguments if isinstance(t, Tensor) and t.layout == torch.strided]
    return [t for t in tensors if t.device.type == "cpu" and t.dtype != torch.complex64]


@pytest.mark.skipif(not BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_calls_end_in_exceptions(backend: str) -> None:
    source = random.Random(0)
    wrong = Wrong(source)
    refused = served = 0
    while refused < CALLS[backend]:
        function, arguments = calls(source, backend)
        count = min(len(arguments), source.choice([1, 1, 2, 3]))
        for index in source.sample(range(len(arguments)), count):
            try:
                arguments[index] = wrong.value(arguments[index])
            except (RuntimeError, IndexError):
                continue  # there is no such tensor
        before = [t.clone() for t in plain(arguments)]
        try:
            function(*arguments)
            served += 1
        except Exception:
            refused += 1
            if isinstance(function, torch._ops.OpOverloadPacket):
                pairs = zip(plain(arguments), before, strict=True)
                assert all(torch.equal(now.nan_to_num(), t.nan_to_num()) for now, t in pairs)
    assert served < refused
