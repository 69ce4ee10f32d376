"""What a subcommand is, and how it tells its user that something cannot be done."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand, as its module hands it to the table in fusedres.cli.

    Attributes:
        name: what the user types.
        summary: one line for `fusedres --help`.
        add_arguments: puts its options on a parser.
        run: does it and returns the exit code; raises UserError for what the user can put right.
    """

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class UserError(Exception):
    """Something that the user can put right, in one line; it ends the program with `exit_code`."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def printable(text: object) -> str:
    """In one line that leaves a terminal as it is: a file name may hold newlines and worse."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def complain(error: object) -> None:
    """Say what is wrong, in one line on stderr."""
    print(f"fusedres: {printable(error)}", file=sys.stderr)
