"""fusedres summary: a network layer by layer, as Keras prints it, and as a picture."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import torch

from fusedres import models
from fusedres.cli._command import Command, UserError
from fusedres.cli._options import MODEL, VARIANT, add_network, at_least
from fusedres.training import Network
from fusedres.training.files import write_atomically

FORMATS = (".svg", ".png", ".pdf", ".dot")
OWN = {  # by variant: classes and input of the model it is known from; namings
    "torchvision": (1000, (224, 224, 3), "torch"),
    "keras": (1000, (224, 224, 3), "keras"),
    "coursera": (6, (64, 64, 3), "coursera"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_network(parser, model=MODEL, variant=VARIANT)
    parser.add_argument(
        "--input",
        type=_size,
        metavar="H,W,C",
        help="height, width and channels of a picture (default 224,224,3; coursera 64,64,3)",
    )
    parser.add_argument(
        "--classes", type=at_least(1), help="outputs (default 1000; coursera 6, as for SIGNS)"
    )
    parser.add_argument(
        "--names",
        choices=("torch", "keras", "coursera"),
        help="whose names the layers get (default: the variant's)",
    )
    parser.add_argument(
        "--graph",
        type=Path,
        metavar="FILE.svg",
        help=f"draw the network by Graphviz into a file that ends in {', '.join(FORMATS)}",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; draw the graph."""
    if args.graph is not None and args.graph.suffix not in FORMATS:
        raise UserError(f"--graph {args.graph}: must end in {', '.join(FORMATS)}", exit_code=2)
    classes, size, names = OWN[args.variant]
    size = args.input or size
    with torch.device("meta"):
        model = Network(args.model, args.variant, args.classes or classes, size[2]).build()
    if (names == "coursera" and args.model != "resnet50") or args.model in ("resnet18", "resnet34"):
        names = "torch"
    try:
        summary = models.summary(model, size, args.names or names)
    except ValueError as error:
        raise UserError(str(error)) from None
    print(summary)
    if args.graph is not None:
        write_atomically(args.graph, _drawn(summary.to_dot(), args.graph.suffix[1:]))
        print(f"written: {args.graph}")
    return 0


def _drawn(dot: str, format: str) -> bytes:
    if format == "dot":
        return dot.encode()
    program = shutil.which("dot")
    if program is None:
        raise UserError(
            "--graph needs Graphviz's program dot: apt-get install graphviz; a file that ends in "
            ".dot can be written without"
        )
    done = subprocess.run([program, f"-T{format}"], input=dot.encode(), capture_output=True)
    if done.returncode:
        raise UserError(f"--graph: dot failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _size(text: str) -> tuple[int, int, int]:
    try:
        height, width, channels = (int(part) for part in text.split(","))
    except ValueError:
        height = width = channels = 0
    if not 32 <= min(height, width) <= max(height, width) <= 2**15 or not 1 <= channels <= 2**15:
        raise argparse.ArgumentTypeError(
            f"must be H,W,C with H and W from 32 and C from 1 to {2**15}, got {text!r}"
        )
    return height, width, channels


COMMAND = Command("summary", "show a network layer by layer", add_arguments, run)
