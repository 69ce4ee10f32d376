"""From measurements to the plan table: which plan a convolution takes, who runs a light pass.

Rows of the suite "ops" say how long each backend and plan took at each size. The fastest gets the
entry; between two measured sizes with different winners the border is their geometric mean. It
holds down to a quarter of the smallest size that was measured, and for all that are larger.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from fusedres.bench.measure import Job
from fusedres.bench.rows import Row

Entry = dict[str, Any]
# a light pass's row, by how its case begins, and the op whose backend it decides
_OPS = {
    "batch_norm_fwd": "batch_norm",
    "batch_norm_bwd": "batch_norm",
    "batch_norm_act_fwd": "batch_norm",
    "bn_act_fwd": "bn_act",
    "bn_act_bwd": "bn_act",
    "bn_relu_maxpool": "bn_relu_maxpool",
    "add_relu": "add_relu",
}


def decides(job: Job) -> bool:
    """Whether there is anything to choose in it: both plans of a layer, forward or backward as a
    whole; two backends of a light pass.
    """
    ours = [name for name in job.names if name.startswith("fusedres-")]
    plans = {name.partition(", ")[2] for name in ours}
    if job.about["section"] == "conv_bn":
        return plans >= {"fused", "split"} and job.about["case"] in ("fwd", "bwd")
    return job.about["section"] == "light" and len(ours) > 1


def entries_from(rows: Sequence[Row]) -> list[Entry]:
    """Entries of the plan table.

    Args:
        rows: of sections "conv_bn" and "light"; others, those that failed and those whose result
            was not a number are passed over.

    Returns:
        Plans of convolutions that were measured by both, then light passes that were measured by
        two backends or more, each over all sizes.
    """
    usable = [
        row
        for row in rows
        if "error" not in row
        and row.get("backend") is not None
        and math.isfinite(row.get("max_error") or 0.0)
    ]
    return _plans([r for r in usable if r["section"] == "conv_bn"]) + _light(
        [r for r in usable if r["section"] == "light"]
    )


def _plans(rows: Sequence[Row]) -> list[Entry]:
    """Forward and backward together: a layer has one plan."""
    # by device, dtype and convolution; there by pixels of the output, (backend, plan), direction
    times: dict[tuple[Any, ...], Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for row in rows:
        batch, size, *conv = row["shape"]
        pixels = batch * ((size - 1) // conv[3] + 1) ** 2
        who = (row["backend"], row["plan"])
        times[row["device"], row["dtype"], *conv][pixels][who][row["case"]] = row["ms"]
    found = []
    for (device, dtype, channels, filters, kernel, stride), sizes in times.items():
        winners = {}
        for pixels, by_way in sizes.items():
            totals = {way: _total(parts) for way, parts in by_way.items()}
            best: dict[str, float] = {}
            for (_, plan), total in totals.items():
                best[plan] = min(total, best.get(plan, math.inf))
            if len(best) == 2 and max(best.values()) < math.inf:
                winners[pixels] = min(best, key=lambda plan: best[plan])
        about = {
            "device": device,
            "dtype": dtype,
            "in_channels": channels,
            "out_channels": filters,
            "kernel": [kernel, kernel],
            "stride": [stride, stride],
        }
        found += [{**about, "rows": span, "plan": plan} for span, plan in _spans(winners)]
    return found


def _total(parts: dict[str, float]) -> float:
    """Forward and backward of a layer; infinite where a direction was not measured."""
    backward = parts.get("bwd", math.inf)
    if "bwd" not in parts and {"dgrad", "wgrad"} <= set(parts):
        backward = parts["dgrad"] + parts["wgrad"]
    return parts.get("fwd", math.inf) + backward


def _light(rows: Sequence[Row]) -> list[Entry]:
    """All passes of an op together, at each size of the tensor: an op has one backend."""
    times: dict[tuple[Any, ...], Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for row in rows:
        op = next((op for start, op in _OPS.items() if row["case"].startswith(start)), None)
        if op is None or " + " in row["case"]:  # a pair spans two ops
            continue
        size = math.prod(row["shape"]) * getattr(torch, row["dtype"]).itemsize
        part = (row["case"], *row["shape"])  # several shapes have one size
        times[row["device"], row["dtype"], op][size][part][row["backend"]] = row["ms"]
    found = []
    for (device, dtype, op), sizes in times.items():
        winners = {}
        for size, parts in sizes.items():
            shared = set.intersection(*(set(by) for by in parts.values()))
            totals = {name: sum(by[name] for by in parts.values()) for name in shared}
            if len(totals) > 1:
                winners[size] = min(totals, key=lambda name: totals[name])
        about = {"device": device, "dtype": dtype, "op": op}
        found += [{**about, "bytes": span, "backend": name} for span, name in _spans(winners)]
    return found


def _spans(winners: dict[int, str]) -> list[tuple[list[int | None], str]]:
    """[least, most] around each run of sizes with one winner."""
    spans: list[tuple[list[int | None], str]] = []
    least, last = min(winners, default=0) // 4, 0
    for size in sorted(winners):
        if spans and spans[-1][1] != winners[size]:
            border = round(math.sqrt(last * size))
            spans[-1][0][1] = border
            least = border + 1
        if not spans or spans[-1][1] != winners[size]:
            spans.append(([least, None], winners[size]))
        last = size
    return spans
