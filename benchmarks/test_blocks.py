"""IdentityBlock and ConvBlock as they stand in each stage, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

from fusedres.bench.measure import Job


def test_blocks(replayed: Callable[[Job, str], None], job: Job, name: str) -> None:
    replayed(job, name)
