"""The sections of a report on where and with what was measured, on networks and blocks as a whole,
and on what they have to move.

Each is the blocks of one part of the page; none where nothing was measured of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from fusedres.bench import roofline
from fusedres.bench.judging import Device, Speed, base_name, by, is_ours, positive
from fusedres.bench.report import figures
from fusedres.bench.report.columns import NETWORK, OPS, table_of
from fusedres.bench.report.page import (
    Block,
    Bullets,
    Cell,
    Column,
    Figure,
    Heading,
    Paragraph,
    Table,
)
from fusedres.bench.report.wording import (
    ALONE,
    against_of,
    capital,
    case_of,
    three_figures,
    title_of,
    values_of,
    workload_in_words,
    workload_of,
)
from fusedres.bench.rows import Row, label


def origin(device: Device) -> Table:
    """Where the rows come from."""
    times = sorted(str(row["time"])[:10] for row in device.rows if row.get("time"))
    dates = "" if not times else times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"
    commits = dict.fromkeys(
        str(row["commit"])[:12] + (" and changes" if " " in str(row["commit"]) else "")
        for row in device.rows
        if row.get("commit")
    )
    entries = {"device": title_of(device.name), "threads": values_of(device.rows, "threads")}
    of_gpu = ("driver", "cuda", "cudnn") if device.gpu else ()
    named = {"cuda": "CUDA", "cudnn": "cuDNN", "triton": "Triton", "python": "Python"}
    for field in (*of_gpu, "torch", "triton", "python", "fusedres"):
        entries[named.get(field, field)] = values_of(device.rows, field)
    entries |= {"commit": ", ".join(commits), "measured": dates, "rows": str(len(device.rows))}
    if device.gpu:
        if copied := device.ceiling("gb_s"):
            entries["ceiling: copy"] = f"{three_figures(copied)} GB/s"
        for dtype in dict.fromkeys(row["dtype"] for row in device.of("ceilings")):
            if peak := device.ceiling("tflops", dtype):
                entries[f"ceiling: arithmetic, {dtype}"] = f"{three_figures(peak)} TFLOP/s"
    columns = [Column("", number=False), Column("", number=False, long=True)]
    lines = [[Cell(name), Cell(value)] for name, value in entries.items() if value]
    return Table("where and with what", columns, lines)


def in_short(device: Device) -> list[Block]:
    items = []
    for workload, rows in by(device.of("train", "infer"), workload_of).items():
        items.append(Cell(capital(f"{workload_in_words(workload)}: {_verdict(device, rows)}.")))
    wrong = [(row, reason) for row in device.rows if (reason := device.wrong(row))]
    for row, reason in wrong[:8]:
        what = f"{row['section']}, {case_of(row)}, {row['dtype']}, {label(row)}"
        items.append(Cell(f"wrong: {what}: {reason}", "wrong"))
    if len(wrong) > 8:
        items.append(Cell(f"wrong: {len(wrong) - 8} more", "wrong"))
    failed = [row for row in device.rows if row.get("error")]
    if failed:
        who = "; ".join(dict.fromkeys(label(row) for row in failed))
        items.append(Cell(f"{len(failed)} of {len(device.rows)} rows failed: {who}."))
    return [Heading(3, "In short"), Bullets(items)] if items else []


def _verdict(device: Device, rows: Sequence[Row]) -> str:
    """The fastest of ours against the anchor and the fastest of the others, in words."""
    ours = [row for row in rows if is_ours(row)]
    best = device.fastest(ours)
    if best is None and not ours:
        return "fusedres was not measured"
    if best is None:
        ran = any(not row.get("error") and not device.wrong(row) for row in ours)
        return f"fusedres was {ALONE}" if ran else "no row of fusedres ran and was right"
    speed = device.speed(best)
    text = f"{label(best)} is {speed} as fast as {base_name(best)}"
    rival = device.fastest(row for row in rows if not is_ours(row))
    if speed is None or rival is None:
        return text
    if device.anchors(rival):
        others = any(not is_ours(row) and not device.anchors(row) for row in rows)
        return text + (", the fastest of the others" if others else "")
    rival_speed = device.speed(rival)
    assert rival_speed is not None
    both = Speed(speed.value / rival_speed.value, None, None, speed.paired and rival_speed.paired)
    return f"{text}, and {both} as fast as {label(rival)}, the fastest of the others"


def by_provider(device: Device) -> list[Block]:
    blocks: list[Block] = []
    for workload, rows in by(device.of("train", "infer"), workload_of).items():
        title = capital(workload_in_words(workload))
        blocks += [Heading(4, title), _speeds(device, {"": rows}, title)]
        blocks.append(table_of(device, device.ordered(rows), title, NETWORK))
    keyed = by(device.of("blocks"), lambda r: ("blocks", r.get("batch"), r["dtype"], ""))
    for workload, rows in keyed.items():
        title = capital(workload_in_words(workload))
        cases = by(rows, case_of)
        blocks += [Heading(4, title), _speeds(device, cases, title)]
        ordered = [row for of_case in cases.values() for row in device.ordered(of_case)]
        blocks.append(table_of(device, ordered, title, OPS + NETWORK))
    return [Heading(3, "Speed by provider"), *blocks] if blocks else []


def _speeds(device: Device, groups: Mapping[str, Sequence[Row]], title: str) -> Figure:
    def bar(row: Row) -> figures.Bar:
        speed = device.speed(row)
        text = str(speed or ("failed" if row.get("error") else ALONE))
        value = speed.value if speed else None
        if speed and device.wrong(row):
            text += ", wrong"
        low, high = (speed.low, speed.high) if speed else (None, None)
        return figures.Bar(label(row), value, text, device.kind(row), low, high)

    drawn = [(name, [bar(r) for r in device.ordered(rows)]) for name, rows in groups.items()]
    against = against_of(row for rows in groups.values() for row in rows)
    axis = f"speed relative to {against} (higher is better)"
    draw = partial(figures.bars, drawn, axis, 1.0)
    caption = f"{title}: speed relative to {against}, the dashed line. Whiskers: p20 to p80."
    return Figure(caption, partial(figures.svg, draw=draw))


def memory(device: Device) -> list[Block]:
    rows = [row for row in device.of("train", "infer") if positive(row, "peak_gib")]
    if not rows:
        return []
    drawn = []
    for workload, of_it in by(rows, workload_of).items():
        base = next((row["peak_gib"] for row in of_it if device.anchors(row)), None)
        bars = [
            figures.Bar(
                label(row),
                row["peak_gib"] / base,
                f"{three_figures(row['peak_gib'])} GiB",
                device.kind(row),
            )
            for row in sorted(of_it, key=lambda row: float(row["peak_gib"]))
            if base
        ]
        if bars:
            drawn.append((capital(workload_in_words(workload)), bars))
    if not drawn:
        return []
    against = against_of(rows)
    axis = f"peak memory relative to {against} (lower is better)"
    draw = partial(figures.bars, drawn, axis, 1.0)
    caption = "Most memory held at once, parameters and optimizer included."
    return [Heading(3, "Memory"), Figure(caption, partial(figures.svg, draw=draw))]


def bytes_per_image(devices: Sequence[Device]) -> list[Block]:
    """What has to be moved for an image, and how many a second that allows."""
    columns = [Column("way of computing", number=False), Column("of", number=False)]
    columns.append(Column("MB per image"))
    roofs = []
    for device in devices:
        for dtype in ("bfloat16", "float16"):
            peak, copied = device.ceiling("tflops", dtype), device.ceiling("gb_s")
            if device.gpu and peak and copied:
                columns.append(Column(f"img/s at most, {device.name}"))
                roofs.append((copied * 1e9, peak * 1e12))
                break
    lines = []
    for name, flow in roofline.DATAFLOWS.items():
        most = [roofline.images_per_second(name, *roof) for roof in roofs]
        cells = [flow.title, "training" if flow.training else "inference"]
        cells += [f"{roofline.megabytes(name):.1f}", *map(three_figures, most)]
        lines.append([Cell(cell) for cell in cells])
    text = (
        "What ResNet-50 reads and writes for one image of 224x224 in a half type, by how its ops "
        "are put together into kernels: counted, not measured."
    )
    if roofs:
        text += " Images a second are what the measured ceilings would allow, kernel by kernel."
    table = Table("Bytes per image", columns, lines)
    return [Heading(2, "Where the bytes are"), Paragraph(text), table]
