"""Rows of results as a page and as Markdown.

Rows of different devices never share a table. Absolute speeds are shown of GPUs only: those of a
CPU say more about the machine, and what else ran on it, than about the code.

From rows to a page: `judging` says how fast and how right each was, `wording` names it, `columns`
makes tables of them, `sections` and `layer_sections` the parts of the document, and `page` what is
written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fusedres.bench.judging import Device, newest, positive
from fusedres.bench.report.columns import PLAIN, table_of
from fusedres.bench.report.layer_sections import by_layer, light_passes, time_spent
from fusedres.bench.report.page import (
    Block,
    Bullets,
    Cell,
    Column,
    Heading,
    Paragraph,
    Table,
    html,
    markdown,
)
from fusedres.bench.report.sections import by_provider, bytes_per_image, in_short, memory, origin
from fusedres.bench.report.wording import (
    ALONE,
    Workload,
    against_of,
    case_of,
    providers,
    three_figures,
    title_of,
    values_of,
    workload_in_words,
    workload_of,
)
from fusedres.bench.rows import SECTIONS, TUNING, Row, label
from fusedres.testing import FACTOR
from fusedres.training.files import write_atomically

__all__ = ["model_table", "page", "readme_tables", "tables", "write"]

TITLE = "fusedres: how fast, how exact"
NOT_MEASURED = "not measured"
README_GPU = [("train", 256), ("train", 400), ("infer", 1), ("infer", 32), ("infer", 256)]
_README_COLUMNS = {
    "eager": "eager",
    "graph": "graph",
    "best torch.compile": "compile.*",
    "fusedres": "fusedres.*",
}

LEAD = (
    "1.2x means: in the time in which the provider it is held against does 1, this one does 1.2; "
    "below 1x it is slower.",
    "How the figures were taken: in every round each provider ran once, in an order that moves on "
    "by one from round to round, so that all met the same moods of the machine. A speed is the "
    "median, over the rounds, of the two times within a round; p20 to p80 is how far it spread. "
    "Speeds marked ~ are quotients of two medians instead, of runs that did not take turns. "
    "% of roofline is the time that the ceilings measured in the same run (a large copy, a large "
    "matrix product and convolution) would allow, over the time taken; inputs that stay in a cache "
    "can take it over 100%.",
    "Errors are distances from the same computed in fp64, relative to it: of single ops the "
    "largest element's, of networks by the Euclidean norm. In half types the gradients of a whole "
    "network are mostly noise, in every implementation alike: compare them with one another. A "
    "result is "
    f"called wrong where its error is more than {FACTOR:g} times that of what it is held against, "
    "plus a floor for the dtype; the floor of gradients through several layers is 0.1, for ReLU's "
    "mask is chance where an activation is within rounding of zero.",
    "Of a CPU only ratios are shown: its absolute speeds say more about the machine than about the "
    "code.",
)


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


# --- the document ---


def _document(rows: Sequence[Row]) -> list[Block]:
    latest = newest(rows)
    if not latest:
        raise ValueError("nothing to report: no rows of results were given")
    names = sorted({row["device"] for row in latest}, key=lambda name: (name == "cpu", name))
    devices = [Device(name, [r for r in latest if r["device"] == name]) for name in names]
    blocks: list[Block] = [*_wrong_ones(devices), *map(Paragraph, LEAD)]
    for device in devices:
        blocks += _of_device(device)
    return blocks + bytes_per_image(devices)


def _wrong_ones(devices: Sequence[Device]) -> list[Block]:
    """All wrong results, the rows of one provider in one line, above everything else."""
    found: dict[str, list[str]] = {}
    for device in devices:
        for row in device.rows:
            if reason := device.wrong(row):
                what = f"{title_of(device.name)}: {row['section']}, {label(row)}, {row['dtype']}"
                found.setdefault(what, []).append(f"{case_of(row)}: {reason}".removeprefix(": "))
    if not found:
        return []
    items = []
    for what, reasons in found.items():
        more = [f"and {len(reasons) - 3} more"] if len(reasons) > 3 else []
        items.append(Cell(f"wrong: {what}: {'; '.join(reasons[:3] + more)}", "wrong"))
    return [Paragraph("Do not trust these results, nor how fast they came:"), Bullets(items)]


def _of_device(device: Device) -> list[Block]:
    blocks: list[Block] = [Heading(2, title_of(device.name)), origin(device)]
    blocks += in_short(device)
    blocks += by_provider(device)
    blocks += memory(device)
    blocks += by_layer(device)
    blocks += light_passes(device)
    blocks += time_spent(device)
    known = {*SECTIONS, *TUNING}
    for section in dict.fromkeys(row["section"] for row in device.rows):
        if section not in known:
            blocks.append(Heading(3, f"Other measurements: {section}"))
            blocks.append(table_of(device, device.of(section), section, PLAIN))
    return blocks


# --- tables of the whole network ---


def readme_tables(rows: Sequence[Row]) -> str:
    """The README's tables of ResNet-50: on a CPU, and on each GPU that was measured."""
    parts = ["### CPU", model_table(rows, "cpu")]
    gpus = sorted({row["device"] for row in rows if row["device"] != "cpu"})
    for gpu in gpus or ["GPU"]:
        wanted = [(section, batch, "bfloat16", "") for section, batch in README_GPU]
        parts += ["### GPU" if gpu == "GPU" else f"### GPU: {gpu}"]
        parts += [model_table(rows, gpu, wanted, _README_COLUMNS)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


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
    here = Device(device, [r for r in newest(rows) if r["device"] == device])
    found = here.of("train", "infer")
    wanted = list(workloads) or list(dict.fromkeys(workload_of(row) for row in found))
    if columns is None:
        columns = {name: re.escape(name) for name in providers(found)}
    used: list[Row] = []
    lines = []
    for workload in wanted:
        known = len(workload) if workload[3] else 3
        of_it = [row for row in found if workload_of(row)[:known] == workload[:known]]
        cells = [Cell(workload_in_words(workload))]
        for pattern in columns.values():
            fitting = [row for row in of_it if re.fullmatch(pattern, label(row))]
            best = here.fastest(fitting)
            used += [best] if best else []
            cells.append(_summary(here, best, fitting, pattern.endswith("*")))
        lines.append(cells)
    heads = [Column("", number=False)] + [Column(name) for name in columns]
    if not found and not workloads:
        return f"Nothing was measured on {title_of(device)}.\n"
    return markdown([Table("ResNet-50", heads, lines), Paragraph(_caption(here, used))])


def _summary(device: Device, best: Row | None, rows: Sequence[Row], named: bool) -> Cell:
    """A cell of the README's table; says which provider it is, if asked."""
    if best is None:
        if any(device.wrong(row) for row in rows):
            return Cell("wrong", "wrong")
        if not all(row.get("error") for row in rows):
            return Cell(ALONE)
        return Cell("failed" if rows else NOT_MEASURED)
    text = str(device.speed(best))
    if device.gpu and (images := positive(best, "img_s")):
        text += f", {three_figures(images)} img/s"
    return Cell(f"{text} ({label(best)})" if named else text)


def _caption(device: Device, rows: Sequence[Row]) -> str:
    """What a table of these rows must say about itself."""
    if not rows:
        return f"No {'GPU' if device.gpu else 'CPU'} figure has been measured yet."
    where = device.name if device.gpu else f"CPU with {values_of(rows, 'threads') or '?'} threads"
    against = against_of(rows)
    text = f"{where}; torch {values_of(rows, 'torch') or '?'}; {values_of(rows, 'dtype')}; "
    text += f"speed relative to {against}, above 1x is faster; "
    speeds = [speed for row in rows if (speed := device.speed(row))]
    text += "measured side by side in one run"
    unpaired = any(not speed.paired for speed in speeds)
    return text + (", but those marked ~ one after the other." if unpaired else ".")
