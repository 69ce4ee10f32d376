"""The figures of a report, as SVG to stand inside a page.

Colours are Okabe and Ito's, which differ for every kind of colour vision; where colours tell things
apart, markers or hatches do too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusedres.training.figures import new_figure, text_of
from fusedres.training.files import require

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY, YELLOW, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#7A7A7A",
    "#F0E442",
    "#222222",
)
KINDS = {  # of bars
    "fusedres": ("fusedres", BLUE, ""),
    "anchor": ("", GREY, ""),  # under its own name
    "other": ("others", ORANGE, ""),
    "wrong": ("wrong results", "#FFFFFF", "////"),
}
STYLES = [(BLUE, "o"), (SKY, "s"), (GREEN, "^"), (YELLOW, "v"), (GREY, "D"), (ORANGE, "P")]
STYLES += [(PURPLE, "X"), (BLACK, "<")]
FILLS = [(BLUE, ""), (ORANGE, "//"), (GREEN, ""), (PURPLE, "\\\\"), (SKY, "xx"), (GREY, "")]
WIDTH = 5.7  # inches, so that the text can still be read on a telephone
_RC = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # to measure by; the page's own font is narrower
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Bar:
    """One bar; without a value only its text, such as "failed". `kind` is a key of KINDS."""

    label: str
    value: float | None
    text: str
    kind: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """FLOP per byte, and FLOP a second in the unit of the plot's y axis."""

    intensity: float
    speed: float
    provider: str
    wrong: bool = False


def svg(number: int, draw: Callable[[], Any]) -> str:
    """The figure that `draw` makes as an <svg> element, its ids unlike those of other numbers."""
    matplotlib = require("matplotlib", "matplotlib", "drawing figures", "bench")
    content = io.StringIO()
    with matplotlib.rc_context(_RC | {"svg.hashsalt": f"figure {number}"}):
        draw().savefig(content, format="svg")
    text = content.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would reach the whole page
    text = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", text)  # the page gives the size
    text = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text)
    prefix = f"figure-{number}-"
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", text)


