"""How correctness is judged: one tolerance table, the three-way rule, plain-PyTorch peers and input
makers.

The rule: with the error of a result its distance from the fp64 truth, relative to the truth's norm,
ours may be at most twice that of plain PyTorch in the same dtype and memory format, plus a floor.
In fp64, where ours and the truth are two ways to the same number, the largest element counts
instead of the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import backends
from fusedres._tensors import INTERPRETED, stat_dtype

FLOOR = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-2,
}
HALF_TYPES = (torch.float16, torch.bfloat16)
FACTOR = 2.0  # times plain PyTorch's own error

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def error(result: Tensor, truth: Tensor, trim: float = 0.0) -> float:
    """Distance from the truth relative to its norm; inf where NaN or shape disagree.

    In fp64 the maximum norm, else the Euclidean one, without the fraction `trim` of elements that
    are furthest off: in low precision ReLU's mask flips where its input is within rounding of zero,
    and a flipped element of a gradient is off by all of itself, in every implementation alike.
    """
    if result.shape != truth.shape:
        return float("inf")
    order = float("inf") if result.dtype == torch.float64 else 2
    wide, truth = result.detach().to(torch.float64), truth.detach()
    if not torch.equal(wide.isnan(), truth.isnan()):
        return float("inf")
    off = (wide - truth).nan_to_num().abs().flatten().sort().values
    difference = torch.linalg.vector_norm(off[: off.numel() - int(trim * off.numel())], order)
    norm = torch.linalg.vector_norm(truth.nan_to_num(), order)
    if norm == 0:
        return float(difference)
    return float(difference / norm)


def assert_three_way(
    name: str,
    ours: Sequence[Tensor],
    peer: Sequence[Tensor],
    truth: Sequence[Tensor],
    dtype: torch.dtype,
    trim: float = 0.0,
) -> None:
    """ours against fp64 truth, at most FACTOR times as far off as the peer, plus the floor of
    compute dtype.

    Each is one result a seed; errors are pooled over the seeds (root mean square).

    Raises:
        AssertionError: otherwise, or where ours is all zero and the truth is not.
    """
    for mine, theirs, true in zip(ours, peer, truth, strict=True):
        assert mine.dtype == theirs.dtype, f"{name}: {mine.dtype}, plain PyTorch {theirs.dtype}"
        assert mine.shape == true.shape, f"{name}: shape {mine.shape}, truth {true.shape}"
        assert mine.any() or not true.any(), f"{name}: all zero, the truth is not"
    off, peer_off = (_pooled(results, truth, trim) for results in (ours, peer))
    limit = FACTOR * peer_off + FLOOR[dtype]
    assert off <= limit, f"{name}: error {off:.3e}, allowed {limit:.3e} (peer {peer_off:.3e})"


def _pooled(results: Sequence[Tensor], truth: Sequence[Tensor], trim: float) -> float:
    squares = [error(r, t, trim) ** 2 for r, t in zip(results, truth, strict=True)]
    return float((sum(squares) / len(squares)) ** 0.5)


def serving_backends(device: str = "cpu") -> list[str]:
    """Backends by name that run conv_bn on this device type, here and now."""
    return [
        name
        for name in backends.BACKENDS
        if backends.unavailable(name, "conv_bn", device, torch.float32) is None
    ]


def serves(backend: str, op: str, dtype: torch.dtype, device: str = "cpu") -> bool:
    """Whether the backend takes tensors of this dtype for this op."""
    return backends.unavailable(backend, op, device, dtype) is None


Inputs = dict[
    str, Tensor
]  # by name; those that require a gradient are leaves, the others are state
Outputs = dict[str, Tensor]


class Case(Protocol):
    """A computation written twice: on fusedres and in plain PyTorch."""

    def inputs(self, make: Maker) -> Inputs:
        """Fresh inputs."""

    def ours(self, t: Inputs) -> Outputs:
        """On fusedres."""

    def eager(self, t: Inputs) -> Outputs:
        """In plain PyTorch, in whatever dtype the inputs have."""


class Maker:
    """Random inputs from a seed, the same numbers in every dtype: all are representable in bf16."""

    def __init__(
        self,
        dtype: torch.dtype,
        memory_format: torch.memory_format = CONTIGUOUS,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.dtype, self.memory_format, self.device = dtype, memory_format, device
        self.generator = torch.Generator().manual_seed(seed)

    def _made(self, values: Tensor, dtype: torch.dtype, grad: bool) -> Tensor:
        t = values.to(torch.bfloat16).to(self.device, dtype)
        if t.dim() == 4:
            t = t.contiguous(memory_format=self.memory_format)
        return t.requires_grad_(grad)

    def activation(self, *shape: int, grad: bool = True) -> Tensor:
        """Normal with an offset of its own, as activations have one."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self._made(values + 0.25, self.dtype, grad)

    def weight(self, *shape: int) -> Tensor:
        """A convolution's weight [K, C / groups, R, S], scaled to keep the variance."""
        fan_in = max(1, shape[1] * shape[2] * shape[3])
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self._made(values * (2.0 / fan_in) ** 0.5, self.dtype, True)

    def norm(self, name: str, channels: int, affine: bool = True) -> Inputs:
        """BatchNorm's [C] tensors under `name`; the running statistics are not at their start."""
        dtype = stat_dtype(self.dtype)

        def uniform(low: float, high: float, grad: bool) -> Tensor:
            values = torch.rand(channels, generator=self.generator, dtype=torch.float64)
            return self._made(values * (high - low) + low, dtype, grad)

        made = {
            f"{name}.weight": uniform(0.5, 1.5, True),
            f"{name}.bias": uniform(-0.5, 0.5, True),
            f"{name}.running_mean": uniform(-0.5, 0.5, False),
            f"{name}.running_var": uniform(0.5, 1.5, False),
        }
        return made if affine else dict(list(made.items())[2:])


