"""fusedres train: a classifier from scratch, on pictures of one's own."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from fusedres.cli._command import Command, UserError
from fusedres.cli._options import MODEL, OUT, VARIANT, add_device, add_network, at_least, device
from fusedres.training import Checkpoint, Recipe, Result, resume, train
from fusedres.training.checkpoint import FILE
from fusedres.training.preprocess import AUGMENTATIONS
from fusedres.training.recipe import AMP, LEARNING_RATE, OPTIMIZERS
from fusedres.training.run import CONFUSION, CURVES, LOG, RESULT

DEFAULT = Recipe()
NETWORK = {"model": MODEL, "variant": VARIANT, "image_size": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options. Those of the run default to None, to tell on --resume what was asked for."""
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATE.items())
    add = parser.add_argument
    add(
        "--data",
        help="a folder with a folder of pictures for each class, or with train/ and test/ of such; "
        "an .npz; an .h5 pair, or the folder of one; or digits, scikit-learn's handwritten ones",
    )
    add_network(parser)
    add(
        "--image-size",
        type=at_least(32),
        metavar="PIXELS",
        help="scale the pictures to so many pixels a side (default: theirs; 224 where they differ)",
    )
    add(
        "--epochs",
        type=at_least(1),
        help=f"times through the training pictures (default {DEFAULT.epochs})",
    )
    add(
        "--batch-size",
        type=at_least(2),  # BatchNorm needs more than one value per channel
        help=f"pictures per step (default {DEFAULT.batch_size})",
    )
    add("--lr", type=float, help=f"learning rate at its peak (default {rates}, for batches of 32)")
    add("--optimizer", choices=OPTIMIZERS, help=f"(default {DEFAULT.optimizer})")
    add("--weight-decay", type=float, help="(default: the optimizer's)")
    add(
        "--warmup",
        type=float,
        metavar="SHARE",
        help=f"of the steps, over which the learning rate rises (default {DEFAULT.warmup})",
    )
    add("--label-smoothing", type=float, help=f"(default {DEFAULT.label_smoothing})")
    add(
        "--augment",
        nargs="?",
        const=DEFAULT.augment,
        choices=AUGMENTATIONS,
        help="turn, scale, shift and light each picture anew, flip it too, only shift it, or not "
        f"(default {DEFAULT.augment})",
    )
    add(
        "--amp",
        choices=("auto", *AMP),
        help="compute in a half type or not (default auto: bf16 where the device has it)",
    )
    add("--compile", action="store_true", default=None, help="compile the model by torch.compile")
    add("--seed", type=at_least(0), help=f"of weights and batches (default {DEFAULT.seed})")
    add_device(parser)
    add(
        "--workers",
        type=at_least(0),
        help="processes that read pictures where those are too many for memory",
    )
    add(
        "--out",
        type=Path,
        default=OUT,
        help="folder for checkpoint, log, figures and result.json (default %(default)s)",
    )
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, with the options it began with",
    )
    begin.add_argument(
        "--overwrite", action="store_true", help="begin anew where --out holds a run already"
    )


def run(args: argparse.Namespace) -> int:
    """Train, or go on training, to the end."""
    where = device(args.device)
    if args.resume:
        _check_unchanged(args)
        result = resume(args.out, data=args.data, device=where, workers=args.workers)
    else:
        if args.data is None:
            raise UserError("--data is needed; see `fusedres train --help`", exit_code=2)
        network = {name: _or(getattr(args, name), value) for name, value in NETWORK.items()}
        result = train(
            args.data,
            args.out,
            Recipe(**{k: v for k, v in _recipe_options(args).items() if v is not None}),
            model=network["model"],
            variant=network["variant"],
            size=network["image_size"],
            device=where,
            workers=args.workers,
            overwrite=args.overwrite,
        )
    _print(result, args.out)
    return 0


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _recipe_options(args: argparse.Namespace) -> dict[str, Any]:
    return {f.name: getattr(args, f.name) for f in fields(Recipe)}


def _check_unchanged(args: argparse.Namespace) -> None:
    """An option given with --resume must say what the run began with."""
    saved = Checkpoint.load(args.out)
    began = {
        **vars(saved.recipe),
        "model": saved.network.model,
        "variant": saved.network.variant,
        "image_size": saved.preprocess.size[0],
    }
    for name, value in began.items():
        asked = getattr(args, name)
        if asked is not None and asked != value:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option} {asked}: the run in {args.out} began with {value}; leave the option out "
                "to go on with it, or train anew in another folder"
            )


def _print(result: Result, out: Path) -> None:
    print(
        f"test accuracy {result.test_accuracy:.1%} on {result.test_images} pictures after "
        f"{result.epochs} epochs, {result.seconds:.0f} s, {result.img_per_s:.0f} img/s"
    )
    print(f"written to {out}: {', '.join((FILE, LOG, CURVES, CONFUSION, RESULT))}")


COMMAND = Command("train", "train a ResNet on pictures of your own", add_arguments, run)
