"""fusedres info: what is built, what runs, why not, and the command that would change it."""

from __future__ import annotations

import argparse
import json

from fusedres.cli._command import Command
from fusedres.info import info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Print fusedres.info()."""
    found = info()
    print(json.dumps(found, indent=2) if args.json else found)
    return 0


COMMAND = Command("info", "show what is built, what runs, and why not", add_arguments, run)
