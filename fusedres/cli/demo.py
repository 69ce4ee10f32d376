"""fusedres demo: train ResNet-50 on handwritten digits, fused and unfused, and compare the two."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import platform
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedres._tensors import autocast
from fusedres._version import __version__
from fusedres.bench import Comparison, Workload, build, compare, stopwatch_for
from fusedres.cli import _digits
from fusedres.cli._command import Command, UserError
from fusedres.cli._digits import Parity, Training
from fusedres.cli._options import add_device, at_least
from fusedres.cli._options import device as device_of
from fusedres.nn import report, unfuse
from fusedres.training import Recipe
from fusedres.training.figures import new_figure, save_figure
from fusedres.training.files import write_atomically

EPOCHS, BATCH_SIZE, SEED = 5, 64, 0
LEARNING_RATE = 3e-3  # AdamW's, at its peak
ACCURACY_LIMIT = 0.95  # what a run with the defaults has to reach
NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


@dataclass(frozen=True)
class Scale:
    """How much of everything a run does."""

    epochs: int
    train_images: int | None  # None: all
    test_images: int | None
    timing: Workload
    rounds: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "--epochs",
        type=at_least(1),
        help=f"times through the training images (default {EPOCHS}, with --quick 1)",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(2),  # BatchNorm needs more than one value per channel
        default=BATCH_SIZE,
        help="images per training step (default %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, help="of weights and batches (default %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fusedres-demo"),
        help="folder for loss.png and demo.json (default %(default)s)",
    )
    add_device(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one epoch on few images, with little timing: to see that it works",
    )


def run(args: argparse.Namespace) -> int:
    """Train twice, check parity, time both, write the figure and the numbers."""
    _check_extras()
    device = device_of(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    scale = _scale(args, device, dtype)
    recipe = Recipe(
        epochs=scale.epochs,
        batch_size=args.batch_size,
        lr=LEARNING_RATE,
        warmup=0.3,
        augment="shift",
        amp="bf16" if device.type == "cuda" else "off",
        seed=args.seed,
    )
    seconds: dict[str, float] = {}

    with _timed(seconds, "data and model"):
        digits = _digits.load(scale.train_images, scale.test_images)
        fused = _digits.initial_model(args.seed, device, torch.float32, zero_init_residual=True)
        unfused = unfuse(copy.deepcopy(fused))
    backend = _what_runs(fused, device, dtype)
    _say(
        f"FusedResNet50 on handwritten digits: {len(digits.train)} images of "
        f"{digits.train.size[0]}x{digits.train.size[1]} to train on, {len(digits.test)} to test on"
    )
    _say(f"device         {_device_name(device)}, {_name(dtype)}, channels_last")
    _say(f"backend        {backend}")

    trained: dict[str, Training] = {}
    for name, model in (("fused", fused), ("unfused", unfused)):
        with _timed(seconds, f"training, {name}"):
            trained[name] = _digits.train(
                model, digits, recipe, device=device, name=f"training, {name}"
            )
    accuracies = {name: t.test_accuracy for name, t in trained.items()}
    _say(f"test accuracy  fused {accuracies['fused']:.1%}, unfused {accuracies['unfused']:.1%}")

    with _timed(seconds, "parity"):
        parity = _digits.parity(digits, args.seed, device)
    _say(
        f"parity         {'PASS' if parity.passed else 'FAIL'}: float64, {parity.steps} optimizer "
        f"steps, largest relative loss difference {parity.difference:.1e} "
        f"(limit {parity.limit:.0e})"
    )
    with _timed(seconds, "step time"):
        names = {"fused": "fusedres", "unfused": "eager"}
        times = compare(
            {label: build(name, scale.timing).run for label, name in names.items()},
            rounds=scale.rounds,
            stopwatch=stopwatch_for(device),
        )
    for line in _step_time_lines(times, scale):
        _say(line)

    lowest = min(accuracies.values())
    learnt = lowest >= ACCURACY_LIMIT or not _by_default(args, scale)
    if not learnt:
        _say(f"FAIL: test accuracy {lowest:.1%}, expected at least {ACCURACY_LIMIT:.0%}")
    passed = parity.passed and learnt
    with _timed(seconds, "figure"):
        losses = {name: t.losses for name, t in trained.items()}
        save_figure(args.out / "loss.png", loss_figure(losses, _name(dtype), parity))
    results = {
        "passed": passed,
        "config": {
            "epochs": scale.epochs,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "quick": args.quick,
            "device": device.type,
            "dtype": _name(dtype),
            "train_images": len(digits.train),
            "test_images": len(digits.test),
            "learning_rate": recipe.peak_lr,
        },
        "device": _device_name(device),
        "backend": backend,
        "test_accuracy": accuracies,
        "losses": losses,
        "parity": {**asdict(parity), "passed": parity.passed},
        "step_time": _step_time_numbers(times, scale),
        "seconds": {part: round(s, 3) for part, s in seconds.items()},
        "versions": _versions(),
    }
    write_atomically(args.out / "demo.json", (json.dumps(results, indent=2) + "\n").encode())
    _say(f"written        {args.out / 'loss.png'}, {args.out / 'demo.json'}")
    _say(f"time           {sum(seconds.values()):.0f} s")
    return 0 if passed else 1


def loss_figure(losses: dict[str, list[float]], dtype: str, parity: Parity) -> Any:
    """The loss of every training step, one curve per name."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8, 5.2)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0.14, 1, 0.86)))  # above the caption
    axes = figure.subplots()
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(values) + 1), values, style, linewidth=1.6, label=name)
    axes.set(
        yscale="log",
        xlabel="training step",
        ylabel="training loss (cross-entropy)",
        title="ResNet-50 on handwritten digits: same weights, same batches",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    caption = (
        "The curves start together, then part chaotically: each step magnifies the rounding "
        "differences of the steps before it, as between any two correct implementations in "
        f"{dtype}. The check in float64 is exact but for its own rounding: over {parity.steps} "
        f"steps the losses differ by at most {parity.difference:.0e} of their value."
    )
    figure.text(0.02, 0.02, textwrap.fill(caption, 115), fontsize=9, va="bottom")
    return figure


def _check_extras() -> None:
    missing = []
    for module, package in NEEDS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise UserError(
            f'demo needs {", ".join(missing)}; install with: pip install "fusedres[demo]"'
        )


def _scale(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Scale:
    if args.quick:
        return Scale(args.epochs or 1, 128, 60, Workload(2, 32, dtype, device.type), rounds=3)
    if device.type == "cuda":
        timing, rounds = Workload(64, 224, dtype, device.type), 30
    else:
        timing, rounds = Workload(16, 112, dtype, device.type), 7
    return Scale(args.epochs or EPOCHS, None, None, timing, rounds)


def _by_default(args: argparse.Namespace, scale: Scale) -> bool:
    """Whether this run trains as one without options does, and so has to reach its accuracy."""
    chosen = (scale.epochs, args.batch_size, args.seed, args.quick)
    return chosen == (EPOCHS, BATCH_SIZE, SEED, False)


def _what_runs(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """One line of what `report` says of the model."""
    try:
        with autocast(device, dtype):
            rows = report(model)
    except RuntimeError as error:  # a backend asked for by name that cannot serve
        raise UserError(str(error)) from None
    names = ", ".join(sorted({row.backend for row in rows}))
    fused = sum(row.runs == "fused" for row in rows)
    reasons = sorted({row.reason for row in rows if row.reason})
    return f"{names}: {fused} of {len(rows)} layers fused" + "".join(f"; {r}" for r in reasons)


def _step_time_lines(times: Comparison, scale: Scale) -> Iterator[str]:
    """The ratio; on a GPU the milliseconds too, which on a CPU say more about the machine's day."""
    paired = times.paired_ratio("fused", "unfused")
    yield (
        f"step time      fused / unfused {times.ratio('fused', 'unfused'):.2f} "
        f"(p20 {paired.p20:.2f}, p80 {paired.p80:.2f} over {scale.rounds} interleaved rounds; "
        f"eager, {scale.timing})"
    )
    if scale.timing.device == "cuda":
        for name in times.seconds:
            s = times.spread(name)
            yield (
                f"  {name:12} {s.median * 1e3:.2f} ms "
                f"(p20 {s.p20 * 1e3:.2f}, p80 {s.p80 * 1e3:.2f})"
            )


def _step_time_numbers(times: Comparison, scale: Scale) -> dict[str, Any]:
    return {
        "workload": str(scale.timing),
        "rounds": scale.rounds,
        "seconds": {name: asdict(times.spread(name)) for name in times.seconds},
        "fused_over_unfused": {
            "ratio_of_medians": times.ratio("fused", "unfused"),
            "within_rounds": asdict(times.paired_ratio("fused", "unfused")),
        },
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, threads: {torch.get_num_threads()}"


def _say(line: str) -> None:
    print(line, flush=True)  # at once, also into a file: the parts take their time


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _versions() -> dict[str, str]:
    modules = {name: importlib.import_module(name) for name in NEEDS}
    found = {NEEDS[name]: str(module.__version__) for name, module in modules.items()}
    return {
        "fusedres": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **found,
    }


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


COMMAND = Command(
    "demo",
    "train ResNet-50 on handwritten digits, fused and unfused, and compare them",
    add_arguments,
    run,
)
