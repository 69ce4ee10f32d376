"""fusedres convert: a ResNet that Keras saved, as a file of weights for torch."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fusedres.cli._command import Command, UserError
from fusedres.models.keras import PREPROCESS, Converted, convert
from fusedres.models.keras.naming import NAMINGS
from fusedres.models.variants import VARIANTS
from fusedres.training.files import write_atomically

SUFFIXES = {".pt": "torch", ".pth": "torch", ".safetensors": "safetensors"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "source", type=Path, metavar="IN", help="what Keras saved: .keras, .weights.h5 or .h5"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument(
        "--to",
        choices=sorted(set(SUFFIXES.values())),
        help="its format (default: by OUT's suffix, .pt, .pth or .safetensors)",
    )
    parser.add_argument(
        "--variant",
        choices=tuple(VARIANTS),
        help="whose details the network has (default: those in IN's configuration, else by names)",
    )
    parser.add_argument(
        "--preprocess",
        choices=tuple(PREPROCESS),
        help="what was done to pixels before Keras's network; done by the new one from then on",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    """Write the weights; say what they are and how they are loaded."""
    to = args.to or SUFFIXES.get(args.out.suffix.lower())
    if to is None:
        known = ", ".join(SUFFIXES)
        raise UserError(f"{args.out}: must end in {known}, or give --to", exit_code=2)
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} exists; give --overwrite to replace it")
    if args.out.exists() and args.source.exists() and args.out.samefile(args.source):
        raise UserError(f"{args.out} is the file that is read; give another name")
    if to == "safetensors":
        _safetensors()
    try:
        found = convert(args.source, variant=args.variant, preprocess=args.preprocess)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from None
    write_atomically(args.out, _packed(found.model.state_dict(), to))
    classes = f"{found.model.num_classes} classes" if found.model.num_classes else "no classifier"
    details = f"variant {found.model.variant}, eps {found.model.bn1.eps:g}, {found.source}"
    print(f"read: ResNet-{found.depth} by {NAMINGS[found.naming]}, {classes}")
    print(f"      {found.arrays} arrays of {args.source} ({found.form}); {details}")
    print(f"written: {args.out}; in Python:")
    for line in _loading(found, args.out, to, args.preprocess):
        print(f"    {line}")
    return 0


def _safetensors() -> None:
    try:
        importlib.import_module("safetensors.torch")
    except ImportError:
        raise UserError(
            "a .safetensors file needs the package safetensors: pip install safetensors"
        ) from None


def _packed(state: dict[str, Tensor], to: str) -> bytes:
    if to == "safetensors":
        written: bytes = importlib.import_module("safetensors.torch").save(state)
        return written
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _loading(found: Converted, out: Path, to: str, preprocess: str | None) -> Iterator[str]:
    """The lines that load it."""
    model = found.model
    name = "FusedResNet50" if found.depth == 50 else f"resnet{found.depth}"
    options = {"variant": model.variant, **found.details}
    if model.conv1.in_channels != 3:
        options["in_channels"] = model.conv1.in_channels
    by_suffix = SUFFIXES.get(out.suffix.lower(), "torch") == to  # as weights= goes by it
    file = os.fspath(out)
    whole = by_suffix and model.num_classes > 0
    options |= {"weights": file} if whole else {}
    given = "".join(f", {key}={_literal(value)}" for key, value in options.items())
    yield f"model = fusedres.{name}({model.num_classes or 1}{given})"
    if model.num_classes == 0:
        yield "model.reset_classifier(0)"
    if not whole:
        load = "safetensors.torch.load_file" if to == "safetensors" else "torch.load"
        yield f"model.load_state_dict({load}({_literal(file)}))"
    if preprocess is not None:
        mean = PREPROCESS[preprocess] or (0.0,) * model.conv1.in_channels
        yield f"model.from_pixels = fusedres.nn.FromPixels({mean!r})"


def _literal(value: object) -> str:
    """As the project's own code has it: text in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


COMMAND = Command("convert", "turn a ResNet that Keras saved into weights", add_arguments, run)
