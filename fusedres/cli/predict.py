"""fusedres predict: what pictures of one's own are taken for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fusedres.cli._command import Command
from fusedres.cli._options import add_checkpoint, add_device, at_least, device
from fusedres.training import Classifier, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="a picture file")
    add_checkpoint(parser)
    parser.add_argument(
        "--top", type=at_least(1), default=3, help="classes to name (default %(default)s)"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Print the most probable classes of each picture; 1 if one could not be read."""
    classifier = Classifier(args.checkpoint, device(args.device))
    exit_code = 0
    for path in args.images:
        try:
            ranking = classifier.predict(path).ranking[: args.top]
        except DataError as error:
            print(f"fusedres: {error}", file=sys.stderr)
            exit_code = 1
            continue
        print(f"{path}: " + ", ".join(f"{name} {share:.1%}" for name, share in ranking), flush=True)
    return exit_code


COMMAND = Command("predict", "classify pictures of your own", add_arguments, run)
