"""The program `fusedres`: one module here per subcommand."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import torch

from fusedres import backends
from fusedres._version import __version__
from fusedres.cli import (
    bench,
    convert,
    demo,
    evaluate,
    gradients,
    info,
    predict,
    summary,
    train,
    tune,
)
from fusedres.cli._command import UserError, complain
from fusedres.training import TrainingError
from fusedres.training.files import one_line
from fusedres.training.processes import ElsewhereError, StoppedElsewhere

__all__ = ["main"]

COMMANDS = [module.COMMAND for module in (info, demo, train, evaluate, predict, convert)]
COMMANDS += [summary.COMMAND, gradients.COMMAND, bench.COMMAND, tune.COMMAND]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`", exit_code=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        The exit code: 0, 1 for what failed, 2 for arguments that make no sense, 130 for an
        interruption, 141 where nobody reads the output any longer. An error that the user can put
        right is one line on stderr.

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
        with warnings.catch_warnings():
            # what is wrong with a picture is an error in one line, not a warning in two
            warnings.filterwarnings("ignore", module=r"PIL\.")
            exit_code: int = args.run(args)
        if sys.stdout is not None:  # as it is where the shell closed it
            sys.stdout.flush()
        return exit_code
    except UserError as error:
        complain(error)
        return error.exit_code
    except ElsewhereError:
        return 1
    except TrainingError as error:
        complain(error)
        return 1
    except (MemoryError, RuntimeError) as error:
        explained = _explained(error)
        if explained is None:
            raise
        complain(explained)
        return 1
    except BrokenPipeError:  # `head`, say, has read what it wanted
        _discard_output()
        return 141
    except OSError as error:
        complain(error)
        return 1
    except StoppedElsewhere:
        return 130
    except KeyboardInterrupt as stop:
        complain(stop if str(stop) else "interrupted")
        return 130


def _discard_output() -> None:
    """Give what is still buffered somewhere to go when Python flushes it at exit."""
    with suppress(OSError, ValueError):  # no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
