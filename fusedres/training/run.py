"""A training run in a folder: progress bar, log, checkpoint, figures, result; begun or taken up."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from fusedres.models.resnet import VARIANTS
from fusedres.training.checkpoint import FILE, NETWORKS, Checkpoint, Network
from fusedres.training.data import Data, load
from fusedres.training.figures import confusion_matrix, curves, save_figure
from fusedres.training.files import (
    CheckpointError,
    DataError,
    TrainingError,
    make_folder,
    one_line,
    require,
    write_atomically,
)
from fusedres.training.preprocess import Preprocess
from fusedres.training.processes import Agreement, Processes, StoppedElsewhere, interruptions, note
from fusedres.training.recipe import Recipe
from fusedres.training.result import Result
from fusedres.training.trainer import Epoch, Evaluation, Trainer

BAR = "{desc} {percentage:3.0f}%|{bar}| {rate_fmt}, ETA {remaining}{postfix}"
LOG, CURVES, CONFUSION, RESULT = "log.csv", "curves.png", "confusion_matrix.png", "result.json"


def train(
    data: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    model: str = "resnet50",
    variant: str = "torchvision",
    size: int | tuple[int, int] | None = None,
    crop: float = 1.0,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    loader: str = "workers",
    overwrite: bool = False,
    progress: bool = True,
) -> Result:
    """Train a network from scratch, in this process or in all that torch's default group joins.

    Writes into `out`, each file whole or not at all: checkpoint.pt at the beginning, after every
    epoch and on Ctrl-C (which then raises); log.csv after every epoch; at the end result.json,
    curves.png and confusion_matrix.png. `resume` takes up a run that was interrupted or killed. Of
    several processes the first one writes; fusedres.training.processes.launched joins those that
    torchrun starts.

    Args:
        data: as fusedres.training.load takes it; its path is kept in the checkpoint.
        out: a folder, made if it is not there.
        recipe: how to train; by default Recipe().
        model: one of resnet18, resnet34, resnet50, resnet101, resnet152.
        variant: as FusedResNet50 takes it.
        size, crop: what to scale the pictures to, and how much of them to keep, as `load` takes it.
        device: where to run.
        workers: processes that read pictures too many to be held in memory, for each process that
            trains. None: its share of the CPUs, where it trains on a CPU up to four.
        loader: what reads them, "workers" or "dali" (NVIDIA DALI, where it is installed).
        overwrite: begin anew where `out` has a checkpoint already.
        progress: show a bar on stderr and a line for each epoch on stdout.

    Raises:
        TrainingError: and its kinds DataError and CheckpointError, in one line: what is wrong with
            an argument, the data, or a file. LostProcessError: another process has ended.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, once the checkpoint is written.
    """
    recipe = recipe or Recipe()
    out = Path(out)
    for name, value, accepted in (
        ("model", model, tuple(NETWORKS)),
        ("variant", variant, tuple(VARIANTS)),
    ):
        if value not in accepted:
            raise TrainingError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
    processes = Processes.current()

    def begin() -> None:
        if (out / FILE).exists() and not overwrite:
            raise TrainingError(
                f"{out / FILE}: holds a run already; resume it, overwrite it, or choose another "
                "folder"
            )
        make_folder(out)

    with processes.noticing_loss(lambda: "nothing has been trained yet"):
        processes.main_does(begin)
        loaded = processes.all_do(lambda: _load(data, size, crop, recipe))
        network = Network(model, variant, len(loaded.classes), loaded.train.channels)
        torch.manual_seed(recipe.seed)
        preprocess = processes.main_does(lambda: replace(Preprocess.fit(loaded.train), crop=crop))
        trainer = Trainer(
            network.build(),
            loaded,
            recipe,
            device=device,
            workers=workers,
            loader=loader,
            preprocess=preprocess,
            processes=processes,
        )
        run = _Run(trainer, network, out, progress)
        run.save()  # so that a run killed in its first epoch is this one, too
    if processes.main:
        note(begun(out))
        for name in (LOG, CURVES, CONFUSION, RESULT):  # of a run that is overwritten
            (out / name).unlink(missing_ok=True)
    return run.finish()


def begun(out: Path) -> str:
    """What `train` leaves word of, once a run has its checkpoint in the folder."""
    return f"has begun a run in {out.resolve()}"


def _load(source: Any, size: Any, crop: float, recipe: Recipe) -> Data:
    return load(source, size, crop=crop, hold=recipe.augment != "crop+flip")


def resume(
    out: str | Path,
    *,
    data: str | Path | None = None,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    loader: str = "workers",
    progress: bool = True,
) -> Result:
    """Go on with a run that was interrupted or killed, by what its checkpoint says.

    On a CPU it ends in the very bits of a run without interruption, on as many threads. By another
    number of processes than before: they take the batches of then among them.

    Args:
        out: the folder of the run.
        data: where its data are now, if they have moved.
        device, workers, loader, progress: as for `train`.

    Raises:
        TrainingError, KeyboardInterrupt: as `train`; also where the data are not those of the run.
    """
    out = Path(out)
    processes = Processes.current()

    def begin() -> Checkpoint:
        saved = Checkpoint.load(out)
        make_folder(out)
        return saved

    with processes.noticing_loss(lambda: "the run is as it was"):
        saved = processes.main_does(begin)
        loaded = processes.all_do(lambda: _load_again(saved, data, out))
        trainer = Trainer(
            saved.network.build(),
            loaded,
            saved.recipe,
            device=device,
            workers=workers,
            loader=loader,
            preprocess=saved.preprocess,
            processes=processes,
        )
        try:
            trainer.load_state_dict(saved.state)
        except TrainingError:
            raise
        except Exception as error:  # the file says anything it likes
            raise CheckpointError(f"{out / FILE}: damaged: {one_line(error)}") from None
        run = _Run(trainer, saved.network, out, progress, saved.wall)
    return run.finish()


def _load_again(saved: Checkpoint, data: str | Path | None, out: Path) -> Data:
    source = saved.source if data is None else data
    loaded = _load(source, saved.preprocess.size, saved.preprocess.crop, saved.recipe)
    if loaded.fingerprint != saved.fingerprint:
        raise DataError(
            f"{loaded.source}: not the data that the run in {out} began with: other pictures, "
            "labels or classes"
        )
    return loaded


def log_csv(history: list[Epoch]) -> bytes:
    """The log: a line for each epoch, under names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in history)
    return text.getvalue().encode()


