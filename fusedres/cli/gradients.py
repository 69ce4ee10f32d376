"""fusedres gradients: the vanishing gradient of a plain deep network, beside its residual twin."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from fusedres.cli._command import Command
from fusedres.cli._options import at_least
from fusedres.training import load
from fusedres.training.figures import save_figure
from fusedres.training.files import make_folder, write_atomically
from fusedres.training.gradients import SHOWN, vanishing_gradients

FIGURE, TABLE = "gradients.png", "gradients.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--data", default="digits", help="as for train (default %(default)s)")
    parser.add_argument(
        "--iterations", type=at_least(1), default=200, help="training steps (default %(default)s)"
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of weights and batches (default %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fusedres-gradients"),
        help=f"folder for {FIGURE} and {TABLE} (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Train both, print the medians, write figure and table."""
    data = load(args.data)
    make_folder(args.out)
    gradients = vanishing_gradients(data, iterations=args.iterations, seed=args.seed)
    print(f"median gradient norm over {args.iterations} iterations, by layer")
    print("network   " + "".join(f"{layer:>10}" for layer in SHOWN))
    for network, norms in gradients.norms.items():
        medians = [statistics.median(row[layer - 1] for row in norms) for layer in SHOWN]
        print(f"{network:10}" + "".join(f"{median:10.1e}" for median in medians))
    save_figure(args.out / FIGURE, gradients.figure())
    write_atomically(args.out / TABLE, gradients.csv())
    print(f"written: {args.out / FIGURE}, {args.out / TABLE}")
    return 0


COMMAND = Command(
    "gradients", "show the vanishing gradient and what shortcuts do to it", add_arguments, run
)
