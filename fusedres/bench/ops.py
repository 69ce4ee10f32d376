"""Single ops, timed side by side: our kernels, torch's own, and a copy of as many bytes.

All providers of a job take turns in one run. Each walks over copies of the inputs, so many that
they exceed the last cache three times, on a GPU as a CUDA graph of many launches. Bytes and
arithmetic are the op's contract: what has to be read and written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedres.bench import roofline
from fusedres.bench.harness import Rotation, captured, compare
from fusedres.bench.measure import (
    Measured,
    Setting,
    failed_row,
    largest_error,
    name_of,
    reason_of,
    size_in_bytes,
    tensors_in,
    timed_rows,
)
from fusedres.bench.rows import Row, label

GUESS = (3e12, 5e14)  # bytes/s and FLOP/s of a GPU, for how many launches make up a measurement
LARGEST_GRAPH = 2000  # launches
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One way to run an op.

    Attributes:
        name, backend, plan: as in a row.
        run: on one set of inputs; what it returns is compared with the truth.
        note: what runs, where the name does not say it.
        judged: whether its results are this op's.
    """

    name: str
    run: Callable[[Inputs], Sequence[Tensor]]
    backend: str | None = None
    plan: str | None = None
    note: str = ""
    judged: bool = True

    @property
    def label(self) -> str:
        """See rows.label."""
        return label({"name": self.name, "plan": self.plan})


@dataclass(frozen=True)
class OpCase:
    """An op at one size.

    Attributes:
        fields: section, case, shape, batch, count of its rows.
        bytes, flops: by contract.
        inputs: makes a set of them from a seed.
        candidates: who runs it.
        truth: in fp64, from a set of inputs.
    """

    fields: Row
    dtype: torch.dtype
    bytes: float
    flops: float
    inputs: Callable[[int], Inputs]
    candidates: tuple[Candidate, ...]
    truth: Callable[[Inputs], Sequence[Tensor]]


@torch.no_grad()
def measure_op(case: OpCase, setting: Setting) -> list[Measured]:
    """Every candidate, and a copy of as many bytes."""
    first = case.inputs(0)
    wanted = setting.chosen([c.name for c in case.candidates])
    candidates = [c for c in case.candidates if c.name in wanted]
    about = {c.label: _about(case, c) for c in candidates}
    failed: list[Measured] = []
    with torch.backends.cudnn.flags(benchmark=False):  # in fp64, and once: no algorithm is worth it
        truth = case.truth(first)
    for candidate in list(candidates):
        try:
            results = candidate.run(first)
        except RuntimeError as error:  # torch's of another version, say: the others are measured
            failed.append(failed_row(about.pop(candidate.label), reason_of(error), setting))
            candidates.remove(candidate)
            continue
        if candidate.judged:
            about[candidate.label]["max_error"] = largest_error(results, truth)
    del truth

    copies = max(1, math.ceil(3 * setting.cache / size_in_bytes(tensors_in(first))))
    sets = [first] + [case.inputs(seed) for seed in range(1, copies)]
    runs = {c.label: Rotation(c.run, sets, 1) for c in candidates}
    copied = Candidate("copy", _copy, note="of as many bytes", judged=False)
    pair_count = max(1, math.ceil(3 * setting.cache / max(case.bytes, 1)))
    runs["copy"] = Rotation(copied.run, _pairs(case, pair_count, setting.device), 1)
    about["copy"] = _about(case, copied)

    timed: dict[str, Callable[[], object]] = {}
    for name, rotation in runs.items():
        rotation.count = _repeats(case, rotation, setting)
        timed[name] = captured(rotation) if setting.on_gpu else rotation
        about[name]["how"] = "graph" if setting.on_gpu else "launches"
    found = compare(
        timed, rounds=setting.rounds, budget=setting.budget, stopwatch=setting.stopwatch
    )
    work = {name: (case.bytes, case.flops or None) for name in runs}
    work["copy"] = (case.bytes, None)
    rows = timed_rows(
        found,
        {name: rotation.count for name, rotation in runs.items()},
        about,
        setting,
        work=work,
        ceilings=setting.ceilings.get(case.dtype),
    )
    return [*rows, *failed]


def _about(case: OpCase, candidate: Candidate) -> Row:
    about = case.fields | {"dtype": name_of(case.dtype), "name": candidate.name}
    about |= {"backend": candidate.backend, "plan": candidate.plan}
    return about | {"note": candidate.note} if candidate.note else about


def _repeats(case: OpCase, rotation: Rotation[Any], setting: Setting) -> int:
    """How often a measurement runs it, to last as long as the setting says."""
    if setting.on_gpu:
        seconds = max(roofline.seconds(case.flops, case.bytes, *GUESS), 2e-6)
        count = min(LARGEST_GRAPH, math.ceil(setting.seconds / seconds))
        return math.ceil(count / len(rotation.sets)) * len(rotation.sets)  # a graph's are fixed
    lap = setting.stopwatch(rotation)
    lap = min(lap, setting.stopwatch(rotation))
    return max(1, math.ceil(setting.seconds / max(lap.seconds, 1e-6)))


def _copy(pair: Inputs) -> Sequence[Tensor]:
    return [pair["target"].copy_(pair["source"])]


def _pairs(case: OpCase, count: int, device: torch.device) -> list[Inputs]:
    """Of which half the bytes are read and half written."""
    half = max(1, int(case.bytes) // 2)
    return [
        {
            "target": torch.empty(half, dtype=torch.uint8, device=device),
            "source": torch.randint(256, (half,), dtype=torch.uint8, device=device),
        }
        for _ in range(count)
    ]


def names_of(case: OpCase) -> tuple[str, ...]:
    """Labels of what `measure_op` will measure."""
    return (*(c.label for c in case.candidates), "copy")
