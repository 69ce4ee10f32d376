"""fusedres evaluate: how a trained network does on labelled pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from fusedres.cli._command import Command, UserError
from fusedres.cli._options import add_checkpoint, add_device, device
from fusedres.training import Classifier, Evaluation, load
from fusedres.training.figures import confusion_matrix, save_figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_checkpoint(parser)
    parser.add_argument("--data", help="as for train (default: what it was trained on)")
    parser.add_argument(
        "--part",
        choices=("test", "train"),
        default="test",
        help="which part of the data (default %(default)s; where they have no test part, the fifth "
        "that train holds out)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE.png", help="draw the confusion matrix into a file"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Print accuracy, loss, and how each class does."""
    if args.figure is not None and args.figure.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--figure {args.figure}: must end in .png, .svg or .pdf", exit_code=2)
    classifier = Classifier(args.checkpoint, device(args.device))
    saved = classifier.checkpoint
    data = load(saved.source if args.data is None else args.data, saved.preprocess.size)
    evaluation = classifier.evaluate(data, args.part)
    count = int(evaluation.confusion.sum())
    if args.json:
        found = {
            "accuracy": evaluation.accuracy,
            "loss": evaluation.loss,
            "images": count,
            "part": args.part,
            "classes": list(classifier.classes),
            "confusion": evaluation.confusion.tolist(),
        }
        print(json.dumps(found, indent=2))
    else:
        print(
            f"{args.part} accuracy {evaluation.accuracy:.1%} on {count} pictures, loss "
            f"{evaluation.loss:.3f}"
        )
        for line in by_class(evaluation, classifier.classes):
            print(line)
    if args.figure is not None:
        title = f"{evaluation.accuracy:.1%} of {count} {args.part} pictures"
        figure = confusion_matrix(evaluation.confusion, classifier.classes, title)
        save_figure(args.figure, figure)
    return 0


def by_class(evaluation: Evaluation, classes: tuple[str, ...]) -> Iterator[str]:
    """A table with a line for each class."""
    width = max(len("class"), *map(len, classes))
    yield f"{'class':{width}}  pictures  right  most often taken for"
    for label, (name, row) in enumerate(zip(classes, evaluation.confusion, strict=True)):
        wrong = row.clone()
        wrong[label] = 0
        other = f"{classes[int(wrong.argmax())]} ({int(wrong.max())})" if wrong.any() else ""
        share = f"{int(row[label]) / int(row.sum()):.0%}" if row.any() else "-"
        yield f"{name:{width}}  {int(row.sum()):8}  {share:>5}  {other}".rstrip()


COMMAND = Command("evaluate", "test a trained network on labelled pictures", add_arguments, run)
