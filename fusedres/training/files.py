"""Files that are whole or not there, and the errors that a user can put right."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType


class TrainingError(Exception):
    """What is wrong with data, a checkpoint, an option or a run, in one line."""


class DataError(TrainingError):
    """Data that cannot be read or learnt from; names the file."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be read, trusted or written; names the file."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return next(iter(str(error).splitlines()), "").rstrip(":") or type(error).__name__


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either the old one or the whole new one, also when the power goes.

    Raises:
        OSError: it could not be written; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.partial")  # one name: a killed run leaves one at most
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, and see that files can be written before hours of work depend on it.

    Raises:
        TrainingError: they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / ".writable", b"")
        (path / ".writable").unlink()
    except OSError as error:
        raise TrainingError(f"{path}: cannot write there: {error.strerror}") from None


def require(module: str, package: str, purpose: str, extra: str = "train") -> ModuleType:
    """Import an optional dependency.

    Raises:
        TrainingError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise TrainingError(
            f'{purpose} needs {package}; install with: pip install "fusedres[{extra}]"'
        ) from None
