"""ResNet-50 as a whole: fused, unfused and reference side by side.

Run it by `pytest benchmarks --benchmark-only`; plain `pytest` leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fusedres.bench import PROVIDERS, Provider, Workload, inference, timer_for, training_step

# On a CPU small enough for the table to come within a minute, on a GPU large enough to fill it.
if torch.cuda.is_available():
    WORKLOAD = Workload(batch=64, size=224, dtype=torch.bfloat16, device="cuda")
    ROUNDS = 50
else:
    WORKLOAD = Workload(batch=4, size=64)
    ROUNDS = 7

pytestmark = pytest.mark.benchmark(timer=timer_for(WORKLOAD.device))


@pytest.mark.parametrize("name", PROVIDERS)
def test_training_step(benchmark: BenchmarkFixture, name: str) -> None:
    measure(benchmark, "training step", name, training_step)


@pytest.mark.parametrize("name", PROVIDERS)
def test_inference(benchmark: BenchmarkFixture, name: str) -> None:
    measure(benchmark, "inference", name, inference)


def measure(
    benchmark: BenchmarkFixture,
    what: str,
    name: str,
    build: Callable[[str, Workload], Provider],
) -> None:
    """One row of the table that is named after the workload."""
    provider = build(name, WORKLOAD)
    benchmark.group = f"{what}: {WORKLOAD}"
    benchmark.extra_info.update(
        backend=provider.backend,
        dtype=str(WORKLOAD.dtype).removeprefix("torch."),
        batch=WORKLOAD.batch,
        size=WORKLOAD.size,
        device=device_name(),
        torch=torch.__version__,
    )
    result = benchmark.pedantic(provider.run, rounds=ROUNDS, warmup_rounds=2)
    assert torch.isfinite(result).all()


def device_name() -> str:
    """The GPU's name, or how many threads the CPU runs."""
    if WORKLOAD.device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, threads: {torch.get_num_threads()}"
