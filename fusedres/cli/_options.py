"""Options that several subcommands share, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fusedres.cli._command import UserError
from fusedres.models.resnet import VARIANTS
from fusedres.training.checkpoint import NETWORKS

MODEL, VARIANT = "resnet50", "torchvision"
OUT = Path("fusedres-train")  # where train writes unless told otherwise


def add_network(parser: argparse.ArgumentParser, **defaults: str) -> None:
    """--model and --variant; without `defaults` they are None where they are not given."""
    parser.add_argument(
        "--model",
        choices=tuple(NETWORKS),
        default=defaults.get("model"),
        help=f"the network (default {MODEL})",
    )
    parser.add_argument(
        "--variant",
        choices=tuple(VARIANTS),
        default=defaults.get("variant"),
        help=f"whose details it has (default {VARIANT})",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """--checkpoint."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=OUT,
        help="what train wrote: the file or its folder (default %(default)s)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run (default: a GPU if there is one)",
    )


def device(name: str) -> torch.device:
    """The device that a value of --device names."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: torch finds no CUDA device here; try --device cpu")
    if name == "auto":
        name = "cuda" if available else "cpu"
    return torch.device(name)


def fraction(text: str) -> float:
    """For argparse: a number from 0 up to 10, 0.1 for 10%."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 10, got {text!r}")
    return value


def at_least(minimum: int, maximum: int = 2**31 - 1) -> Any:
    """For argparse: an integer from `minimum` up (and not beyond what anything here can use)."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"must be an integer from {minimum} up, got {text!r}")
        return value

    return integer