def bars(
    groups: Sequence[tuple[str, Sequence[Bar]]], xlabel: str, line: float | None = None
) -> Any:
    """Horizontal bars with whiskers, under the names of their groups; `line` is where all start
    to be better.
    """
    from matplotlib.patches import Patch

    titled = any(title for title, _ in groups)
    slots = sum(len(group) + 1.4 * titled for _, group in groups)
    figure = new_figure(WIDTH, 0.95 + 0.27 * slots)
    axes = figure.subplots()
    everything = [bar for _, group in groups for bar in group]
    ends = [bar.high or bar.value for bar in everything if bar.value is not None]
    longest = max((end for end in ends if end), default=1.0)
    right = 1.22 * max(longest, line or 0)
    ticks: list[tuple[float, str]] = []
    y = 0.0
    for title, group in groups:
        if titled:
            axes.text(0, y + 0.2, " " + text_of(title), va="center", fontweight="bold")
            y += 1
        for bar in group:
            ticks.append((y, text_of(bar.label)))
            _bar(axes, bar, y, right)
            y += 1
        y += 0.4 * titled
    axes.set_yticks([t for t, _ in ticks], [t for _, t in ticks])
    axes.set(xlabel=xlabel, xlim=(0, right), ylim=(y - 0.4 * titled - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    if line is not None:
        axes.axvline(line, color=BLACK, linewidth=1, linestyle="--")
    present = {bar.kind: bar.label for bar in everything if bar.value is not None}
    patches = [
        Patch(
            facecolor=color,
            hatch=hatch,
            edgecolor=RED if hatch else color,
            label=text_of(text or present[kind]),
        )
        for kind, (text, color, hatch) in KINDS.items()
        if kind in present
    ]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _bar(axes: Any, bar: Bar, y: float, right: float) -> None:
    pad = 0.012 * right
    if bar.value is None:
        axes.text(pad, y, text_of(bar.text), va="center", color="#A33B00", fontstyle="italic")
        return
    _, color, hatch = KINDS[bar.kind]
    axes.barh(y, bar.value, 0.72, color=color, hatch=hatch, edgecolor=RED if hatch else color)
    end = bar.value
    if bar.low is not None and bar.high is not None:
        end = max(end, bar.high)
        axes.plot([bar.low, bar.high], [y, y], color=BLACK, linewidth=1.2)
        for edge in (bar.low, bar.high):
            axes.plot([edge, edge], [y - 0.16, y + 0.16], color=BLACK, linewidth=1.2)
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # of the dashed line
    axes.text(end + pad, y, text_of(bar.text), va="center", bbox=clear)


def roofline(
    panels: Mapping[str, Sequence[Point]],
    ridge: float | None,
    peak: float | None,
    ylabel: str,
) -> Any:
    """Speed against FLOP per byte, a panel for each direction, under the roof of what was measured.

    Args:
        panels: points by title.
        ridge: FLOP per byte from where arithmetic is the limit; None where that is not known.
        peak: the height of the roof right of it.
        ylabel: what speed is counted in.
    """
    from matplotlib.lines import Line2D

    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure(WIDTH, 0.7 + 2.6 * lines)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    points = [point for panel in panels.values() for point in panel]
    names = list(dict.fromkeys(point.provider for point in points))
    styles = {name: STYLES[i % len(STYLES)] for i, name in enumerate(names)}
    xs = [point.intensity for point in points] + ([ridge] if ridge else [])
    low, high = min(xs) / 1.6, max(xs) * 1.6
    for axes, (title, panel) in zip(grid, panels.items(), strict=False):
        axes.set(title=text_of(title), xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        if ridge is not None and peak is not None:
            roof = [low, min(max(ridge, low), high), high]
            heights = [peak * min(1, x / ridge) for x in roof]
            axes.plot(roof, heights, color=BLACK, linewidth=1.4)
        for (name, wrong), group in _alike(panel).items():
            color, marker = styles[name]
            axes.plot(
                [point.intensity for point in group],
                [point.speed for point in group],
                marker,
                color="none" if wrong else color,
                markeredgecolor=RED if wrong else BLACK,
                markeredgewidth=1.3 if wrong else 0.4,
                markersize=5,
                zorder=4 if wrong else 3,
            )
        _round_ticks(axes)
        axes.set_xlim(low, high)
        axes.tick_params(labelbottom=True)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("FLOP per byte", fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    handles = [
        Line2D([], [], linestyle="", marker=styles[n][1], color=styles[n][0], label=text_of(n))
        for n in names
    ]
    if ridge is not None:
        handles.append(Line2D([], [], color=BLACK, label="measured ceilings"))
    if any(point.wrong for point in points):
        hollow = Line2D([], [], linestyle="", marker="o", color="none", label="wrong results")
        hollow.set_markeredgecolor(RED)
        handles.append(hollow)
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _alike(points: Sequence[Point]) -> dict[tuple[str, bool], list[Point]]:
    """Points by what they look like."""
    found: dict[tuple[str, bool], list[Point]] = {}
    for point in points:
        found.setdefault((point.provider, point.wrong), []).append(point)
    return found


def _round_ticks(axes: Any) -> None:
    """In plain figures: 1, 10, 100 across, where many do not fit; 1, 2, 5, 10 up."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, subs in ((axes.xaxis, (1,)), (axes.yaxis, (1, 2, 5))):
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def stacked(rows: Sequence[tuple[str, Mapping[str, float]]], xlabel: str) -> Any:
    """One horizontal bar a row, made of parts by kind."""
    kinds = sorted({kind for _, parts in rows for kind in parts}, key=lambda k: (k != "fwd", k))
    figure = new_figure(WIDTH, 1.1 + 0.25 * len(rows))
    axes = figure.subplots()
    starts = [0.0] * len(rows)
    for i, kind in enumerate(kinds):
        widths = [parts.get(kind, 0.0) for _, parts in rows]
        color, hatch = FILLS[i % len(FILLS)]
        axes.barh(
            range(len(rows)),
            widths,
            0.75,
            left=starts,
            color=color,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.5,
            label=text_of(kind),
        )
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [text_of(label) for label, _ in rows])
    axes.set(xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    return figure
