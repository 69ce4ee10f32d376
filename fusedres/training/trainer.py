"""The training loop, and testing.

A run depends on model, data and recipe alone: batches and augmentation are drawn anew at each step
from (seed, epoch, step), so that a run taken up from a Trainer's state ends in the same bits as one
that never stopped, where the device computes deterministically.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from fusedres import backends
from fusedres._tensors import autocast
from fusedres.training.data import ArrayPictures, Data, Pictures
from fusedres.training.files import DataError, TrainingError, one_line
from fusedres.training.preprocess import Preprocess, augmented, unit
from fusedres.training.recipe import Recipe, amp_dtype

WORKERS = 4  # processes that read pictures not held in memory, at most
TEST_BATCH = 120  # pictures at a time, at most; without gradients they take less memory


@dataclass(frozen=True)
class Epoch:
    """One time through the training pictures, and the test after it; a row of the log.

    Attributes:
        epoch, step: how many are done.
        lr: learning rate of the last step.
        train_loss, train_accuracy: means over the steps, of augmented pictures, label smoothing in
            the loss.
        test_loss, test_accuracy: of pictures and labels as they are. Accuracies are 0 to 1.
        seconds: of training, testing left out.
        img_per_s: pictures trained on in each of these.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float
    img_per_s: float


@dataclass(frozen=True)
class Evaluation:
    """How a model does on labelled pictures.

    Attributes:
        loss: mean cross-entropy.
        confusion: [K, K] int64, how many pictures of class i (row) were taken for j (column).
    """

    loss: float
    confusion: Tensor

    @property
    def accuracy(self) -> float:
        """Share of pictures taken for what they are, 0 to 1."""
        return int(self.confusion.trace()) / int(self.confusion.sum())


