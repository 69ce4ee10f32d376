"""batch_norm: the three-way rule, gradcheck, opcheck, running statistics, errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fusedres import use_backend
from fusedres.ops import batch_norm
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
# ResNet's own sizes at a small batch, then what breaks kernels: C=1, 1x1 maps, one image, primes
SHAPES = [
    (2, 64, 14, 14),
    (3, 1, 5, 4),
    (9, 5, 1, 1),
    (1, 3, 7, 7),
    (2, 17, 13, 11),
    (2, 2048, 3, 3),
]


@dataclass(frozen=True)
class Normalised:
    """value of batch_norm, without ReLU in low precision, where its mask flips by chance."""

    shape: tuple[int, int, int, int]
    training: bool = True
    affine: bool = True
    relu: bool = True
    offset: float = 0.0  # added to the input: what a variance by E[x^2] - E[x]^2 does not survive

    def inputs(self, make: Maker) -> Inputs:
        y = make.activation(*self.shape)
        with torch.no_grad():
            y += self.offset
        return {"y": y} | make.norm("n", self.shape[1], self.affine)

    def ours(self, t: Inputs) -> Outputs:
        norm = norm_arguments(t, "n")
        return {"value": batch_norm(t["y"], *norm, training=self.training, relu=self.relu).value()}

    def eager(self, t: Inputs) -> Outputs:
        value = eager_batch_norm(t["y"], t, "n", self.training)
        return {"value": value.relu() if self.relu else value}


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_way(
    shape: tuple[int, int, int, int],
    training: bool,
    backend: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    if serves(backend, "batch_norm", dtype):
        case = Normalised(shape, training, relu=dtype not in HALF_TYPES)
        check_case(case, backend, dtype, memory_format)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
def test_variance_survives_a_large_mean(backend: str, memory_format: torch.memory_format) -> None:
    case = Normalised((8, 16, 28, 28), offset=1000.0, relu=False)
    check_case(case, backend, torch.float32, memory_format)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(backend: str, training: bool, affine: bool) -> None:
    gradcheck(Normalised((2, 3, 3, 2), training, affine), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, 0, 1, torch.tensor(0.25)])
def test_running_statistics_as_torch_moves_them(backend: str, momentum: float) -> None:
    ours, plain = [torch.zeros(5), torch.ones(5)], [torch.zeros(5), torch.ones(5)]
    for _ in range(3):
        y = torch.randn(4, 5, 3, 3)
        with use_backend(backend):
            batch_norm(y, None, None, *ours, momentum=momentum)
        torch.nn.functional.batch_norm(y, *plain, training=True, momentum=float(momentum))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(backend: str, training: bool) -> None:
    y, running = torch.randn(2, 4, 5, 5), (torch.zeros(4), torch.ones(4))
    y = y.to(memory_format=CHANNELS_LAST)
    forward = (y, torch.rand(4), None, *running, training, 0.1, None, 1e-5, backend)
    torch.library.opcheck(torch.ops.fusedres.batch_norm_fwd, forward)
    at_once = (*forward[:-1], torch.randn_like(y), True, backend)
    torch.library.opcheck(torch.ops.fusedres.batch_norm_act_fwd, at_once)
    for relu, residual in ((True, True), (True, False), (False, True)):
        out, mean, rstd, scale, bias = torch.ops.fusedres.batch_norm_act_fwd(
            *at_once[:-3], at_once[-3] if residual else None, relu, backend
        )
        saved = (torch.randn_like(y), out if relu else None, y, mean, scale, bias, rstd)
        backward = (*saved, residual, training, torch.float32, None, backend)
        torch.library.opcheck(torch.ops.fusedres.batch_norm_act_bwd, backward)
    mean, _, rstd, scale, _ = torch.ops.fusedres.batch_norm_fwd(*forward)
    g, sums = torch.randn_like(y), torch.randn(2, 4)
    backward = (g, y, mean, scale, rstd, sums, training, torch.float32, None, backend)
    torch.library.opcheck(torch.ops.fusedres.batch_norm_bwd, backward)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_frozen_statistics_are_copies(backend: str) -> None:
    running = (torch.zeros(4), torch.ones(4))
    y = torch.randn(2, 4, 3, 3, requires_grad=True)
    with use_backend(backend):
        d = batch_norm(y, torch.ones(4), torch.zeros(4), *running, training=False)
        running[0].add_(5.0)
        running[1].add_(5.0)
    torch.testing.assert_close(d.value(), (y / (1 + 1e-5) ** 0.5).relu())


@pytest.mark.parametrize(
    ("y", "options", "error", "message"),
    [
        (3, {}, TypeError, "y must be a Tensor, got int"),
        (torch.randn(2, 3), {}, ValueError, r"y must be \[N, C, H, W\]"),
        (torch.randn(1, 3, 1, 1), {}, ValueError, "more than 1 value per channel"),
        (torch.randn(2, 3, 1, 1), {"bn_weight": torch.ones(2)}, ValueError, "bn_weight must have"),
        (torch.randn(2, 3, 1, 1), {"training": False}, ValueError, "training=False needs"),
        (torch.randn(2, 3, 1, 1), {"residual": torch.ones(2)}, ValueError, "residual must be"),
    ],
)
def test_errors_name_the_argument(
    y: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"batch_norm: .*{message}"):
        batch_norm(y, **options)
