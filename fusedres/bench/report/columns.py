"""The columns that a table of rows can have: the name of each, and what a row's cell in it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fusedres.bench.judging import Device, positive
from fusedres.bench.report.page import DASH, Cell, Column, Table
from fusedres.bench.report.wording import against_of, shape_of, three_figures
from fusedres.bench.rows import Row


@dataclass(frozen=True)
class Field:
    """A column of a table of rows."""

    name: str
    text: Callable[[Device, Row], str]
    number: bool = True
    gpu_only: bool = False
    short: str = ""
    long: bool = False


# --- the text of a cell ---


def _plain(field: str) -> Callable[[Device, Row], str]:
    return lambda _, row: "" if row.get(field) is None else str(row[field])


def _value(field: str, scale: float = 1.0) -> Callable[[Device, Row], str]:
    def text(_: Device, row: Row) -> str:
        value = positive(row, field)
        return three_figures(scale * value) if value else ""

    return text


def _error(field: str) -> Callable[[Device, Row], str]:
    def text(_: Device, row: Row) -> str:
        value = row.get(field)
        return f"{value:.1e}" if isinstance(value, int | float) else ""

    return text


def _speed_text(device: Device, row: Row) -> str:
    if row.get("error"):
        return "failed"
    return str(device.speed(row) or "")


def _spread_text(device: Device, row: Row) -> str:
    speed = device.speed(row)
    if not speed or not speed.low or not speed.high:
        return ""
    digits = 2 if speed.low >= 0.095 else 4
    return f"{speed.low:.{digits}f}{DASH}{speed.high:.{digits}f}"


def _roofline_text(device: Device, row: Row) -> str:
    """Where a light pass has no share of the roofline: that of the copy's speed."""
    share = positive(row, "of_roofline")
    if share:
        return f"{100 * share:.0f}%"
    speed, copied = positive(row, "gb_s"), device.ceiling("gb_s")
    if row["section"] != "light" or not speed or not copied:
        return ""
    return f"{100 * speed / copied:.0f}% of copy"


def _plan_text(_: Device, row: Row) -> str:
    """The plan, where one was asked for; of a profile the one that ran."""
    plan = row.get("plan")
    return "" if plan in (None, "auto") else str(plan)


def _kernels_text(_: Device, row: Row) -> str:
    kernels = row.get("kernels") or ""
    return ", ".join(map(str, kernels)) if isinstance(kernels, list) else str(kernels)


def remark_on(device: Device, row: Row, known: str | None = None) -> str:
    """What is wrong with a row, why it failed, and its note, unless that is known already."""
    wrong, failed, note = device.wrong(row), row.get("error"), str(row.get("note") or "")
    parts = [f"wrong: {wrong}" if wrong else "", f"failed: {failed}" if failed else ""]
    parts.append("" if note == known else note)
    return "; ".join(part for part in parts if part)


# --- the columns, and which of them a table has ---


COLUMNS = {
    "case": Field("case", _plain("case"), number=False),
    "shape": Field("shape", lambda _, row: shape_of(row), number=False),
    "provider": Field("provider", _plain("name"), number=False),
    "plan": Field("plan", _plan_text, number=False),
    "kind": Field("kind", _plain("name"), number=False),
    "backend": Field("backend", _plain("backend"), number=False),
    "dtype": Field("dtype", _plain("dtype"), number=False),
    "batch": Field("batch", _plain("batch")),
    "count": Field("count", _plain("count")),
    "speed": Field("speed", _speed_text, short="speed"),
    "spread": Field(f"p20{DASH}p80", _spread_text),
    "ms": Field("ms", _value("ms"), gpu_only=True, short="ms"),
    "wall_ms": Field("host ms", _value("wall_ms"), gpu_only=True),
    "img_s": Field("img/s", _value("img_s"), gpu_only=True),
    "gb_s": Field("GB/s", _value("gb_s"), gpu_only=True, short="GB/s"),
    "tflops": Field("TFLOP/s", _value("tflops"), gpu_only=True),
    "share": Field("% of the step", _value("share", 100.0)),
    "bytes": Field("MB", _value("bytes", 1e-6)),
    "of_roofline": Field("% of roofline", _roofline_text, short="% of roof"),
    "max_error": Field("error", _error("max_error"), short="error"),
    "grad_error": Field("gradient error", _error("grad_error")),
    "peak_gib": Field("peak GiB", _value("peak_gib")),
    "how": Field("timed as", _plain("how"), number=False),
    "kernels": Field("kernels", _kernels_text, number=False, long=True),
    "note": Field("note", remark_on, number=False, long=True),
}
OPS = ("case", "shape")
_TIMES = ("provider", "plan", "speed", "spread", "ms")
_SHARES = ("img_s", "tflops", "of_roofline")
NETWORK = (*_TIMES, "wall_ms", *_SHARES, "max_error", "grad_error", "peak_gib", "note")
LIGHT = (*_TIMES, "of_roofline", "gb_s", "max_error", "how", "note")
PROFILE = ("case", "kind", "backend", "plan", "share", "ms", "bytes", "of_roofline", "kernels")
_SPEEDS = ("dtype", "batch", "count", "img_s", "gb_s", "tflops", "of_roofline")
PLAIN = (*OPS, *_TIMES, *_SPEEDS, "max_error", "grad_error", "peak_gib", "note")


def table_of(device: Device, rows: Sequence[Row], name: str, fields: Sequence[str]) -> Table:
    """One line a row, the fields as columns; columns that nothing fills are left out."""
    shown = [COLUMNS[f] for f in fields if device.gpu or not COLUMNS[f].gpu_only]
    against = against_of(rows)
    heads = [
        Column(
            f"speed, {against} = 1" if c.name == "speed" else c.name, number=c.number, long=c.long
        )
        for c in shown
    ]
    lines = []
    for row in rows:
        wrong, cells = device.wrong(row), []
        for column in shown:
            to_blame = column.name in ("provider", "note") or wrong.startswith(f"{column.name} ")
            cells.append(Cell(column.text(device, row), "wrong" * (wrong != "" and to_blame)))
        lines.append(cells)
    return Table(name, heads, lines).pruned()
