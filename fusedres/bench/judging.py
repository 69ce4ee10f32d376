"""What rows of results come to: which count, how fast each was, and which must be wrong.

A row is judged by those that were measured side by side with it, above all by its anchor: the row
of the same run that it is held against. Nothing here is text or a table yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from fusedres.bench.rows import Row, group, key
from fusedres.testing import FACTOR, FLOOR

LARGEST_ALONE = 0.1  # error of a result that has no other to be held against
# gradients of several layers: where an activation is within rounding of zero ReLU's mask is chance,
# in every implementation alike
GRADIENT_FLOOR = 0.1
ERRORS = {"max_error": "error", "grad_error": "gradient error"}
_FLOORS = {str(dtype).removeprefix("torch."): floor for dtype, floor in FLOOR.items()}

K = TypeVar("K")


class Speed(NamedTuple):
    """Times as fast as the anchor, the 20th and 80th percentile, and whether they took turns."""

    value: float
    low: float | None
    high: float | None
    paired: bool

    def __str__(self) -> str:
        digits = 2 if self.value >= 0.095 else 4
        return f"{'' if self.paired else '~'}{self.value:.{digits}f}x"


def allowed_error(field: str, peer: float, dtype: str) -> float:
    """The most that an error, one of ERRORS, may be beside a peer's: FACTOR times as much, plus the
    FLOOR of its dtype, or GRADIENT_FLOOR.
    """
    own = _FLOORS.get(dtype, LARGEST_ALONE)
    return FACTOR * peer + (GRADIENT_FLOOR if field == "grad_error" else own)


def suspect(row: Row, rows: Iterable[Row]) -> str:
    """Why a row's result must be wrong: the error and what would be allowed; "" if nothing is.

    It is held against its anchor in `rows`; where there is none, it may be off by LARGEST_ALONE.
    """
    base = _anchor(row, rows)
    for field, what in ERRORS.items():
        value, peer = row.get(field), base.get(field) if base else None
        if not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            return f"{what} {value:.1e}"
        allowed = LARGEST_ALONE
        if isinstance(peer, int | float) and math.isfinite(peer):
            allowed = allowed_error(field, peer, str(row.get("dtype")))
        if value > allowed:
            return f"{what} {value:.1e} (allowed: {allowed:.1e})"
    return ""


class Device:
    """The rows of one device, and what is read off them."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        self.name, self.rows, self.gpu = name, rows, name != "cpu"
        self.groups = by(rows, group)

    def of(self, *sections: str) -> list[Row]:
        return [row for row in self.rows if row["section"] in sections]

    def beside(self, row: Row) -> list[Row]:
        """What was measured side by side with it."""
        return self.groups[group(row)]

    def wrong(self, row: Row) -> str:
        return suspect(row, self.beside(row))

    def anchors(self, row: Row) -> bool:
        """Whether others are held against it."""
        return bool(row["name"] == base_name(row))

    def speed(self, row: Row) -> Speed | None:
        """Against its anchor; None where it failed or there is none."""
        ratio = positive(row, "ratio")
        if row.get("error"):
            return None
        if ratio:
            low, high = positive(row, "ratio_p80"), positive(row, "ratio_p20")
            return Speed(1 / ratio, low and 1 / low, high and 1 / high, True)
        base, ms = _anchor(row, self.beside(row)), positive(row, "ms")
        if base is row and ms:
            return Speed(1.0, None, None, True)
        base_ms = base and positive(base, "ms")
        return Speed(base_ms / ms, None, None, False) if base_ms and ms else None

    def fastest(self, rows: Iterable[Row]) -> Row | None:
        """Of those that ran and are right."""
        speeds = [(self.speed(row), row) for row in rows if not self.wrong(row)]
        ran = [(speed.value, row) for speed, row in speeds if speed]
        return max(ran, key=lambda pair: pair[0], default=(0.0, None))[1]

    def ordered(self, rows: Iterable[Row]) -> list[Row]:
        """The fastest first, those that failed last."""
        speeds = [(self.speed(row), row) for row in rows]
        speeds.sort(key=lambda pair: -pair[0].value if pair[0] else math.inf)
        return [row for _, row in speeds]

    def kind(self, row: Row) -> str:
        """Of the bar that stands for it, a key of figures.KINDS."""
        if self.wrong(row):
            return "wrong"
        return "fusedres" if is_ours(row) else "anchor" if self.anchors(row) else "other"

    def ceiling(self, field: str, dtype: str | None = None) -> float | None:
        """The most that was reached: "gb_s" by a copy, "tflops" in a dtype by large products."""
        rows = [row for row in self.of("ceilings") if dtype in (None, row["dtype"])]
        return max(filter(None, (positive(row, field) for row in rows)), default=None)


# --- several rows ---


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that measured the same thing the newest, where the first of them stood."""
    found: dict[object, Row] = {}
    for row in rows:
        step = row.get("time") if row["section"] == "profile" else None  # one step stays together
        name = (row["device"], key(row), step)
        if name not in found or str(found[name].get("time") or "") <= str(row.get("time") or ""):
            found[name] = row
    return list(found.values())


def by(rows: Iterable[Row], of: Callable[[Row], K]) -> dict[K, list[Row]]:
    """Rows by what they share, in the order in which it first comes up."""
    found: dict[K, list[Row]] = {}
    for row in rows:
        found.setdefault(of(row), []).append(row)
    return found


# --- single rows ---


def base_name(row: Row) -> str:
    return str(row.get("against") or "eager")


def is_ours(row: Row) -> bool:
    return row["name"].startswith("fusedres")


def positive(row: Row, field: str) -> float | None:
    """A figure that can be divided by; None for what is missing."""
    value = row.get(field)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value) if value > 0 else None


def _anchor(row: Row, rows: Iterable[Row]) -> Row | None:
    """The row that it is held against."""
    name, device, of = base_name(row), row.get("device"), group(row)
    for other in rows:
        if other["name"] == name and other.get("device") == device and group(other) == of:
            return other
    return None
