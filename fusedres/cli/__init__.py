"""The program `fusedres`: one module here per subcommand."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from fusedres import backends
from fusedres._version import __version__
from fusedres.cli import bench, demo, evaluate, gradients, info, predict, summary, train, tune
from fusedres.cli._command import UserError
from fusedres.training import TrainingError
from fusedres.training.files import one_line

__all__ = ["main"]

COMMANDS = [module.COMMAND for module in (info, demo, train, evaluate, predict)]
COMMANDS += [summary.COMMAND, gradients.COMMAND, bench.COMMAND, tune.COMMAND]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`", exit_code=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        The exit code: 0, 1 for what failed, 2 for arguments that make no sense. An error that the
        user can put right is one line on stderr.

    Raises:
        SystemExit: with code 0, for --help and --version.
    """
    parser = _Parser(prog="fusedres", description="Fused ops for training ResNet-50.")
    parser.add_argument("--version", action="version", version=f"fusedres {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name, help=command.summary, description=command.summary
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be no text
    try:
        args = parser.parse_args(argv)
        _check_environment()
        exit_code: int = args.run(args)
        return exit_code
    except UserError as error:
        print(f"fusedres: {error}", file=sys.stderr)
        return error.exit_code
    except TrainingError as error:
        print(f"fusedres: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        explained = _explained(error)
        if explained is None:
            raise
        print(f"fusedres: {explained}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fusedres: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"fusedres: {stop if str(stop) else 'interrupted'}", file=sys.stderr)
        return 130


def _explained(error: MemoryError | RuntimeError) -> str | None:
    """In one line what a user can do about an error of torch's; None for one of ours to mend."""
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if full or "can't allocate memory" in str(error):
        return "not enough memory; try a smaller --batch-size or --image-size"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile: torch.compile failed: {one_line(error)}"
    return None


def _check_environment() -> None:
    try:
        backends.requested_backend()
    except ValueError as error:
        raise UserError(str(error), exit_code=2) from None