class _Run:
    """A trainer on its way, and the files it leaves."""

    def __init__(
        self,
        trainer: Trainer,
        network: Network,
        out: Path,
        progress: bool,
        wall: float = 0.0,
    ) -> None:
        self.tqdm = require("tqdm", "tqdm", "the progress bar").tqdm
        require("matplotlib", "matplotlib", "drawing figures")
        self.trainer, self.network, self.out = trainer, network, out
        self.start = time.perf_counter() - wall
        self.processes = trainer.processes
        self.progress = progress and self.processes.main
        self.bar: Any = None

    def finish(self) -> Result:
        with self.processes.noticing_loss(self._how_to_go_on):
            evaluation = self._train()
            return self._conclude(evaluation)

    def _how_to_go_on(self) -> str:
        done = f"epoch {self.trainer.epoch}" if self.trainer.epoch else "the beginning"
        return f"the checkpoint of {done} is there; to go on: {self._command()}"

    def _command(self) -> str:
        return f"fusedres train --resume --out {shlex.quote(str(self.out))}"

    def _train(self) -> Evaluation:
        trainer, agreement = self.trainer, Agreement(self.processes)
        per_step = trainer.batch_size
        with (
            interruptions(once=self.processes.count == 1) as asked,
            self.tqdm(
                total=trainer.steps * per_step,
                initial=trainer.step * per_step,
                unit="img",
                # into a file or a pipe a line now and then
                mininterval=0.3 if sys.stderr.isatty() else 10.0,
                bar_format=BAR,
                disable=not self.progress,
            ) as self.bar,
        ):
            self._describe()

            def on_step() -> None:
                self._show()
                if trainer.batch == trainer.steps_per_epoch:  # the test may take long
                    trainer.check_finite()
                    self.save()
                if agreement.reached(bool(asked)):
                    self._stop()

            try:
                evaluation = trainer.run(on_step, self._epoch_done)
            except RuntimeError as error:
                if not (asked and "DataLoader worker" in str(error)):
                    raise
                # the signal ended the workers as well, between two steps
                if self.processes.count > 1:  # which the others may not have reached
                    raise KeyboardInterrupt(f"stopped; {self._how_to_go_on()}") from None
                self._stop()
            agreement.close()
        return evaluation

    def _stop(self) -> NoReturn:
        trainer = self.trainer
        trainer.check_finite()  # or keep the checkpoint of before
        self.save()
        if not self.processes.main:
            raise StoppedElsewhere
        raise KeyboardInterrupt(
            f"stopped after step {trainer.step} of {trainer.steps}; to go on: {self._command()}"
        )

    def save(self) -> None:
        """Write the checkpoint; every process calls this."""
        trainer = self.trainer
        state = trainer.state_dict()
        if not self.processes.main:
            return
        Checkpoint(
            network=self.network,
            recipe=trainer.recipe,
            preprocess=trainer.preprocess,
            classes=trainer.data.classes,
            source=trainer.data.source,
            fingerprint=trainer.data.fingerprint,
            wall=time.perf_counter() - self.start,
            state=state,
        ).save(self.out / FILE)

    def _epoch_done(self, evaluation: Evaluation) -> None:
        self.save()
        self._write_log()
        row = self.trainer.history[-1]
        if self.progress:
            self.bar.write(
                f"epoch {row.epoch:3}/{self.trainer.recipe.epochs}  "
                f"train loss {row.train_loss:.3f} accuracy {row.train_accuracy:6.1%}  "
                f"test loss {row.test_loss:.3f} accuracy {row.test_accuracy:6.1%}  "
                f"{row.img_per_s:.0f} img/s",
                file=sys.stdout,
            )
            sys.stdout.flush()
        self._describe()

    def _write_log(self) -> None:
        if not self.processes.main:
            return
        write_atomically(self.out / LOG, log_csv(self.trainer.history))

    def _describe(self) -> None:
        epoch = min(self.trainer.epoch + 1, self.trainer.recipe.epochs)
        self.bar.set_description_str(f"epoch {epoch}/{self.trainer.recipe.epochs}", refresh=False)

    def _show(self) -> None:
        trainer, bar = self.trainer, self.bar
        # reading the loss waits for the device: only when the bar is about to be drawn
        if not bar.disable and (
            trainer.step == trainer.steps or time.time() - bar.last_print_t >= bar.mininterval
        ):
            bar.set_postfix_str(
                f"loss {trainer.loss.item():.3f}, accuracy {trainer.accuracy:.1%}", refresh=False
            )
        bar.update(trainer.batch_size)

    def _conclude(self, evaluation: Evaluation) -> Result:
        trainer, network = self.trainer, self.network
        history, recipe = trainer.history, trainer.recipe
        rates = sorted(row.img_per_s for row in history)
        result = Result(
            test_accuracy=evaluation.accuracy,
            test_loss=evaluation.loss,
            train_accuracy=history[-1].train_accuracy,
            epochs=trainer.epoch,
            steps=trainer.step,
            seconds=time.perf_counter() - self.start,
            img_per_s=rates[len(rates) // 2],
            model=network.model,
            variant=network.variant,
            num_classes=network.num_classes,
            parameters=_parameters(trainer.model),
            data=trainer.data.name,
            train_images=len(trainer.data.train),
            test_images=len(trainer.data.test),
            batch_size=trainer.batch_size,
            optimizer=recipe.optimizer,
            lr=recipe.peak_lr,
            warmup=recipe.warmup,
            label_smoothing=recipe.label_smoothing,
            augment=recipe.augment,
            amp=str(trainer.dtype).removeprefix("torch."),
            compile=recipe.compile,
            seed=recipe.seed,
            device=trainer.device.type,
            processes=self.processes.count,
        )
        if self.processes.main:
            self._write(result, evaluation)
        return result

    def _write(self, result: Result, evaluation: Evaluation) -> None:
        trainer, network, history = self.trainer, self.network, self.trainer.history
        self._write_log()
        content = json.dumps(asdict(result), indent=2, allow_nan=False) + "\n"
        write_atomically(self.out / RESULT, content.encode())
        title = f"{network.model} ({network.variant}) on {trainer.data.name}"
        save_figure(self.out / CURVES, curves(history, title))
        save_figure(
            self.out / CONFUSION,
            confusion_matrix(
                evaluation.confusion,
                trainer.data.classes,
                f"{title}\n{evaluation.accuracy:.1%} of {len(trainer.data.test)} test pictures",
            ),
        )


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