class Trainer:
    """Trains a model by a recipe.

    Args:
        model: maps fp32 [N, C, H, W], channels_last, to logits [N, classes]; moved to the device,
            with its parameters channels_last.
        data: pictures and labels.
        recipe: how to train.
        device: where.
        workers: processes that read pictures from files; None: up to WORKERS.
        preprocess: how to prepare pictures; None: by the training pictures.

    Attributes:
        history: the epochs so far.
        step: steps taken so far.
        loss: of the last step, a 0-d tensor on the device.

    Raises:
        TrainingError: the backend asked for by name cannot serve the device and the recipe's amp.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        *,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        preprocess: Preprocess | None = None,
    ) -> None:
        self.workers = workers
        self.data, self.recipe, self.device = data, recipe, torch.device(device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if recipe.compile:
            self.model.compile()
        self.preprocess = preprocess or Preprocess.fit(data.train)
        self.dtype = amp_dtype(recipe.amp, self.device)
        check_backend(self.device, self.dtype)
        self.batch_size = min(recipe.batch_size, len(data.train))
        self.steps_per_epoch = len(data.train) // self.batch_size
        self.steps = recipe.epochs * self.steps_per_epoch
        self.optimizer = recipe.make_optimizer(model)
        self.schedule = recipe.make_schedule(self.optimizer, self.steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.batches = _Batches(len(data.train), self.batch_size, recipe.seed)
        self.loader = _loader(data.train, self.batches, self.device, workers)
        self.history: list[Epoch] = []
        self.step = 0
        self.lr = 0.0
        self.loss = torch.zeros((), device=self.device)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.seconds = 0.0
        self.loss_sum = torch.zeros((), device=self.device, dtype=torch.float32)
        self.right = torch.zeros((), device=self.device, dtype=torch.int64)

    @property
    def epoch(self) -> int:
        """Epochs finished, with their test."""
        return len(self.history)

    @property
    def batch(self) -> int:
        """Steps taken since."""
        return self.step - self.epoch * self.steps_per_epoch

    def run(
        self,
        on_step: Callable[[], object] | None = None,
        on_epoch: Callable[[Evaluation], object] | None = None,
    ) -> Evaluation:
        """Train to the end of the recipe, from wherever the state stands.

        Args:
            on_step: called after each step; `state_dict` is whole then, also if it raises.
            on_epoch: called after each epoch, with its test.

        Returns:
            The last test.

        Raises:
            TrainingError: the loss is no longer finite.
            DataError: a picture cannot be read.
        """
        evaluation = None
        while self.epoch < self.recipe.epochs:
            self._train_epoch(on_step)
            evaluation = self.evaluate()
            self._end_epoch(evaluation)
            if on_epoch is not None:
                on_epoch(evaluation)
        return self.evaluate() if evaluation is None else evaluation

    def evaluate(self) -> Evaluation:
        """How the model does on the test pictures now."""
        return evaluate(
            self.model,
            self.data.test,
            self.preprocess,
            len(self.data.classes),
            self.device,
            self.dtype,
            batch_size=min(TEST_BATCH, 4 * self.batch_size),
            workers=self.workers,
        )

    def check_finite(self) -> None:
        """See that there is something to go on with.

        Raises:
            TrainingError: the loss of this epoch or a weight is no longer finite.
        """
        numbers = [v for v in self.model.state_dict().values() if v.is_floating_point()]
        if not all(torch.stack([v.isfinite().all() for v in [self.loss_sum, *numbers]]).tolist()):
            half = self.dtype != torch.float32
            raise TrainingError(
                f"loss or weights are no longer finite in epoch {self.epoch + 1}; try a lower "
                f"learning rate than {self.recipe.peak_lr:g}" + (", or amp off" if half else "")
            )

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on: tensors, numbers, strings, lists and dicts."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "history": [asdict(epoch) for epoch in self.history],
            "step": self.step,
            "lr": self.lr,
            "seconds": self.seconds,
            "loss_sum": self.loss_sum.item(),
            "right": self.right.item(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken, of the same model, data and recipe."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        self.history = [Epoch(**row) for row in state["history"]]
        self.step, self.lr, self.seconds = state["step"], state["lr"], state["seconds"]
        self.loss_sum.fill_(state["loss_sum"])
        self.right.fill_(state["right"])

    def _train_epoch(self, on_step: Callable[[], object] | None) -> None:
        self.model.train()
        self.batches.seek(self.epoch, self.batch)
        before = time.perf_counter() - self.seconds
        for images, labels in _read(self.loader, self.device):
            self._train_step(images, labels)
            self.seconds = time.perf_counter() - before
            if on_step is not None:
                on_step()
        self.check_finite()  # waits for the device
        self.seconds = time.perf_counter() - before

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        draws = seeded(self.recipe.seed, self.epoch, self.batch)
        inputs = self.preprocess(augmented(unit(images), self.recipe.augment, draws))
        self.optimizer.zero_grad()
        with autocast(self.device, self.dtype):
            logits = self.model(inputs)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.lr = float(self.schedule.get_last_lr()[0])
        self.step += 1
        if self.step < self.steps:
            self.schedule.step()
        self.loss = loss.detach()
        self.loss_sum += self.loss
        self.right += (logits.argmax(1) == labels).sum()

    def _end_epoch(self, evaluation: Evaluation) -> None:
        images = self.steps_per_epoch * self.batch_size
        self.history.append(
            Epoch(
                epoch=self.epoch + 1,
                step=self.step,
                lr=self.lr,
                train_loss=self.loss_sum.item() / self.steps_per_epoch,
                train_accuracy=self.right.item() / images,
                test_loss=evaluation.loss,
                test_accuracy=evaluation.accuracy,
                seconds=self.seconds,
                img_per_s=images / self.seconds,
            )
        )
        self._begin_epoch()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    pictures: Pictures,
    preprocess: Preprocess,
    classes: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    batch_size: int = TEST_BATCH,
    workers: int | None = None,
) -> Evaluation:
    """How a model does on labelled pictures.

    Args:
        model: on the device; left in eval mode.
        pictures: labels below `classes`.
        preprocess: as the model was trained with.
        dtype: to compute in, float32 or a half type under autocast.
        batch_size: pictures at a time.
        workers: as for Trainer.
    """
    model.eval()
    loss = torch.zeros((), device=device, dtype=torch.float64)
    cells = torch.zeros(classes * classes, device=device, dtype=torch.int64)
    indices = torch.arange(len(pictures)).split(batch_size)
    loader = _loader(pictures, [index.tolist() for index in indices], device, workers)
    for images, labels in _read(loader, device):
        with autocast(device, dtype):
            logits = model(preprocess(unit(images)))
        loss += F.cross_entropy(logits.to(torch.float64), labels, reduction="sum")
        cells += torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
    return Evaluation(loss.item() / len(pictures), cells.view(classes, classes).cpu())


def check_backend(device: torch.device, dtype: torch.dtype) -> None:
    """See that convolutions can run before anything does.

    Raises:
        TrainingError: the backend asked for by name cannot serve; says why.
    """
    try:
        backends.choose("conv_bn", device.type, dtype)
    except RuntimeError as error:
        raise TrainingError(one_line(error)) from None


def seeded(*parts: int) -> torch.Generator:
    """A generator whose numbers depend on the parts and have nothing to do with those of others."""
    # with their number, as SeedSequence takes (1, 0) for (1,)
    seed = np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


class _Batches(Sampler[list[int]]):
    """The full batches of an epoch, shuffled anew in each, from a step of it on."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.seek(0, 0)

    def seek(self, epoch: int, start: int) -> None:
        """Where the next iteration begins."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.count // self.batch_size - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.count, generator=seeded(self.seed, self.epoch))
        full = order[: self.count - self.count % self.batch_size].split(self.batch_size)
        return iter([index.tolist() for index in full[self.start :]])


def _loader(
    pictures: Pictures,
    batches: Iterable[list[int]],
    device: torch.device,
    workers: int | None,
) -> DataLoader[Any]:
    if isinstance(pictures, ArrayPictures):
        workers = 0  # nothing to wait for
    elif workers is None:
        workers = min(WORKERS, os.cpu_count() or 1)
    return DataLoader(
        pictures,
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_main,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the loader draws from torch's own
    )


def _as_it_is(batch: object) -> object:
    return batch


def _leave_signals_to_main(worker: int) -> None:
    """A signal to the whole group is for the main process, which may still write a checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # not ignored, as it is how workers are ended; but an exit code of 0 is no alarm to torch
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))


def _read(loader: DataLoader[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches, on the device."""
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        images, labels = batch
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
