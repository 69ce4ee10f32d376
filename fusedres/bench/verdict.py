"""Two files of results against each other, and one against limits: what got slower or wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedres.bench.judging import ERRORS, allowed_error
from fusedres.bench.rows import TUNING, Row, group, key, label

MARGIN = {"cpu": 0.25, "gpu": 0.10}  # of change that is taken for noise
VERDICTS = ("failed", "missing", "wrong", "slower", "faster", "same")
BAD = VERDICTS[:4]
LIMIT = {"section", "case", "shape", "dtype", "name", "ratio", "margin"}


@dataclass(frozen=True)
class Change:
    """One row that is in both files.

    Attributes:
        what: the row in words.
        by: the new time over the old one: above 1 is slower. On a CPU, whose moods outweigh most
            changes, both are times over that of the provider they were measured beside.
        verdict: one of VERDICTS.
        detail: what the verdict rests on.
    """

    what: str
    by: float
    verdict: str
    detail: str


def changes(old: Sequence[Row], new: Sequence[Row], margin: float | None = None) -> list[Change]:
    """What became of each row of `old` that is in `new` as well, the worst first.

    A row is slower, or faster, where the medians part by more than the margin and the ranges from
    the 20th to the 80th percentile do not touch. It is wrong where its error is more than twice
    what it was, and more than the floor of its dtype.

    Args:
        margin: 0.1 for 10%; by default 0.25 on a CPU and 0.10 on a GPU.

    Raises:
        ValueError: the files have no row in common.
    """
    before = {
        (row["device"], key(row)): row
        for row in old
        if "error" not in row
        and row["section"] not in ("ceilings", *TUNING)
        and row["name"] != "copy"
    }
    before = {same: row for same, row in before.items() if not _is_measure(row)}
    after = {(row["device"], key(row)): row for row in new}
    jobs = {(row["device"], group(row)) for row in new}
    found = []
    for same, row in before.items():
        if same in after:
            found.append(_change(row, after[same], margin))
        elif (row["device"], group(row)) in jobs:
            found.append(Change(in_words(row), math.inf, "missing", "others of its job ran"))
    if not any(change.verdict != "missing" for change in found):
        raise ValueError(
            "the two files have no row in common: the same device, section, case, shape, dtype, "
            "batch, name and plan"
        )
    return sorted(found, key=lambda change: (VERDICTS.index(change.verdict), -change.by))


def _change(old: Row, new: Row, margin: float | None) -> Change:
    what = in_words(new)
    if "error" in new:
        return Change(what, math.inf, "failed", new["error"])
    worse = _worse(old, new)
    if worse:
        return Change(what, _times(new)[0] / _times(old)[0], "wrong", worse)
    if margin is None:
        margin = MARGIN["cpu" if new["device"] == "cpu" else "gpu"]
    (was, was_p20, was_p80), (now, now_p20, now_p80) = _times(old), _times(new)
    by = now / was
    verdict = "same"
    if by > 1 + margin and now_p20 > was_p80:
        verdict = "slower"
    if by < 1 / (1 + margin) and now_p80 < was_p20:
        verdict = "faster"
    return Change(what, by, verdict, f"{was:.3g} -> {now:.3g} {_unit(new)}")


def _is_measure(row: Row) -> bool:
    """Whether it is what others are held to on a CPU, and itself to nothing."""
    return row["device"] == "cpu" and row.get("against") in (None, row["name"])


def _times(row: Row) -> tuple[float, float, float]:
    """Median, p20, p80: milliseconds on a GPU, a ratio on a CPU."""
    if row["device"] != "cpu":
        return row["ms"], row["p20"], row["p80"]
    return row["ratio"], row["ratio_p20"], row["ratio_p80"]


def _unit(row: Row) -> str:
    return "ms" if row["device"] != "cpu" else f"of {row['against']}'s time"


def _worse(old: Row, new: Row) -> str:
    """Which error grew beyond what is allowed; "" if none did."""
    for field, what in ERRORS.items():
        was, now = old.get(field), new.get(field)
        if (
            was is not None
            and now is not None
            and not now <= allowed_error(field, was, new["dtype"])
        ):
            return f"{what} {now:.1e}, was {was:.1e}"
    return ""


def in_words(row: Row) -> str:
    """What was measured, and who ran it."""
    shape = "x".join(map(str, row.get("shape") or []))
    parts = (row["section"], row.get("case") or "", shape, row["dtype"], label(row))
    return ", ".join(filter(None, parts))


# --- one file against limits ----------------------------------------------------------------------


def read_limits(path: Path) -> list[dict[str, Any]]:
    """A JSON list of limits: the row they are for, its plan where there are several, its ratio as
    once measured, and by what factor it may be exceeded.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds anything else.
    """
    limits = json.loads(path.read_text())
    if not isinstance(limits, list) or any(
        not isinstance(limit, dict) or set(limit) - {"plan"} != LIMIT or limit["margin"] < 1
        for limit in limits
    ):
        raise ValueError(f"{path}: expected a list of limits with {', '.join(sorted(LIMIT))}")
    return limits


def exceeded(rows: Sequence[Row], limits: Sequence[dict[str, Any]]) -> list[str]:
    """Of each limit that does not hold, why: even the faster fifth of the rounds is too slow, or
    there is no such row.
    """
    found = []
    for limit in limits:
        fields = [f for f in limit if f not in ("ratio", "margin")]
        matching = [row for row in rows if all(row.get(f) == limit[f] for f in fields)]
        most = limit["ratio"] * limit["margin"]
        what = in_words({"plan": None, **limit})
        if not matching:
            found.append(f"{what}: not measured")
        for row in matching:
            if row.get("ratio") is None:
                found.append(f"{what}: {row.get('error') or 'nothing to hold it against'}")
            elif row["ratio_p20"] > most:
                found.append(
                    f"{what}: {row['ratio']:.2f} of {row['against']}'s time "
                    f"(p20 {row['ratio_p20']:.2f}), at most {most:.2f}"
                )
    return found