def norm_arguments(t: Inputs, name: str) -> tuple[Tensor | None, ...]:
    """weight, bias, running_mean, running_var as fusedres' ops take them."""
    return tuple(t.get(f"{name}.{f}") for f in ("weight", "bias", "running_mean", "running_var"))


def eager_batch_norm(y: Tensor, t: Inputs, name: str, training: bool) -> Tensor:
    """Plain PyTorch's BatchNorm; running statistics move in place."""
    weight, bias, running_mean, running_var = norm_arguments(t, name)
    return F.batch_norm(y, running_mean, running_var, weight, bias, training)


def run(
    function: Callable[[Inputs], Outputs], t: Inputs, seed: int = 12345
) -> Iterator[tuple[str, Tensor]]:
    """By name: every output, every state, and under random upstream gradients every leaf's
    gradient.
    """
    leaves = {name: x for name, x in t.items() if x.requires_grad}
    outputs = function(t)
    generator = torch.Generator().manual_seed(seed)
    upstream = []
    for name, out in outputs.items():
        yield name, out.detach()
        values = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        upstream.append(values.to(torch.bfloat16).to(out.device, out.dtype))
    for name, x in t.items():
        if not x.requires_grad:
            yield name, x
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    for name, gradient in zip(leaves, gradients, strict=True):
        yield f"gradient of {name}", gradient


def check_case(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format = CONTIGUOUS,
    device: str = "cpu",
    trim: float = 0.0,
    plan: str = "auto",
) -> None:
    """The three-way rule for all outputs, states and gradients of a case.

    Raises:
        AssertionError: one of them breaks the rule.
    """

    def runs(function: Callable[[Inputs], Outputs], dtype: torch.dtype) -> list[dict[str, Tensor]]:
        makers = [Maker(dtype, memory_format, device, seed) for seed in seeds]
        return [dict(run(function, case.inputs(m))) for m in makers]

    # what rounds to 8 or 11 bits has errors of chance: several draws tell more than one
    draws = 2 if INTERPRETED else 6  # the interpreter is slow
    seeds = range(draws if dtype in HALF_TYPES else 1)
    truth, peer = runs(case.eager, torch.float64), runs(case.eager, dtype)
    with backends.use_backend(backend), backends.use_plan(plan):
        ours = runs(case.ours, dtype)
    for name in truth[0]:
        results, peers, true = ([r[name] for r in rs] for rs in (ours, peer, truth))
        assert_three_way(name, results, peers, true, dtype, trim)


def gradcheck(case: Case, backend: str, plan: str = "auto") -> None:
    """torch.autograd.gradcheck of what users see, in fp64.

    Raises:
        AssertionError or torch's GradcheckError: numerical and analytical gradients differ.
    """
    state = case.inputs(Maker(torch.float64))
    leaves = [name for name, x in state.items() if x.requires_grad]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        fed = {name: x.clone() for name, x in state.items() if not x.requires_grad}
        return tuple(case.ours({**fed, **dict(zip(leaves, values, strict=True))}).values())

    with backends.use_backend(backend), backends.use_plan(plan):
        assert torch.autograd.gradcheck(function, [state[name] for name in leaves])
