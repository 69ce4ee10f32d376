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
from fusedres.bench.harness import Rotation, captured, compare, without_search
from fusedres.bench.measure import (
    Job,
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


def wide(t: Inputs) -> Inputs:
    """In fp64."""
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in t.items()}


@torch.no_grad()
def measure_op(case: OpCase, setting: Setting) -> list[Measured]:
    """Every candidate, and a copy of as many bytes."""
    first = case.inputs(0)
    wanted = setting.chosen([c.name for c in case.candidates])
    candidates = [c for c in case.candidates if c.name in wanted]
    about = {c.label: _about(case, c, setting) for c in [*candidates, _COPY]}
    failed: list[Measured] = []
    with without_search():
        truth = case.truth(first)
    sets = input_sets(case, first, setting)
    pairs = _pairs(case, max(1, math.ceil(3 * setting.cache / case.bytes)), setting.device)

    runs: dict[str, Rotation[Inputs]] = {}
    timed: dict[str, Callable[[], object]] = {}
    for candidate in [*candidates, _COPY]:
        name = candidate.label
        rotation = Rotation(candidate.run, pairs if candidate is _COPY else sets, 1)
        try:
            if candidate.judged:
                about[name]["max_error"] = largest_error(candidate.run(first), truth)
            rotation.count = repeats(case, rotation, setting)
            timed[name] = captured(rotation) if setting.on_gpu else rotation
            timed[name]()
        except Exception as error:  # of torch's or a compiler's: the others are measured
            timed.pop(name, None)
            failed.append(failed_row(about.pop(name), reason_of(error), setting))
            continue
        runs[name] = rotation
    del truth
    found = compare(
        timed, rounds=setting.rounds, budget=setting.budget, stopwatch=setting.stopwatch
    )
    rows = timed_rows(
        found,
        {name: rotation.count for name, rotation in runs.items()},
        about,
        setting,
        work={name: [(case.bytes, 0.0 if name == "copy" else case.flops)] for name in runs},
        ceilings=setting.ceilings.get(case.dtype),
    )
    return [*rows, *failed]


def input_sets(case: OpCase, first: Inputs, setting: Setting) -> list[Inputs]:
    """The first and as many more that together they exceed the cache three times."""
    copies = math.ceil(3 * setting.cache / min(size_in_bytes(tensors_in(first)), case.bytes))
    return [first] + [case.inputs(seed) for seed in range(1, copies)]


def _about(case: OpCase, candidate: Candidate, setting: Setting) -> Row:
    about = case.fields | {"dtype": name_of(case.dtype), "name": candidate.name}
    about |= {"backend": candidate.backend, "plan": candidate.plan}
    about["how"] = "graph" if setting.on_gpu else "launches"
    return about | {"note": candidate.note} if candidate.note else about


def repeats(case: OpCase, rotation: Rotation[Any], setting: Setting) -> int:
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


_COPY = Candidate("copy", _copy, note="of as many bytes", judged=False)


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


def op_job(case: OpCase, setting: Setting) -> Job:
    """The case as a job."""
    wanted = setting.chosen([c.name for c in case.candidates])
    labels = (*(c.label for c in case.candidates if c.name in wanted), _COPY.label)
    shape = "x".join(map(str, case.fields["shape"]))
    dtype = name_of(case.dtype)
    title = f"{case.fields['case']}, {shape}, {dtype}"
    about = {field: case.fields[field] for field in ("section", "case", "shape", "batch")}
    return Job(about | {"dtype": dtype}, title, labels, lambda setting: measure_op(case, setting))
