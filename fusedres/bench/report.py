"""Rows of results as a page and as Markdown.

Rows of different devices never share a table. Absolute speeds are shown of GPUs only: those of a
CPU say more about the machine, and what else ran on it, than about the code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fusedres.bench import figures, roofline
from fusedres.bench.page import (
    DASH,
    Block,
    Bullets,
    Cell,
    Column,
    Figure,
    Heading,
    Paragraph,
    Table,
    html,
    markdown,
)
from fusedres.bench.rows import SECTIONS, Row, group, key, label
from fusedres.testing import FACTOR, FLOOR
from fusedres.training.files import write_atomically

TITLE = "fusedres: how fast, how exact"
NOT_MEASURED = "not measured"
ALONE = "measured alone"  # without what it could be held against
LARGEST_ALONE = 0.1  # error of a result that has no other to be held against
_FLOORS = {str(dtype).removeprefix("torch."): floor for dtype, floor in FLOOR.items()}
LARGEST = 20  # layers of a profile that are drawn
README_GPU = [("train", 256), ("train", 400), ("infer", 1), ("infer", 32), ("infer", 256)]

LEAD = (
    "1.2x means: in the time in which the provider it is held against does 1, this one does 1.2; "
    "below 1x it is slower.",
    "How the figures were taken: in every round each provider ran once, in an order that moves on "
    "by one from round to round, so that all met the same moods of the machine. A speed is the "
    "median, over the rounds, of the two times within a round; p20 to p80 is how far it spread. "
    "Speeds marked ~ are quotients of two medians instead, of runs that did not take turns. "
    "% of roofline is the time that the ceilings measured in the same "
    "run (a large copy, a large matrix product) would allow, over the time taken; inputs that stay "
    "in a cache can take it over 100%.",
    "Errors are distances from the same computed in fp64, relative to it: of single ops the "
    "largest element's, of networks by the Euclidean norm. In half types the gradients of a whole "
    "network are mostly noise, in every implementation alike: compare them with one another. A "
    "result is "
    f"called wrong where its error is more than {FACTOR:g} times that of what it is held against, "
    "plus a floor for the dtype.",
    "Of a CPU only ratios are shown: its absolute speeds say more about the machine than about the "
    "code.",
)
WORK = {"train": "training", "infer": "inference", "profile": "a training step"}
PARTS = {"light": "Light passes", "conv_bn": "Layers against the roofline"}
DIRECTIONS = {
    "fwd": "forward",
    "dgrad": "gradient of the input (dgrad)",
    "wgrad": "gradient of the weight (wgrad)",
    "bwd": "backward, both gradients (bwd)",
}


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


def suspect(row: Row, rows: Iterable[Row]) -> str:
    """Why a row's result must be wrong: the error and what would be allowed; "" if nothing is.

    It may be off by FACTOR times as much as the row in `rows` that it is held against, plus the
    FLOOR of its dtype; where there is none, by LARGEST_ALONE.
    """
    base = _anchor(row, rows)
    floor = _FLOORS.get(str(row.get("dtype")), LARGEST_ALONE)
    for field, what in (("max_error", "error"), ("grad_error", "gradient error")):
        value, peer = row.get(field), base.get(field) if base else None
        if not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            return f"{what} {value:.1e}"
        allowed = LARGEST_ALONE
        if isinstance(peer, int | float) and math.isfinite(peer):
            allowed = FACTOR * peer + floor
        if value > allowed:
            return f"{what} {value:.1e} (allowed: {allowed:.1e})"
    return ""


def tables(rows: Sequence[Row]) -> str:
    """Everything but the figures, as Markdown.

    Raises:
        ValueError: there are no rows.
    """
    return f"# {TITLE}\n\n" + markdown(_document(rows))


def page(rows: Sequence[Row], title: str = TITLE) -> str:
    """Everything, as an HTML document that needs nothing beside itself.

    Raises:
        ValueError: there are no rows.
        TrainingError: matplotlib is not installed.
    """
    return html(title, _document(rows))


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write report.html and report.md; raises as `page` does, and OSError."""
    content = {"report.html": page(rows), "report.md": tables(rows)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        write_atomically(folder / name, text.encode())
    return [folder / name for name in content]


def readme_tables(rows: Sequence[Row]) -> str:
    """The README's tables of ResNet-50: on a CPU, and on each GPU that was measured."""
    newest = _newest(rows)
    parts = ["### CPU", model_table(newest, "cpu")]
    gpus = sorted({row["device"] for row in newest if row["device"] != "cpu"})
    for gpu in gpus or ["GPU"]:
        wanted = [(section, batch, "bfloat16", "") for section, batch in README_GPU]
        parts += ["### GPU" if gpu == "GPU" else f"### GPU: {gpu}"]
        parts += [model_table(newest, gpu, wanted, _README_COLUMNS)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


Workload = tuple[str, int | None, str, str]  # section, batch, dtype, size and other particulars


def model_table(
    rows: Sequence[Row],
    device: str,
    workloads: Sequence[Workload] = (),
    columns: Mapping[str, str] | None = None,
) -> str:
    """One row a workload of the whole network, one column a provider, in Markdown.

    Args:
        device: rows of others do not count.
        workloads: which rows of the table, also where nothing was measured; all there are, if none
            are given. One without a size takes any.
        columns: a regular expression for providers by the name of the column; the fastest that
            fits stands there. One for each provider there is, if None.
    """
    here = _Device(device, [r for r in _newest(rows) if r["device"] == device])
    found = here.of("train", "infer")
    wanted = list(workloads) or list(dict.fromkeys(_workload(row) for row in found))
    if columns is None:
        columns = {name: re.escape(name) for name in _providers(found)}
    used: list[Row] = []
    lines = []
    for workload in wanted:
        known = len(workload) if workload[3] else 3
        of_it = [row for row in found if _workload(row)[:known] == workload[:known]]
        cells = [Cell(_named(workload))]
        for pattern in columns.values():
            fitting = [row for row in of_it if re.fullmatch(pattern, label(row))]
            best = here.fastest(fitting)
            used += [best] if best else []
            cells.append(here.summary(best, fitting, pattern.endswith("*")))
        lines.append(cells)
    heads = [Column("", number=False)] + [Column(name) for name in columns]
    if not found and not workloads:
        return f"Nothing was measured on {_title(device)}.\n"
    return markdown([Table("ResNet-50", heads, lines), Paragraph(here.caption(used))])


_README_COLUMNS = {
    "eager": "eager",
    "graph": "graph",
    "best torch.compile": "compile.*",
    "fusedres": "fusedres.*",
}


class _Device:
    """The rows of one device, and what is read off them."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        self.name, self.rows, self.gpu = name, rows, name != "cpu"
        self.groups: dict[object, list[Row]] = {}
        for row in rows:
            self.groups.setdefault(group(row), []).append(row)

    def of(self, *sections: str) -> list[Row]:
        return [row for row in self.rows if row["section"] in sections]

    def beside(self, row: Row) -> list[Row]:
        """What was measured side by side with it."""
        return self.groups[group(row)]

    def wrong(self, row: Row) -> str:
        return suspect(row, self.beside(row))

    def anchors(self, row: Row) -> bool:
        """Whether others are held against it."""
        return bool(row["name"] == _base_name(row))

    def speed(self, row: Row) -> Speed | None:
        """Against its anchor; None where it failed or there is none."""
        ratio = _positive(row, "ratio")
        if row.get("error"):
            return None
        if ratio:
            low, high = _positive(row, "ratio_p80"), _positive(row, "ratio_p20")
            return Speed(1 / ratio, low and 1 / low, high and 1 / high, True)
        base, ms = _anchor(row, self.beside(row)), _positive(row, "ms")
        if base is row and ms:
            return Speed(1.0, None, None, True)
        base_ms = base and _positive(base, "ms")
        return Speed(base_ms / ms, None, None, False) if base_ms and ms else None

    def fastest(self, rows: Iterable[Row]) -> Row | None:
        """Of those that ran and are right."""
        speeds = [(self.speed(row), row) for row in rows if not self.wrong(row)]
        ran = [(speed.value, row) for speed, row in speeds if speed]
        return max(ran, key=lambda pair: pair[0], default=(0.0, None))[1]

    def ceiling(self, name: str, field: str, dtype: str | None = None) -> float | None:
        """ "copy" in GB/s or "matmul" in TFLOP/s, the newest of the dtype."""
        found = [r for r in self.of("ceilings") if r["name"] == name and _positive(r, field)]
        found = [r for r in found if dtype in (None, r["dtype"])]
        found.sort(key=lambda row: str(row.get("time") or ""))
        return float(found[-1][field]) if found else None

    def summary(self, best: Row | None, rows: Sequence[Row], named: bool) -> Cell:
        """A cell of the README's table; says which provider it is, if asked."""
        if best is None:
            if any(self.wrong(row) for row in rows):
                return Cell("wrong", "wrong")
            if not all(row.get("error") for row in rows):
                return Cell(ALONE)
            return Cell("failed" if rows else NOT_MEASURED)
        text = str(self.speed(best))
        if self.gpu and (images := _positive(best, "img_s")):
            text += f", {_figures(images)} img/s"
        return Cell(f"{text} ({label(best)})" if named else text)

    def caption(self, rows: Sequence[Row]) -> str:
        """What a table of these rows must say about itself."""
        if not rows:
            return f"No {'GPU' if self.gpu else 'CPU'} figure has been measured yet."
        where = self.name if self.gpu else f"CPU with {_values(rows, 'threads') or '?'} threads"
        against = _against(rows)
        text = f"{where}; torch {_values(rows, 'torch') or '?'}; {_values(rows, 'dtype')}; "
        text += f"speed relative to {against}, above 1x is faster; "
        speeds = [speed for row in rows if (speed := self.speed(row))]
        text += "measured side by side in one run"
        unpaired = any(not speed.paired for speed in speeds)
        return text + (", but those marked ~ one after the other." if unpaired else ".")


# --- the document ---


def _document(rows: Sequence[Row]) -> list[Block]:
    newest = _newest(rows)
    if not newest:
        raise ValueError("nothing to report: no rows of results were given")
    names = sorted({row["device"] for row in newest}, key=lambda name: (name == "cpu", name))
    devices = [_Device(name, [r for r in newest if r["device"] == name]) for name in names]
    blocks: list[Block] = [*_wrong_ones(devices), *map(Paragraph, LEAD)]
    for device in devices:
        blocks += _of_device(device)
    return blocks + _bytes(devices)


def _wrong_ones(devices: Sequence[_Device]) -> list[Block]:
    """All wrong results, the rows of one provider in one line, above everything else."""
    found: dict[str, list[str]] = {}
    for device in devices:
        for row in device.rows:
            if reason := device.wrong(row):
                what = f"{_title(device.name)}: {row['section']}, {label(row)}, {row['dtype']}"
                found.setdefault(what, []).append(f"{_case_of(row)}: {reason}".removeprefix(": "))
    if not found:
        return []
    items = [
        Cell(f"wrong: {what}: {'; '.join(r[:3])}" + _more(len(r) - 3), "wrong")
        for what, r in found.items()
    ]
    return [Paragraph("Do not trust these results, nor how fast they came:"), Bullets(items)]


def _of_device(device: _Device) -> list[Block]:
    blocks: list[Block] = [Heading(2, _title(device.name)), _where(device)]
    blocks += _in_short(device)
    blocks += _by_provider(device)
    blocks += _memory(device)
    blocks += _layers(device)
    blocks += _light(device)
    blocks += _profile(device)
    known = {*SECTIONS, "profile"}
    for section in dict.fromkeys(row["section"] for row in device.rows):
        if section not in known:
            blocks.append(Heading(3, f"Other measurements: {section}"))
            blocks.append(_table(device, device.of(section), section, _PLAIN))
    return blocks


def _where(device: _Device) -> Table:
    """Where the rows come from."""
    times = sorted(str(row["time"])[:10] for row in device.rows if row.get("time"))
    dates = "" if not times else times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"
    commits = dict.fromkeys(
        str(row["commit"])[:12] + (" and changes" if " " in str(row["commit"]) else "")
        for row in device.rows
        if row.get("commit")
    )
    entries = {"device": _title(device.name), "threads": _values(device.rows, "threads")}
    of_gpu = ("driver", "cuda", "cudnn") if device.gpu else ()
    named = {"cuda": "CUDA", "cudnn": "cuDNN", "triton": "Triton", "python": "Python"}
    for field in (*of_gpu, "torch", "triton", "python", "fusedres"):
        entries[named.get(field, field)] = _values(device.rows, field)
    entries |= {"commit": _join(commits), "measured": dates, "rows": str(len(device.rows))}
    if device.gpu:
        if copied := device.ceiling("copy", "gb_s"):
            entries["ceiling: copy"] = f"{_figures(copied)} GB/s"
        for dtype in dict.fromkeys(row["dtype"] for row in device.of("ceilings")):
            if peak := device.ceiling("matmul", "tflops", dtype):
                entries[f"ceiling: matmul, {dtype}"] = f"{_figures(peak)} TFLOP/s"
    columns = [Column("", number=False), Column("", number=False, long=True)]
    lines = [[Cell(name), Cell(value)] for name, value in entries.items() if value]
    return Table("where and with what", columns, lines)


def _in_short(device: _Device) -> list[Block]:
    items = []
    for workload, rows in _by(device.of("train", "infer"), _workload).items():
        items.append(Cell(_capital(f"{_named(workload)}: {_verdict(device, rows)}.")))
    wrong = [(row, reason) for row in device.rows if (reason := device.wrong(row))]
    for row, reason in wrong[:8]:
        what = f"{row['section']}, {_case_of(row)}, {row['dtype']}, {label(row)}"
        items.append(Cell(f"wrong: {what}: {reason}", "wrong"))
    if len(wrong) > 8:
        items.append(Cell(f"wrong: {len(wrong) - 8} more", "wrong"))
    failed = [row for row in device.rows if row.get("error")]
    if failed:
        who = "; ".join(dict.fromkeys(label(row) for row in failed))
        items.append(Cell(f"{len(failed)} of {len(device.rows)} rows failed: {who}."))
    return [Heading(3, "In short"), Bullets(items)] if items else []


def _verdict(device: _Device, rows: Sequence[Row]) -> str:
    """The fastest of ours against the anchor and the fastest of the others, in words."""
    ours = [row for row in rows if _is_ours(row)]
    best = device.fastest(ours)
    if best is None and not ours:
        return "fusedres was not measured"
    if best is None:
        ran = any(not row.get("error") and not device.wrong(row) for row in ours)
        return f"fusedres was {ALONE}" if ran else "no row of fusedres ran and was right"
    speed = device.speed(best)
    text = f"{label(best)} is {speed} as fast as {_base_name(best)}"
    rival = device.fastest(row for row in rows if not _is_ours(row))
    if speed is None or rival is None:
        return text
    if device.anchors(rival):
        others = any(not _is_ours(row) and not device.anchors(row) for row in rows)
        return text + (", the fastest of the others" if others else "")
    rival_speed = device.speed(rival)
    assert rival_speed is not None
    both = Speed(speed.value / rival_speed.value, None, None, speed.paired and rival_speed.paired)
    return f"{text}, and {both} as fast as {label(rival)}, the fastest of the others"


def _by_provider(device: _Device) -> list[Block]:
    blocks: list[Block] = []
    for workload, rows in _by(device.of("train", "infer"), _workload).items():
        title = _capital(_named(workload))
        blocks += [Heading(4, title), _speeds(device, {"": rows}, title)]
        blocks.append(_table(device, _ordered(device, rows), title, _NETWORK))
    keyed = _by(device.of("blocks"), lambda r: ("blocks", r.get("batch"), r["dtype"], ""))
    for workload, rows in keyed.items():
        title = _capital(_named(workload))
        cases = _by(rows, _case_of)
        blocks += [Heading(4, title), _speeds(device, cases, title)]
        ordered = [row for of_case in cases.values() for row in _ordered(device, of_case)]
        blocks.append(_table(device, ordered, title, _OPS + _NETWORK))
    return [Heading(3, "Speed by provider"), *blocks] if blocks else []


def _speeds(device: _Device, groups: Mapping[str, Sequence[Row]], title: str) -> Figure:
    def bar(row: Row) -> figures.Bar:
        speed = device.speed(row)
        text = str(speed or ("failed" if row.get("error") else ALONE))
        value = speed.value if speed else None
        if speed and device.wrong(row):
            text += ", wrong"
        low, high = (speed.low, speed.high) if speed else (None, None)
        return figures.Bar(label(row), value, text, _kind(device, row), low, high)

    drawn = [(name, [bar(r) for r in _ordered(device, rows)]) for name, rows in groups.items()]
    against = _against(row for rows in groups.values() for row in rows)
    axis = f"speed relative to {against} (higher is better)"
    draw = partial(figures.bars, drawn, axis, 1.0)
    caption = f"{title}: speed relative to {against}, the dashed line. Whiskers: p20 to p80."
    return _figure(caption, draw)


def _memory(device: _Device) -> list[Block]:
    rows = [row for row in device.of("train", "infer") if _positive(row, "peak_gib")]
    if not rows:
        return []
    drawn = []
    for workload, of_it in _by(rows, _workload).items():
        base = next((row["peak_gib"] for row in of_it if device.anchors(row)), None)
        bars = [
            figures.Bar(
                label(row),
                row["peak_gib"] / base,
                f"{_figures(row['peak_gib'])} GiB",
                _kind(device, row),
            )
            for row in sorted(of_it, key=lambda row: float(row["peak_gib"]))
            if base
        ]
        if bars:
            drawn.append((_capital(_named(workload)), bars))
    if not drawn:
        return []
    against = _against(rows)
    axis = f"peak memory relative to {against} (lower is better)"
    draw = partial(figures.bars, drawn, axis, 1.0)
    caption = "Most memory held at once, parameters and optimizer included."
    return [Heading(3, "Memory"), _figure(caption, draw)]


# --- layers and light passes ---


def _layers(device: _Device) -> list[Block]:
    blocks: list[Block] = []
    kinds = _by(device.of("conv_bn"), lambda row: (row.get("batch"), row["dtype"]))
    for (batch, dtype), rows in kinds.items():
        title = _named(("conv_bn", batch, dtype, "")).replace("conv_bn", "Convolution + BatchNorm")
        blocks.append(Heading(4, title))
        blocks += _roofline(device, rows, dtype, title)
        notes = _common_notes(rows)
        against = _against(rows)
        text = (
            f"Speeds are relative to {against}, each layer's fastest of those with an error bold."
        )
        if notes:
            listed = "; ".join(f"{name}: {note}" for name, note in notes.items())
            text += f" What runs: {listed}."
        blocks.append(Paragraph(text))
        by_case = _by(rows, lambda row: str(row.get("case") or ""))
        for case in sorted(by_case, key=lambda c: [*DIRECTIONS, c].index(c)):
            name = _capital(DIRECTIONS.get(case, case))
            blocks += [Heading(5, name), _layer_table(device, by_case[case], name, notes)]
    return [Heading(3, PARTS["conv_bn"]), *blocks] if blocks else []


def _roofline(device: _Device, rows: Sequence[Row], dtype: str, title: str) -> list[Block]:
    peak, bandwidth = device.ceiling("matmul", "tflops", dtype), device.ceiling("copy", "gb_s")
    if not device.gpu and not peak:
        return []  # then there is nothing to count a CPU's speed in
    unit = 1.0 if device.gpu else peak or 1.0
    panels: dict[str, list[figures.Point]] = {}
    for row in sorted(rows, key=lambda row: not _is_ours(row)):
        name = _capital(DIRECTIONS.get(str(row.get("case")), str(row.get("case") or "layers")))
        flops, moved = _positive(row, "tflops"), _positive(row, "gb_s")
        if flops and moved:
            wrong = bool(device.wrong(row))
            point = figures.Point(1e3 * flops / moved, flops / unit, label(row), wrong)
            panels.setdefault(name, []).append(point)
    if not panels:
        return []
    ridge = 1e3 * peak / bandwidth if peak and bandwidth else None
    what = "TFLOP/s" if device.gpu else "share of the matrix product's speed"
    draw = partial(figures.roofline, panels, ridge, peak and peak / unit, what)
    caption = (
        f"{title}: each marker is one layer. On the slope memory is the limit, on the level "
        "arithmetic is; the line is what was measured of a large copy and a large matrix product."
    )
    return [_figure(caption, draw)]


def _layer_table(
    device: _Device, rows: Sequence[Row], name: str, notes: Mapping[str, str]
) -> Table:
    """A row a layer, and a group of columns a provider; at last all layers of the network."""
    fields = ["ms", "speed", "gb_s", "of_roofline", "max_error"]
    fields = [f for f in fields if device.gpu or f not in ("ms", "gb_s")]
    names = _providers(rows)
    columns = [Column("layer", number=False), Column("count")]
    columns += [Column(_COLUMNS[f].short, who) for who in names for f in fields]
    columns.append(Column("note", number=False, long=True))
    lines = []
    layers = _by(rows, _case_of_layer)
    for layer, of_it in layers.items():
        cells = [Cell(layer), Cell(_values(of_it, "count"))]
        by_name = {label(row): row for row in of_it}
        best = device.fastest(
            r for r in of_it if r.get("max_error") is not None or device.anchors(r)
        )
        remarks = []
        for who in names:
            row = by_name.get(who)
            cells += [_layer_cell(device, row, f, row is best) for f in fields]
            if row and (remark := _remark(device, row, notes.get(who))).text:
                remarks.append(f"{who}: {remark.text}")
        wrong = any(device.wrong(row) for row in of_it)
        lines.append([*cells, Cell("; ".join(remarks), "wrong" * wrong)])
    if len(layers) > 1 and all(_positive(row, "count") for row in rows):
        total = {who: _total(device, layers, who) for who in names}
        count = sum(of_it[0]["count"] for of_it in layers.values())
        cells = [Cell("all layers, by count"), Cell(str(count))]
        base = next((total[who] for who in names if who == _base_name(rows[0])), None)
        for who in names:
            ms = total[who]
            values = {"ms": _figures(ms) if ms else ""}
            values["speed"] = str(Speed(base / ms, None, None, True)) if base and ms else ""
            cells += [Cell(values.get(f, "")) for f in fields]
        lines.append([*cells, Cell("")])
    return Table(f"{name}, by layer", columns, lines).pruned()


def _layer_cell(device: _Device, row: Row | None, field: str, best: bool) -> Cell:
    if row is None:
        return Cell("")
    if row.get("error"):
        return Cell("failed" if field == "speed" else "")
    text = _COLUMNS[field].text(device, row)
    if device.wrong(row) and field == "max_error":
        return Cell(f"wrong: error {text}", "wrong")
    return Cell(text, "best" if best and field == "speed" else "")


def _total(device: _Device, layers: Mapping[str, Sequence[Row]], who: str) -> float | None:
    """Milliseconds of all layers together; None where one is missing or wrong."""
    total = 0.0
    for rows in layers.values():
        row = next((row for row in rows if label(row) == who), {})
        ms = _positive(row, "ms")
        if not ms or device.wrong(row):
            return None
        total += ms * float(row["count"])
    return total


def _common_notes(rows: Sequence[Row]) -> dict[str, str]:
    """By provider, the note that all its rows carry."""
    notes = {
        who: {str(row.get("note") or "") for row in of_it}
        for who, of_it in _by(rows, label).items()
    }
    return {who: found.pop() for who, found in notes.items() if len(found) == 1 and found != {""}}


def _light(device: _Device) -> list[Block]:
    blocks: list[Block] = []
    for dtype, rows in _by(device.of("light"), lambda row: str(row["dtype"])).items():
        blocks.append(Heading(4, dtype))
        for case, of_case in _by(rows, lambda row: str(row.get("case") or "")).items():
            sizes = _by(of_case, group).values()
            ordered = [row for of_size in sizes for row in _ordered(device, of_size)]
            blocks.append(Heading(5, case))
            blocks.append(_table(device, ordered, f"{case}, {dtype}", ("shape", *_LIGHT)))
    return [Heading(3, PARTS["light"]), *blocks] if blocks else []


# --- where the time goes, and the bytes ---


def _profile(device: _Device) -> list[Block]:
    blocks: list[Block] = []
    steps = _by(device.of("profile"), lambda row: (_workload(row), str(row.get("time") or "")))
    newest: dict[tuple[Workload, str], list[Row]] = {}
    for (workload, _), rows in sorted(steps.items(), key=lambda step: step[0][1]):
        newest[workload, _values(rows, "backend")] = rows
    for (workload, backends), rows in newest.items():
        title = _capital(", ".join(p for p in (_named(workload), backends) if p))
        rows = sorted(rows, key=lambda row: -(_positive(row, "share") or 0))
        layers: dict[str, dict[str, float]] = {}
        for row in rows:
            of_layer = layers.setdefault(str(row.get("case") or "other"), {})
            share = 100 * (_positive(row, "share") or 0)
            of_layer[row["name"]] = of_layer.get(row["name"], 0) + share
        ranked = sorted(layers.items(), key=lambda item: -sum(item[1].values()))
        rest = sum(sum(of_layer.values()) for _, of_layer in ranked[LARGEST:])
        blocks += [Heading(4, title)]
        if any(_positive(row, "share") for row in rows):
            draw = partial(figures.stacked, ranked[:LARGEST], "% of the step")
            caption = f"{title}: the share of each layer, the largest first."
            if rest:
                caption += f" The {len(ranked) - LARGEST} that are not drawn take {rest:.0f}%."
            blocks.append(_figure(caption, draw))
        blocks.append(_table(device, rows, title, _PROFILE))
    return [Heading(3, "Where the time goes"), *blocks] if blocks else []


def _bytes(devices: Sequence[_Device]) -> list[Block]:
    """What has to be moved for an image, and how many a second that allows."""
    columns = [Column("way of computing", number=False), Column("of", number=False)]
    columns.append(Column("MB per image"))
    roofs = []
    for device in devices:
        for dtype in ("bfloat16", "float16"):
            peak, copied = device.ceiling("matmul", "tflops", dtype), device.ceiling("copy", "gb_s")
            if device.gpu and peak and copied:
                columns.append(Column(f"img/s at most, {device.name}"))
                roofs.append((copied * 1e9, peak * 1e12))
                break
    lines = []
    for name, flow in roofline.DATAFLOWS.items():
        most = [roofline.images_per_second(name, *roof) for roof in roofs]
        cells = [flow.title, "training" if flow.training else "inference"]
        cells += [f"{roofline.megabytes(name):.1f}", *map(_figures, most)]
        lines.append([Cell(cell) for cell in cells])
    text = (
        "What ResNet-50 reads and writes for one image of 224x224 in a half type, by how its ops "
        "are put together into kernels: counted, not measured."
    )
    if roofs:
        text += " Images a second are what the measured ceilings would allow, kernel by kernel."
    table = Table("Bytes per image", columns, lines)
    return [Heading(2, "Where the bytes are"), Paragraph(text), table]


# --- tables of rows ---


@dataclass(frozen=True)
class _Field:
    """A column of a table of rows."""

    name: str
    text: Callable[[_Device, Row], str]
    number: bool = True
    gpu_only: bool = False
    short: str = ""
    long: bool = False


def _plain(field: str) -> Callable[[_Device, Row], str]:
    return lambda _, row: "" if row.get(field) is None else str(row[field])


def _value(field: str, scale: float = 1.0) -> Callable[[_Device, Row], str]:
    def text(_: _Device, row: Row) -> str:
        value = _positive(row, field)
        return _figures(scale * value) if value else ""

    return text


def _error(field: str) -> Callable[[_Device, Row], str]:
    def text(_: _Device, row: Row) -> str:
        value = row.get(field)
        return f"{value:.1e}" if isinstance(value, int | float) else ""

    return text


def _speed_text(device: _Device, row: Row) -> str:
    if row.get("error"):
        return "failed"
    return str(device.speed(row) or "")


def _spread_text(device: _Device, row: Row) -> str:
    speed = device.speed(row)
    if not speed or not speed.low or not speed.high:
        return ""
    digits = 2 if speed.low >= 0.095 else 4
    return f"{speed.low:.{digits}f}{DASH}{speed.high:.{digits}f}"


def _roofline_text(device: _Device, row: Row) -> str:
    """Where a light pass has no share of the roofline: that of the copy's speed."""
    share = _positive(row, "of_roofline")
    if share:
        return f"{100 * share:.0f}%"
    speed, copied = _positive(row, "gb_s"), device.ceiling("copy", "gb_s")
    if row["section"] != "light" or not speed or not copied:
        return ""
    return f"{100 * speed / copied:.0f}% of copy"


def _plan_text(_: _Device, row: Row) -> str:
    """The plan, where one was asked for; of a profile the one that ran."""
    plan = row.get("plan")
    return "" if plan in (None, "auto") else str(plan)


def _kernels_text(_: _Device, row: Row) -> str:
    kernels = row.get("kernels") or ""
    return ", ".join(map(str, kernels)) if isinstance(kernels, list) else str(kernels)


_COLUMNS = {
    "case": _Field("case", _plain("case"), number=False),
    "shape": _Field("shape", lambda _, row: _shape(row), number=False),
    "provider": _Field("provider", _plain("name"), number=False),
    "plan": _Field("plan", _plan_text, number=False),
    "kind": _Field("kind", _plain("name"), number=False),
    "backend": _Field("backend", _plain("backend"), number=False),
    "dtype": _Field("dtype", _plain("dtype"), number=False),
    "batch": _Field("batch", _plain("batch")),
    "count": _Field("count", _plain("count")),
    "speed": _Field("speed", _speed_text, short="speed"),
    "spread": _Field(f"p20{DASH}p80", _spread_text),
    "ms": _Field("ms", _value("ms"), gpu_only=True, short="ms"),
    "wall_ms": _Field("host ms", _value("wall_ms"), gpu_only=True),
    "img_s": _Field("img/s", _value("img_s"), gpu_only=True),
    "gb_s": _Field("GB/s", _value("gb_s"), gpu_only=True, short="GB/s"),
    "tflops": _Field("TFLOP/s", _value("tflops"), gpu_only=True),
    "share": _Field("% of the step", _value("share", 100.0)),
    "bytes": _Field("MB", _value("bytes", 1e-6)),
    "of_roofline": _Field("% of roofline", _roofline_text, short="% of roof"),
    "max_error": _Field("error", _error("max_error"), short="error"),
    "grad_error": _Field("gradient error", _error("grad_error")),
    "peak_gib": _Field("peak GiB", _value("peak_gib")),
    "how": _Field("timed as", _plain("how"), number=False),
    "kernels": _Field("kernels", _kernels_text, number=False, long=True),
    "note": _Field("note", lambda device, row: _remark(device, row).text, number=False, long=True),
}
_OPS = ("case", "shape")
_TIMES = ("provider", "plan", "speed", "spread", "ms")
_NETWORK = (*_TIMES, "wall_ms", "img_s", "max_error", "grad_error", "peak_gib", "note")
_LIGHT = (*_TIMES, "of_roofline", "gb_s", "max_error", "how", "note")
_PROFILE = ("case", "kind", "backend", "plan", "share", "ms", "bytes", "of_roofline", "kernels")
_SPEEDS = ("dtype", "batch", "count", "img_s", "gb_s", "tflops", "of_roofline")
_PLAIN = (*_OPS, *_TIMES, *_SPEEDS, "max_error", "grad_error", "peak_gib", "note")


def _table(device: _Device, rows: Sequence[Row], name: str, fields: Sequence[str]) -> Table:
    """One line a row, the fields as columns; columns that nothing fills are left out."""
    shown = [_COLUMNS[f] for f in fields if device.gpu or not _COLUMNS[f].gpu_only]
    against = _against(rows)
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


def _remark(device: _Device, row: Row, known: str | None = None) -> Cell:
    """What is wrong with a row, why it failed, and its note, unless that is known already."""
    wrong, failed, note = device.wrong(row), row.get("error"), str(row.get("note") or "")
    parts = [f"wrong: {wrong}" if wrong else "", f"failed: {failed}" if failed else ""]
    parts.append("" if note == known else note)
    return Cell("; ".join(part for part in parts if part), "wrong" * bool(wrong))


# --- single rows ---


def _newest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that measured the same thing the newest, where the first of them stood."""
    found: dict[object, Row] = {}
    for row in rows:
        step = row.get("time") if row["section"] == "profile" else None  # one step stays together
        name = (row["device"], key(row), step)
        if name not in found or str(found[name].get("time") or "") <= str(row.get("time") or ""):
            found[name] = row
    return list(found.values())


def _anchor(row: Row, rows: Iterable[Row]) -> Row | None:
    """The row that it is held against."""
    name, device, of = _base_name(row), row.get("device"), group(row)
    for other in rows:
        if other["name"] == name and other.get("device") == device and group(other) == of:
            return other
    return None


def _base_name(row: Row) -> str:
    return str(row.get("against") or "eager")


def _against(rows: Iterable[Row]) -> str:
    """What they are held against, in words."""
    return _join(dict.fromkeys(map(_base_name, rows)))


def _is_ours(row: Row) -> bool:
    return row["name"].startswith("fusedres")


def _kind(device: _Device, row: Row) -> str:
    if device.wrong(row):
        return "wrong"
    return "fusedres" if _is_ours(row) else "anchor" if device.anchors(row) else "other"


def _ordered(device: _Device, rows: Sequence[Row]) -> list[Row]:
    """The fastest first, those that failed last."""
    speeds = {id(row): device.speed(row) for row in rows}
    return sorted(rows, key=lambda row: -speed.value if (speed := speeds[id(row)]) else math.inf)


def _providers(rows: Iterable[Row]) -> list[str]:
    """Labels, ours first."""
    names = {label(row): not _is_ours(row) for row in rows}
    return sorted(names, key=lambda name: names[name])


def _workload(row: Row) -> Workload:
    shape = row.get("shape") or []
    size = f"{shape[-2]}x{shape[-1]}" if len(shape) == 4 else ""
    case = str(row.get("case") or "")
    other = case if case != "resnet50" and row["section"] != "profile" else ""
    return row["section"], row.get("batch"), row["dtype"], ", ".join(p for p in (size, other) if p)


def _named(workload: Workload) -> str:
    section, batch, dtype, particulars = workload
    parts = (WORK.get(section, section), f"batch {batch}" if batch else "", dtype, particulars)
    return ", ".join(part for part in parts if part)


def _shape(row: Row) -> str:
    """ "56x56, 64 -> 256, 1x1/1" for a convolution."""
    shape = row.get("shape") or []
    if row["section"] in ("conv_bn", "convs") and len(shape) == 6:
        _, size, channels, out, kernel, stride = shape
        return f"{size}x{size}, {channels} -> {out}, {kernel}x{kernel}/{stride}"
    return "x".join(map(str, shape)) if isinstance(shape, list) else str(shape)


def _case_of(row: Row) -> str:
    return ", ".join(part for part in (str(row.get("case") or ""), _shape(row)) if part)


def _case_of_layer(row: Row) -> str:
    return _shape(row) or str(row.get("case") or "layer")


def _positive(row: Row, field: str) -> float | None:
    """A figure that can be divided by; None for what is missing."""
    value = row.get(field)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value) if value > 0 else None


# --- text and figures ---


def _figure(caption: str, draw: Callable[[], Any]) -> Figure:
    return Figure(caption, lambda number: figures.svg(number, draw))


def _figures(value: float) -> str:
    """Three figures, but all of those before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _title(device: str) -> str:
    return "CPU" if device == "cpu" else device


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _values(rows: Iterable[Row], field: str) -> str:
    return _join(dict.fromkeys(str(r[field]) for r in rows if r.get(field) is not None))


def _join(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _more(count: int) -> str:
    return f"; and {count} more" if count > 0 else ""


def _by(rows: Iterable[Row], of: Callable[[Row], K]) -> dict[K, list[Row]]:
    """Rows by what they share, in the order in which it first comes up."""
    found: dict[K, list[Row]] = {}
    for row in rows:
        found.setdefault(of(row), []).append(row)
    return found
