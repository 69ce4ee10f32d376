"""fusedres train: a classifier from scratch, on pictures of one's own, in one process or in all
that torchrun starts.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from fusedres.cli._command import Command, UserError
from fusedres.cli._options import MODEL, OUT, VARIANT, add_device, add_network, at_least, device
from fusedres.training import Checkpoint, Recipe, Result, TrainingError, resume, train
from fusedres.training.checkpoint import FILE
from fusedres.training.loader import LOADERS
from fusedres.training.preprocess import AUGMENTATIONS
from fusedres.training.processes import Processes, launched, noted
from fusedres.training.recipe import AMP, DTYPES, LEARNING_RATE, OPTIMIZERS, SCHEDULES
from fusedres.training.run import CONFUSION, CURVES, LOG, RESULT, begun
from fusedres.training.synthetic import CLASSES, SIZE, STEPS, Speed, synthetic

DEFAULT = Recipe()
NETWORK = {"model": MODEL, "variant": VARIANT, "image_size": None, "crop": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options. Those of the run default to None, to tell on --resume what was asked for."""
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATE.items())
    add = parser.add_argument
    add(
        "--data",
        help="a folder with a folder of pictures for each class, or with train/ and test/ of such; "
        "an .npz; an .h5 pair, or the folder of one; or digits, scikit-learn's handwritten ones",
    )
    add(
        "--synthetic",
        action="store_true",
        help="instead of --data: time the step alone, on pictures that are on the device already "
        "(--augment none unless given); nothing is written",
    )
    add(
        "--steps",
        type=at_least(1),
        default=STEPS,
        help="so many, with --synthetic (default %(default)s)",
    )
    add_network(parser)
    add(
        "--image-size",
        type=at_least(32),
        metavar="PIXELS",
        help="scale the pictures to so many pixels a side (default: theirs; 224 where they differ)",
    )
    add(
        "--crop",
        type=float,
        metavar="SHARE",
        help="of the sides of pictures in files that is kept around their middle, 0.875 for "
        "ImageNet (default 1)",
    )
    add(
        "--epochs",
        type=at_least(1),
        help=f"times through the training pictures (default {DEFAULT.epochs})",
    )
    add(
        "--batch-size",
        type=at_least(2),  # BatchNorm needs more than one value per channel
        help=f"pictures per step, in each process (default {DEFAULT.batch_size})",
    )
    add("--lr", type=float, help=f"learning rate at its peak (default {rates}, for batches of 32)")
    add("--optimizer", choices=OPTIMIZERS, help=f"(default {DEFAULT.optimizer})")
    add(
        "--nesterov",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="of sgd (default: with it)",
    )
    add("--schedule", choices=SCHEDULES, help=f"of the rate (default {DEFAULT.schedule})")
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
        help="turn, scale, shift and light each picture anew, flip it too, only shift it, take a "
        f"random part and flip it (ImageNet), or leave it (default {DEFAULT.augment})",
    )
    add(
        "--amp",
        choices=("auto", *AMP),
        help="compute in a half type or not (default auto: bf16 where the device has it)",
    )
    add("--dtype", choices=tuple(DTYPES), help="fp64 to compare runs (default fp32)")
    add(
        "--sync-bn",
        action="store_true",
        default=None,
        help="BatchNorm's statistics over the batches of all processes",
    )
    add("--compile", action="store_true", default=None, help="compile the model by torch.compile")
    add("--seed", type=at_least(0), help=f"of weights and batches (default {DEFAULT.seed})")
    add_device(parser)
    add(
        "--workers",
        type=at_least(0),
        help="processes that read pictures where those are too many for memory, for each that "
        "trains (default: the CPUs there are for it; on a CPU up to 4)",
    )
    add(
        "--loader",
        choices=LOADERS,
        default=LOADERS[0],
        help="what reads them: worker processes, or NVIDIA DALI (default %(default)s)",
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
    if args.synthetic and (args.data is not None or args.resume):
        other = "--resume" if args.resume else "--data"
        raise UserError(f"--synthetic and {other} exclude each other", exit_code=2)
    if args.data is None and not (args.synthetic or args.resume):
        raise UserError("--data is needed; see `fusedres train --help`", exit_code=2)
    with (
        launched(device(args.device).type) as where,
        Processes.current().noticing_loss(lambda: "nothing has been done yet"),
    ):
        processes = Processes.current()
        if args.synthetic:
            augment = {"augment": _or(args.augment, "none")}
            speed = synthetic(
                replace(_recipe(args), **augment),
                model=_or(args.model, MODEL),
                variant=_or(args.variant, VARIANT),
                size=_or(args.image_size, SIZE),
                steps=args.steps,
                device=where,
            )
            if processes.main:
                _print_speed(speed)
            return 0
        goes_on = args.resume or _restarted(args)
        result = _resumed(args, where, processes) if goes_on else _begun(args, where)
        if processes.main:
            _print(result, args.out)
    return 0


def _restarted(args: argparse.Namespace) -> bool:
    """Whether torchrun --max-restarts starts the command once more, for a run that it began."""
    return Processes.current().main_does(lambda: noted(begun(args.out)))


def _begun(args: argparse.Namespace, where: torch.device) -> Result:
    network = {name: _or(getattr(args, name), value) for name, value in NETWORK.items()}
    return train(
        args.data,
        args.out,
        _recipe(args),
        model=network["model"],
        variant=network["variant"],
        size=network["image_size"],
        crop=network["crop"],
        device=where,
        workers=args.workers,
        loader=args.loader,
        overwrite=args.overwrite,
    )


def _resumed(args: argparse.Namespace, where: torch.device, processes: Processes) -> Result:
    processes.main_does(lambda: _check_unchanged(args))
    return resume(args.out, data=args.data, device=where, workers=args.workers, loader=args.loader)


def _recipe(args: argparse.Namespace) -> Recipe:
    return Recipe(**{k: v for k, v in _recipe_options(args).items() if v is not None})


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
        "crop": saved.preprocess.crop,
    }
    for name, value in began.items():
        asked = getattr(args, name)
        if asked is not None and asked != value:
            option = "--" + name.replace("_", "-")
            raise TrainingError(
                f"{option} {asked}: the run in {args.out} began with {value}; leave the option out "
                "to go on with it, or train anew in another folder"
            )


def _print(result: Result, out: Path) -> None:
    print(
        f"test accuracy {result.test_accuracy:.1%} on {result.test_images} pictures after "
        f"{result.epochs} epochs, {result.seconds:.0f} s, {result.img_per_s:.0f} img/s"
    )
    print(f"written to {out}: {', '.join((FILE, LOG, CURVES, CONFUSION, RESULT))}")


def _print_speed(speed: Speed) -> None:
    where = "one process" if speed.processes == 1 else f"{speed.processes} processes"
    memory = f", at most {speed.memory_gib:.1f} GiB" if speed.memory_gib else ""
    print(
        f"{speed.img_per_s:.1f} img/s, {speed.step_ms:.2f} ms a step: {speed.batch_size} pictures "
        f"of {speed.size}x{speed.size}, {CLASSES} classes, {speed.amp}, in {where}{memory}; over "
        f"{speed.steps} steps"
    )


COMMAND = Command("train", "train a ResNet on pictures of your own", add_arguments, run)
