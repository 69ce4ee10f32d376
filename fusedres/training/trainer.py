"""The training loop, and testing.

A run depends on model, data and recipe alone: batches and augmentation are drawn anew at each step
from (seed, epoch, step), so that a run taken up from a Trainer's state ends in the same bits as one
that never stopped, where the device computes deterministically. How many processes share a batch
changes the rounding of sums, and without `sync_bn` over which pictures BatchNorm takes statistics.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres import backends
from fusedres._tensors import autocast
from fusedres.training.data import Data, Pictures, Share
from fusedres.training.files import TrainingError, one_line
from fusedres.training.loader import Batches, Loader, make_loader, seeded
from fusedres.training.preprocess import Preprocess, augmented, draw, unit
from fusedres.training.processes import Processes
from fusedres.training.recipe import Recipe

# DDP would send the first process's buffers to the others before every step; running statistics are
# averaged instead, before they are read
_PARAMETERS = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
_NO_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers": False
}
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
    """Trains a model by a recipe, in one process or in several that torch's default group joins, by
    DistributedDataParallel.

    Args:
        model: maps [N, C, H, W], channels_last, to logits [N, classes]; moved to the device, with
            its parameters channels_last and in the recipe's dtype, and BatchNorms replaced by
            SyncBatchNorms where it says so. The same in all processes.
        data: pictures and labels.
        recipe: how to train.
        device: where.
        workers: processes that read pictures from files, as fusedres.training.loader.make_loader
            takes it.
        loader: what reads them, "workers" or "dali".
        preprocess: how to prepare pictures; None: by the training pictures.
        processes: those that train together. None: Processes.current().

    Attributes:
        history: the epochs so far.
        step: steps taken so far.
        batch_size: pictures a step, of all processes together.
        loss: of the last step, a 0-d tensor on the device; of this process's part.

    Raises:
        TrainingError: the backend asked for by name cannot serve the device and the recipe's amp;
            fewer pictures a step than processes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        *,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        loader: str = "workers",
        preprocess: Preprocess | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.workers, self.loader_kind = workers, loader
        self.processes = processes or Processes.current()
        self.data, self.recipe, self.device = data, recipe, torch.device(device)
        self.preprocess = preprocess or Preprocess.fit(data.train)
        self.dtype = recipe.computes_in(self.device)
        if recipe.dtype == "fp64":
            model = model.to(torch.float64)
        self.model = model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.processes.all_do(self._begin)
        if recipe.compile:
            self.model.compile()
        self._trained = self._parallel()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.history: list[Epoch] = []
        self.step = 0
        self.lr = 0.0
        self.loss = torch.zeros((), device=self.device)
        self._begin_epoch()

    def _begin(self) -> None:
        """All that may be refused."""
        recipe, processes = self.recipe, self.processes
        check_backend(self.device, self.dtype)
        if recipe.sync_bn and recipe.compile and self.device.type == "cpu" and processes.count > 1:
            raise TrainingError("sync_bn cannot be compiled on a CPU; leave out compile")
        self._set_batch(recipe.batch_size * processes.count)
        batch_size = min(TEST_BATCH, 4 * self.batch_size)
        self._test = _test_loader(
            self.data.test, self.device, batch_size, self.workers, self.loader_kind, processes
        )

    def _set_batch(self, batch_size: int) -> None:
        """All that depends on how many pictures a step takes."""
        recipe, processes, count = self.recipe, self.processes, len(self.data.train)
        self.batch_size = min(batch_size, count)
        least = 1 if recipe.sync_bn or processes.count == 1 else 2  # BatchNorm takes more than one
        if self.batch_size < least * processes.count:
            raise TrainingError(
                f"{self.batch_size} pictures a step are too few for {processes.count} processes, "
                f"at least {least} for each; {self.batch_size // least} processes can share them"
            )
        self.steps_per_epoch = count // self.batch_size
        self.steps = recipe.epochs * self.steps_per_epoch
        self.optimizer = recipe.make_optimizer(self.model)
        self.schedule = recipe.make_schedule(self.optimizer, self.steps)
        self._part = processes.share(self.batch_size)
        self._crops = recipe.augment == "crop+flip" and self.data.train.whole
        self.batches = Batches(count, self.batch_size, recipe.seed, self._part, self._crops)
        self.loader = make_loader(
            self.data.train,
            self.batches,
            self.device,
            batch_size=self._part.stop - self._part.start,
            kind=self.loader_kind,
            workers=self.workers,
            processes=processes,
        )

    def _parallel(self) -> Callable[[Tensor], Tensor]:
        """The model, with gradients averaged over the processes."""
        if self.processes.count == 1:
            return self.model
        parallel = nn.parallel.DistributedDataParallel(
            self.model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_NO_BUFFERS,
        )
        if self.recipe.sync_bn:  # behind its back: on a CPU it refuses what our blocks can do
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        return parallel

    def _begin_epoch(self) -> None:
        self.seconds = 0.0
        self.loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)
        self.right = torch.zeros((), device=self.device, dtype=torch.int64)
        self._seen = 0  # pictures that `right` is of

    @property
    def epoch(self) -> int:
        """Epochs finished, with their test."""
        return len(self.history)

    @property
    def batch(self) -> int:
        """Steps taken since."""
        return self.step - self.epoch * self.steps_per_epoch

    @property
    def accuracy(self) -> float:
        """In this epoch so far, 0 to 1; of this process's part."""
        return int(self.right) / max(self._seen, 1)

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
        """How the model does on the test pictures now; all processes ask at the same step."""
        self._average_statistics()
        test, classes = self.data.test, len(self.data.classes)
        return _evaluated(
            self.model,
            self._test,
            self.preprocess,
            (len(test), classes),
            self.device,
            self.dtype,
            self.processes,
        )

    def _average_statistics(self) -> None:
        """The running statistics of all processes, which have seen other pictures each."""
        if self.processes.count == 1 or self.recipe.sync_bn:  # which has the same everywhere
            return
        floats = [b for b in self.model.buffers() if b.is_floating_point()]
        if floats:
            (total,) = self.processes.add_up(torch.cat([b.flatten().double() for b in floats]))
            parts = (total / self.processes.count).split([b.numel() for b in floats])
            for buffer, part in zip(floats, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    def check_finite(self) -> None:
        """See that there is something to go on with.

        Raises:
            TrainingError: the loss of this epoch or a weight is no longer finite.
        """
        numbers = [v for v in self.model.state_dict().values() if v.is_floating_point()]
        numbers += self._totals()
        if not all(torch.stack([v.isfinite().all() for v in numbers]).tolist()):
            half = self.dtype in (torch.float16, torch.bfloat16)
            raise TrainingError(
                f"loss or weights are no longer finite in epoch {self.epoch + 1}; try a lower "
                f"learning rate than {self.recipe.peak_lr:g}" + (", or amp off" if half else "")
            )

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on: tensors, numbers, strings, lists and dicts.
        Several processes ask for it at the same step, and get the same but for the seconds.
        """
        self._average_statistics()
        loss_sum, right = self._totals()
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
            "batch_size": self.batch_size,
            "loss_sum": loss_sum.item(),
            "right": right.item(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken, of the same model, data and recipe; any number
        of processes share the batches of then.
        """
        before = min(self.recipe.batch_size, len(self.data.train))  # there was one process then
        batch_size = state.get("batch_size", before)
        if batch_size != self.batch_size:
            self.processes.all_do(lambda: self._set_batch(batch_size))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        self.history = [Epoch(**row) for row in state["history"]]
        self.step, self.lr, self.seconds = state["step"], state["lr"], state["seconds"]
        if self.processes.main:  # the others' parts are in it
            self.loss_sum.fill_(state["loss_sum"])
            self.right.fill_(state["right"])
            self._seen = self.batch * self.batch_size

    def _totals(self) -> tuple[Tensor, Tensor]:
        """loss_sum and right, of all processes."""
        loss_sum, right = self.processes.add_up(self.loss_sum, self.right)
        return loss_sum, right

    def _train_epoch(self, on_step: Callable[[], object] | None) -> None:
        self.model.train()
        self.batches.seek(self.epoch, self.batch)
        before = time.perf_counter() - self.seconds
        for images, labels in self.loader:
            self.train_step(images, labels)
            self.seconds = time.perf_counter() - before
            if on_step is not None:
                on_step()
        self.check_finite()  # waits for the device
        self.seconds = time.perf_counter() - before

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One step.

        Args:
            images: uint8 [B, H, W, C] on the device, this process's part of the batch.
            labels: int64 [B].
        """
        self.optimizer.zero_grad()
        with autocast(self.device, self.dtype):
            logits = self._trained(self._inputs(images))
            loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        share = len(labels) * self.processes.count / self.batch_size  # parts may differ in size
        self.scaler.scale(loss if share == 1 else loss * share).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.lr = float(self.schedule.get_last_lr()[0])
        self.step += 1
        if self.step < self.steps:
            self.schedule.step()
        self.loss = loss.detach()
        self.loss_sum += self.loss * (len(labels) / self.batch_size)
        self.right += (logits.argmax(1) == labels).sum()
        self._seen += len(labels)

    def _inputs(self, images: Tensor) -> Tensor:
        """What the model reads, of pictures augmented anew."""
        augment = "none" if self._crops else self.recipe.augment
        if augment == "none":
            return self.preprocess.frames(images, self.dtype)
        generator = seeded(self.recipe.seed, self.epoch, self.batch)
        draws = draw(augment, self.batch_size, generator)[self._part]
        return self.preprocess(augmented(unit(images, _wide(self.dtype)), augment, draws))

    def _end_epoch(self, evaluation: Evaluation) -> None:
        images = self.steps_per_epoch * self.batch_size
        loss_sum, right = self._totals()
        self.history.append(
            Epoch(
                epoch=self.epoch + 1,
                step=self.step,
                lr=self.lr,
                train_loss=loss_sum.item() / self.steps_per_epoch,
                train_accuracy=right.item() / images,
                test_loss=evaluation.loss,
                test_accuracy=evaluation.accuracy,
                seconds=self.seconds,
                img_per_s=images / self.seconds,
            )
        )
        self._begin_epoch()


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
    loader: str = "workers",
) -> Evaluation:
    """How a model does on labelled pictures.

    Args:
        model: on the device; left in eval mode.
        pictures: labels below `classes`.
        preprocess: as the model was trained with.
        dtype: to compute in, float32, float64 or a half type under autocast.
        batch_size: pictures at a time.
        workers, loader: as for Trainer.
    """
    alone = Processes()
    batches = _test_loader(pictures, device, batch_size, workers, loader, alone)
    counts = len(pictures), classes
    return _evaluated(model, batches, preprocess, counts, device, dtype, alone)


def _test_loader(
    pictures: Pictures,
    device: torch.device,
    batch_size: int,
    workers: int | None,
    kind: str,
    processes: Processes,
) -> Loader:
    """This process's batches of all pictures."""
    batches = torch.arange(len(pictures)).split(batch_size)
    shares = [Share(i.tolist()) for i in batches[processes.rank :: processes.count]]
    return make_loader(
        pictures,
        shares,
        device,
        batch_size=batch_size,
        kind=kind,
        workers=workers,
        processes=processes,
    )


@torch.inference_mode()
def _evaluated(
    model: nn.Module,
    batches: Loader,
    preprocess: Preprocess,
    counts: tuple[int, int],  # of pictures, in all processes, and of classes
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes,
) -> Evaluation:
    pictures, classes = counts
    model.eval()
    loss = torch.zeros((), device=device, dtype=torch.float64)
    cells = torch.zeros(classes * classes, device=device, dtype=torch.int64)
    for images, labels in batches:
        with autocast(device, dtype):
            logits = model(preprocess.frames(images, dtype))
        loss += F.cross_entropy(logits.to(torch.float64), labels, reduction="sum")
        found = labels * classes + logits.argmax(1)
        cells.scatter_add_(0, found, torch.ones_like(found))
    loss, cells = processes.add_up(loss, cells)
    return Evaluation(loss.item() / pictures, cells.view(classes, classes).cpu())


def _wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: what pictures are augmented in."""
    return dtype if dtype == torch.float64 else torch.float32


def check_backend(device: torch.device, dtype: torch.dtype) -> None:
    """See that convolutions can run before anything does.

    Raises:
        TrainingError: the backend asked for by name cannot serve; says why.
    """
    try:
        backends.choose("conv_bn", device.type, dtype)
    except RuntimeError as error:
        raise TrainingError(one_line(error)) from None
