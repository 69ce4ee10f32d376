"""Batches on their way to the device: which pictures, read by worker processes or by DALI, and
copied while the step before is computed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fusedres.training.data import ArrayPictures, FilePictures, Pictures, Share
from fusedres.training.files import DataError, TrainingError
from fusedres.training.preprocess import draw, moved
from fusedres.training.processes import Processes

LOADERS = ("workers", "dali")
# processes that read pictures, at most: for a CPU, as it computes the steps as well; for a GPU, as
# each holds two batches ready in shared memory
WORKERS = {"cpu": 4, "cuda": 32}
ON_DEVICE = 2**30  # bytes of pictures in memory that are held on a GPU instead

Batch = tuple[Tensor, Tensor]  # uint8 [B, H, W, C] and int64 [B], on the device


class Loader(Protocol):
    """Goes through its batches at each iteration anew."""

    def __iter__(self) -> Iterator[Batch]: ...


def seeded(*parts: int) -> torch.Generator:
    """A generator whose numbers depend on the parts and have nothing to do with those of others."""
    # with their number, as SeedSequence takes (1, 0) for (1,)
    seed = np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


class Batches(Sampler[Share]):
    """This process's shares of an epoch's full batches, shuffled anew in each epoch, from a step of
    it on. What is in a batch does not depend on how many processes there are.

    Args:
        count: pictures.
        batch_size: of all processes together.
        seed: of the order.
        part: this process's of a batch.
        crops: whether a random part is to be cut out of each picture as it is read.
    """

    def __init__(self, count: int, batch_size: int, seed: int, part: slice, crops: bool) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.part, self.crops = part, crops
        self.seek(0, 0)

    def seek(self, epoch: int, start: int) -> None:
        """Where the next iteration begins."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.count // self.batch_size - self.start

    def __iter__(self) -> Iterator[Share]:
        order = torch.randperm(self.count, generator=seeded(self.seed, self.epoch))
        full = order[: self.count - self.count % self.batch_size].split(self.batch_size)
        for step, index in enumerate(full[self.start :], self.start):
            yield Share(index[self.part].tolist(), self._draws(step))

    def _draws(self, step: int) -> Tensor | None:
        if not self.crops:
            return None
        generator = seeded(self.seed, self.epoch, step)
        # a copy, for a part of it would travel to a worker process as the whole
        return draw("crop+flip", self.batch_size, generator)[self.part].clone()


def make_loader(
    pictures: Pictures,
    batches: Sampler[Share] | Sequence[Share],
    device: torch.device,
    *,
    batch_size: int,
    kind: str = "workers",
    workers: int | None = None,
    processes: Processes | None = None,
) -> Loader:
    """What reads batches.

    Args:
        batch_size: pictures of the largest share.
        kind: one of LOADERS; pictures in memory need neither.
        workers: processes that read; in DALI's case files, which as many threads decode. None: this
            process's part of the CPUs, up to WORKERS.

    Raises:
        TrainingError: DALI is not installed, or an unknown kind.
    """
    if kind not in LOADERS:
        raise TrainingError(f"loader must be one of {', '.join(LOADERS)}, got {kind!r}")
    if isinstance(pictures, ArrayPictures):
        fits = device.type == "cuda" and pictures.images.nbytes <= ON_DEVICE
        if fits or device.type == "cpu":
            return _Held(pictures, batches, device)
        return _Workers(pictures, batches, device, 0)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) // (processes or Processes()).local
        workers = max(1, min(WORKERS[device.type], workers))
    if kind == "dali" and isinstance(pictures, FilePictures):
        from fusedres.training.dali import DaliLoader

        return DaliLoader(pictures, batches, device, batch_size, workers)
    return _Workers(pictures, batches, device, workers)


def read_by_workers(
    pictures: Dataset[Any],
    batches: Sampler[Share] | Sequence[Share],
    workers: int,
    pin_memory: bool = False,
    start: str | None = None,
) -> DataLoader[Any]:
    """torch's DataLoader over shares; of whole batches, which the pictures put together. Processes
    start as multiprocessing's context of that name has it, or by default.
    """
    return DataLoader(
        pictures,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_main,
        multiprocessing_context=start if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader draws from torch's own
    )


class _Held:
    """Pictures in memory, on the device."""

    def __init__(
        self, pictures: ArrayPictures, batches: Iterable[Share], device: torch.device
    ) -> None:
        self._images, self._labels = pictures.images.to(device), pictures.labels.to(device)
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        for share in self._batches:
            index = moved(torch.tensor(share.index), self._images.device)
            yield self._images[index], self._labels[index]


class _Workers:
    """Pictures that worker processes read, and copies to the device."""

    def __init__(
        self,
        pictures: Pictures,
        batches: Sampler[Share] | Sequence[Share],
        device: torch.device,
        workers: int,
    ) -> None:
        self._device = device
        self._loader = read_by_workers(pictures, batches, workers, device.type == "cuda")

    def __iter__(self) -> Iterator[Batch]:
        batches = self._checked()
        return _copied_ahead(batches, self._device) if self._device.type == "cuda" else batches

    def _checked(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


def _copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """On the device. A batch is copied on a stream of its own while the step before, which has been
    launched by then, is computed; from pinned memory, which torch's allocator keeps until then.
    """
    copies = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copies):
            images, labels = (t.to(device, non_blocking=True) for t in batch)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copies)
        for t in (images, labels):
            t.record_stream(computing)  # its memory is not to be reused before that stream is done
        yield images, labels


def _as_it_is(batch: object) -> object:
    return batch


def _leave_signals_to_main(worker: int) -> None:
    """A signal to the whole group is for the main process, which may still write a checkpoint."""
    os.setpgid(0, 0)  # torchrun sends its own to groups
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # not ignored, as it is how workers are ended; but an exit code of 0 is no alarm to torch
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
