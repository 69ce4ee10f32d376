"""Rows of results in words: devices, workloads, shapes and figures as every part of a report names
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from fusedres.bench.judging import base_name, is_ours
from fusedres.bench.rows import Row, label

ALONE = "measured alone"  # without what it could be held against
WORK = {
    "train": "training",
    "infer": "inference",
    "profile": "a training step",
    "conv_bn": "Convolution + BatchNorm",
}

Workload = tuple[str, int | None, str, str]  # section, batch, dtype, size and other particulars


# --- what was measured ---


def title_of(device: str) -> str:
    return "CPU" if device == "cpu" else device


def workload_of(row: Row) -> Workload:
    shape = row.get("shape") or []
    size = f"{shape[-2]}x{shape[-1]}" if len(shape) == 4 else ""
    case = str(row.get("case") or "")
    other = case if case != "resnet50" and row["section"] != "profile" else ""
    return row["section"], row.get("batch"), row["dtype"], ", ".join(p for p in (size, other) if p)


def workload_in_words(workload: Workload) -> str:
    """ "training, batch 256, bfloat16, 224x224", for example."""
    section, batch, dtype, particulars = workload
    parts = (WORK.get(section, section), f"batch {batch}" if batch else "", dtype, particulars)
    return ", ".join(part for part in parts if part)


def shape_of(row: Row) -> str:
    """ "56x56, 64 -> 256, 1x1/1" for a convolution."""
    shape = row.get("shape") or []
    if row["section"] in ("conv_bn", "convs") and len(shape) == 6:
        _, size, channels, out, kernel, stride = shape
        return f"{size}x{size}, {channels} -> {out}, {kernel}x{kernel}/{stride}"
    return "x".join(map(str, shape)) if isinstance(shape, list) else str(shape)


def case_of(row: Row) -> str:
    return ", ".join(part for part in (str(row.get("case") or ""), shape_of(row)) if part)


# --- several rows ---


def against_of(rows: Iterable[Row]) -> str:
    """What they are held against, in words."""
    return ", ".join(dict.fromkeys(map(base_name, rows)))


def providers(rows: Iterable[Row]) -> list[str]:
    """Labels, ours first."""
    names = {label(row): not is_ours(row) for row in rows}
    return sorted(names, key=lambda name: names[name])


def values_of(rows: Iterable[Row], field: str) -> str:
    return ", ".join(dict.fromkeys(str(r[field]) for r in rows if r.get(field) is not None))


# --- text and figures ---


def three_figures(value: float) -> str:
    """Three figures, but all of those before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
