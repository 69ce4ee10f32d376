"""ResNet-50 as a whole: a training step, and inference."""

from __future__ import annotations

from collections.abc import Callable

from fusedres.bench.measure import Job


def test_model(replayed: Callable[[Job, str], None], job: Job, name: str) -> None:
    replayed(job, name)
