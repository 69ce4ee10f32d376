"""The sections of a report on what a network is made of: its layers, its light passes, and the
share of each in a step.

Each is the blocks of one part of the page; none where nothing was measured of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from fusedres.bench.judging import Device, Speed, base_name, by, is_ours, positive
from fusedres.bench.report import figures
from fusedres.bench.report.columns import COLUMNS, LIGHT, PROFILE, remark_on, table_of
from fusedres.bench.report.page import Block, Cell, Column, Figure, Heading, Paragraph, Table
from fusedres.bench.report.wording import (
    Workload,
    against_of,
    capital,
    providers,
    shape_of,
    three_figures,
    values_of,
    workload_in_words,
    workload_of,
)
from fusedres.bench.rows import Row, group, label

LARGEST = 20  # layers of a profile that are drawn
DIRECTIONS = {
    "fwd": "forward",
    "dgrad": "gradient of the input (dgrad)",
    "wgrad": "gradient of the weight (wgrad)",
    "bwd": "backward, both gradients (bwd)",
}


# --- layers ---


def by_layer(device: Device) -> list[Block]:
    blocks: list[Block] = []
    kinds = by(device.of("conv_bn"), lambda row: (row.get("batch"), row["dtype"]))
    for (batch, dtype), rows in kinds.items():
        title = workload_in_words(("conv_bn", batch, dtype, ""))
        blocks.append(Heading(4, title))
        blocks += _roofline(device, rows, dtype, title)
        notes = _common_notes(rows)
        against = against_of(rows)
        text = (
            f"Speeds are relative to {against}, each layer's fastest of those with an error bold."
        )
        if notes:
            listed = "; ".join(f"{name}: {note}" for name, note in notes.items())
            text += f" What runs: {listed}."
        blocks.append(Paragraph(text))
        by_case = by(rows, lambda row: str(row.get("case") or ""))
        for case in sorted(by_case, key=lambda c: [*DIRECTIONS, c].index(c)):
            name = capital(DIRECTIONS.get(case, case))
            blocks += [Heading(5, name), _layer_table(device, by_case[case], name, notes)]
    return [Heading(3, "Layers against the roofline"), *blocks] if blocks else []


def _roofline(device: Device, rows: Sequence[Row], dtype: str, title: str) -> list[Block]:
    peak, bandwidth = device.ceiling("tflops", dtype), device.ceiling("gb_s")
    if not device.gpu and not peak:
        return []  # then there is nothing to count a CPU's speed in
    unit = 1.0 if device.gpu else peak or 1.0
    panels: dict[str, list[figures.Point]] = {}
    for row in sorted(rows, key=lambda row: not is_ours(row)):
        name = capital(DIRECTIONS.get(str(row.get("case")), str(row.get("case") or "layers")))
        flops, moved = positive(row, "tflops"), positive(row, "gb_s")
        if flops and moved:
            wrong = bool(device.wrong(row))
            point = figures.Point(1e3 * flops / moved, flops / unit, label(row), wrong)
            panels.setdefault(name, []).append(point)
    if not panels:
        return []
    ridge = 1e3 * peak / bandwidth if peak and bandwidth else None
    what = "TFLOP/s" if device.gpu else "share of the ceiling's speed"
    draw = partial(figures.roofline, panels, ridge, peak and peak / unit, what)
    caption = (
        f"{title}: each marker is one layer. On the slope memory is the limit, on the level "
        "arithmetic is; the line is what was measured of a large copy and of large products."
    )
    return [Figure(caption, partial(figures.svg, draw=draw))]


def _layer_table(device: Device, rows: Sequence[Row], name: str, notes: Mapping[str, str]) -> Table:
    """A row a layer, and a group of columns a provider; at last all layers of the network."""
    fields = ["ms", "speed", "gb_s", "of_roofline", "max_error"]
    fields = [f for f in fields if device.gpu or f not in ("ms", "gb_s")]
    names = providers(rows)
    columns = [Column("layer", number=False), Column("count")]
    columns += [Column(COLUMNS[f].short, who) for who in names for f in fields]
    columns.append(Column("note", number=False, long=True))
    lines = []
    layers = by(rows, _case_of_layer)
    for layer, of_it in layers.items():
        cells = [Cell(layer), Cell(values_of(of_it, "count"))]
        by_name = {label(row): row for row in of_it}
        best = device.fastest(
            r for r in of_it if r.get("max_error") is not None or device.anchors(r)
        )
        remarks = []
        for who in names:
            row = by_name.get(who)
            cells += [_layer_cell(device, row, f, row is best) for f in fields]
            if row and (remark := remark_on(device, row, notes.get(who))):
                remarks.append(f"{who}: {remark}")
        wrong = any(device.wrong(row) for row in of_it)
        lines.append([*cells, Cell("; ".join(remarks), "wrong" * wrong)])
    if len(layers) > 1 and all(positive(row, "count") for row in rows):
        total = {who: _total(device, layers, who) for who in names}
        count = sum(of_it[0]["count"] for of_it in layers.values())
        cells = [Cell("all layers, by count"), Cell(str(count))]
        base = next((total[who] for who in names if who == base_name(rows[0])), None)
        for who in names:
            ms = total[who]
            values = {"ms": three_figures(ms) if ms else ""}
            values["speed"] = str(Speed(base / ms, None, None, True)) if base and ms else ""
            cells += [Cell(values.get(f, "")) for f in fields]
        lines.append([*cells, Cell("")])
    return Table(f"{name}, by layer", columns, lines).pruned()


def _layer_cell(device: Device, row: Row | None, field: str, best: bool) -> Cell:
    if row is None:
        return Cell("")
    if row.get("error"):
        return Cell("failed" if field == "speed" else "")
    text = COLUMNS[field].text(device, row)
    if device.wrong(row) and field == "max_error":
        return Cell(f"wrong: error {text}", "wrong")
    return Cell(text, "best" if best and field == "speed" else "")


def _total(device: Device, layers: Mapping[str, Sequence[Row]], who: str) -> float | None:
    """Milliseconds of all layers together; None where one is missing or wrong."""
    total = 0.0
    for rows in layers.values():
        row = next((row for row in rows if label(row) == who), {})
        ms = positive(row, "ms")
        if not ms or device.wrong(row):
            return None
        total += ms * float(row["count"])
    return total


def _common_notes(rows: Sequence[Row]) -> dict[str, str]:
    """By provider, the note that all its rows carry."""
    notes = {
        who: {str(row.get("note") or "") for row in of_it} for who, of_it in by(rows, label).items()
    }
    return {who: found.pop() for who, found in notes.items() if len(found) == 1 and found != {""}}


def _case_of_layer(row: Row) -> str:
    return shape_of(row) or str(row.get("case") or "layer")


# --- light passes, and where the time goes ---


def light_passes(device: Device) -> list[Block]:
    blocks: list[Block] = []
    for dtype, rows in by(device.of("light"), lambda row: str(row["dtype"])).items():
        blocks.append(Heading(4, dtype))
        for case, of_case in by(rows, lambda row: str(row.get("case") or "")).items():
            sizes = by(of_case, group).values()
            ordered = [row for of_size in sizes for row in device.ordered(of_size)]
            blocks.append(Heading(5, case))
            blocks.append(table_of(device, ordered, f"{case}, {dtype}", ("shape", *LIGHT)))
    return [Heading(3, "Light passes"), *blocks] if blocks else []


def time_spent(device: Device) -> list[Block]:
    blocks: list[Block] = []
    steps = by(device.of("profile"), lambda row: (workload_of(row), str(row.get("time") or "")))
    newest: dict[tuple[Workload, str], list[Row]] = {}
    for (workload, _), rows in sorted(steps.items(), key=lambda step: step[0][1]):
        newest[workload, values_of(rows, "backend")] = rows
    for (workload, backends), rows in newest.items():
        title = capital(", ".join(p for p in (workload_in_words(workload), backends) if p))
        rows = sorted(rows, key=lambda row: -(positive(row, "share") or 0))
        layers: dict[str, dict[str, float]] = {}
        for row in rows:
            of_layer = layers.setdefault(str(row.get("case") or "other"), {})
            share = 100 * (positive(row, "share") or 0)
            of_layer[row["name"]] = of_layer.get(row["name"], 0) + share
        ranked = sorted(layers.items(), key=lambda item: -sum(item[1].values()))
        rest = sum(sum(of_layer.values()) for _, of_layer in ranked[LARGEST:])
        blocks += [Heading(4, title)]
        if any(positive(row, "share") for row in rows):
            draw = partial(figures.stacked, ranked[:LARGEST], "% of the step")
            caption = f"{title}: the share of each layer, the largest first."
            if rest:
                caption += f" The {len(ranked) - LARGEST} that are not drawn take {rest:.0f}%."
            blocks.append(Figure(caption, partial(figures.svg, draw=draw)))
        blocks.append(table_of(device, rows, title, PROFILE))
    return [Heading(3, "Where the time goes"), *blocks] if blocks else []
