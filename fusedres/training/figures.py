"""What a run shows: loss and accuracy by epoch, and which class was taken for which."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fusedres.training.files import require, write_atomically
from fusedres.training.trainer import Epoch

NUMBERED = 16  # classes, up to which the cells of a confusion matrix carry their counts
NAMED = 40  # classes, up to which its rows and columns carry their names
LONGEST = 24  # characters of a class name


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure that keeps its parts apart; no window, no global state."""
    require("matplotlib", "matplotlib", "drawing figures")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def save_figure(path: Path, figure: Any) -> None:
    """Write a figure in the format of the path's suffix."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:])
    write_atomically(path, content.getvalue())


def text_of(name: str) -> str:
    """Any text as matplotlib shows it literally: no mathematics, no half characters."""
    return name.encode(errors="replace").decode().replace("$", r"\$")


def curves(history: Sequence[Epoch], title: str) -> Any:
    """Loss and accuracy against epoch, training and test."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = new_figure(9, 4)
    figure.suptitle(text_of(title))
    epochs = [row.epoch for row in history]
    panels = (
        ("loss", "cross-entropy", [(e.train_loss, e.test_loss) for e in history]),
        ("accuracy", "accuracy", [(e.train_accuracy, e.test_accuracy) for e in history]),
    )
    marker = "o" if len(epochs) < 2 else None  # a line needs two points
    for axes, (name, label, values) in zip(figure.subplots(1, 2), panels, strict=True):
        for part, style, series in zip(
            ("training (augmented pictures)", "test"),
            ("--", "-"),
            zip(*values, strict=True),
            strict=True,
        ):
            axes.plot(epochs, series, style, marker=marker, linewidth=1.6, label=part)
        axes.set(title=name, xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(min(1, len(epochs) - 1), max(2, len(epochs)))
        axes.grid(alpha=0.3)
        axes.legend()
        if name == "accuracy":
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        else:
            axes.set_yscale("log")  # early losses may be a hundred times the last ones
    return figure


def confusion_matrix(confusion: Tensor, classes: Sequence[str], title: str) -> Any:
    """Counts of true class (row) against predicted class (column)."""
    count = len(classes)
    side = min(4 + 0.35 * count, 14)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(confusion.numpy(), cmap="Blues", vmin=0)
    what = "class" if count <= NAMED else "class (by number)"
    axes.set(title=text_of(title), xlabel=f"predicted {what}", ylabel=f"true {what}")
    if count <= NAMED:
        names = [text_of(_shortened(name)) for name in classes]
        turned = 90 if max(map(len, names)) > 3 else 0
        axes.set_xticks(range(count), names, rotation=turned)
        axes.set_yticks(range(count), names)
    if count <= NUMBERED:
        largest = confusion.max().item()
        size = 10 if largest < 10_000 else 7.5  # five digits have to fit
        for row in range(count):
            for column in range(count):
                cell = int(confusion[row, column])
                color = "white" if cell > largest / 2 else "black"
                axes.text(
                    column, row, str(cell), ha="center", va="center", color=color, fontsize=size
                )
    else:
        figure.colorbar(image, ax=axes, label="pictures", shrink=0.8)
    return figure


def _shortened(name: str) -> str:
    """A long name without its middle, as names that begin alike may end differently."""
    return name if len(name) <= LONGEST else f"{name[:14]}…{name[15 - LONGEST :]}"
