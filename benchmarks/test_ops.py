"""Single ops: light passes and conv_bn at the layers of a ResNet-50."""

from __future__ import annotations

from collections.abc import Callable

from fusedres.bench.measure import Job


def test_ops(replayed: Callable[[Job, str], None], job: Job, name: str) -> None:
    replayed(job, name)
