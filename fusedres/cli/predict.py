"""fusedres predict: what pictures of one's own are taken for."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from fusedres.cli._command import Command, complain, printable
from fusedres.cli._options import add_checkpoint, add_device, at_least, device
from fusedres.training import Classifier, Failure, Prediction, find_pictures
from fusedres.training.classifier import BATCH_SIZE
from fusedres.training.files import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="a picture file, or a folder with pictures at any depth",
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--top", type=at_least(1), default=3, help="classes to name (default %(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        default=BATCH_SIZE,
        help="pictures that go through the network together (default %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, what is wrong included"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Print the most probable classes of each picture; 1 if anything could not be read."""
    tqdm = require("tqdm", "tqdm", "the progress bar").tqdm
    classifier = Classifier(args.checkpoint, device(args.device))
    paths, wrong = _found(args.paths)
    top = min(args.top, len(classifier.classes))
    output: _Table | _Json = _Json(top) if args.json else _Table(top, paths, classifier.classes)
    results = classifier.predict_many(paths, batch_size=args.batch_size)
    exit_code = 0
    quiet = None if len(paths) > 1 else True  # None: unless stderr is a terminal
    total = len(wrong) + len(paths)
    with tqdm(total=total, unit="img", dynamic_ncols=True, leave=False, disable=quiet) as bar:
        for result in chain(wrong, results):
            with bar.external_write_mode():
                output.add(result)
                if isinstance(result, Failure):
                    complain(result.error)
                    exit_code = 1
            bar.update()
    output.end()
    return exit_code


def _found(paths: Iterable[Path]) -> tuple[list[Path], list[Failure]]:
    """The pictures, in order, and what is wrong with folders."""
    pictures: list[Path] = []
    wrong: list[Failure] = []
    for path in paths:
        if os.path.isdir(path):
            found, failures = find_pictures(path)
            pictures += found
            wrong += failures
        else:
            pictures.append(path)  # whatever it is called
    return pictures, wrong


class _Table:
    """A line for each picture that could be read."""

    def __init__(self, top: int, paths: Sequence[Path], classes: Sequence[str]) -> None:
        self.top = top
        self.picture = max(map(len, ("picture", *map(printable, paths))))
        self.name = max(len(printable(name)) for name in classes)
        self.begun = False

    def add(self, result: Prediction | Failure) -> None:
        if isinstance(result, Failure):
            return
        if not self.begun:
            ranks = (f"{f'class {rank}':{self.name + 7}}" for rank in range(1, self.top + 1))
            self._print("picture", ranks)
            self.begun = True
        ranking = result.ranking[: self.top]
        cells = (f"{printable(name):{self.name}} {share:6.1%}" for name, share in ranking)
        self._print(printable(result.path), cells)

    def _print(self, picture: str, cells: Iterable[str]) -> None:
        print("  ".join((f"{picture:{self.picture}}", *cells)).rstrip(), flush=True)

    def end(self) -> None:
        pass


class _Json:
    """A list with an object for each picture and for each failure."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.held = ""

    def add(self, result: Prediction | Failure) -> None:
        found: dict[str, object] = {"path": str(result.path)}
        if isinstance(result, Failure):
            found["error"] = str(result.error)
        else:
            found["ranking"] = [
                {"class": name, "probability": share} for name, share in result.ranking[: self.top]
            ]
        print(f"{self.held}," if self.held else "[", flush=True)  # whole lines: a bar may follow
        self.held = f"  {json.dumps(found)}"

    def end(self) -> None:
        print(f"{self.held}\n]")


COMMAND = Command("predict", "classify pictures of your own", add_arguments, run)
