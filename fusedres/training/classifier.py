"""A trained network with what it takes to use it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.nn import freeze
from fusedres.training.checkpoint import Checkpoint
from fusedres.training.data import Data, Failure, read_picture
from fusedres.training.files import DataError, TrainingError
from fusedres.training.trainer import Evaluation, check_backend, evaluate

BATCH_SIZE = 32
READERS = 4  # threads that read pictures, at most: each may hold a large one

Ranking = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Prediction:
    """What a picture was taken for.

    Attributes:
        path: the picture.
        ranking: (class, probability), the most probable first.
    """

    path: Path
    ranking: Ranking


class Classifier:
    """A trained network, for pictures of one's own.

    Args:
        checkpoint: what `fusedres train` wrote: a file, or the folder it is in.
        device: where to run.

    Raises:
        CheckpointError: it cannot be read or trusted.
        TrainingError: the backend asked for by name cannot serve the device.
    """

    def __init__(self, checkpoint: str | Path, device: torch.device | str = "cpu") -> None:
        self.checkpoint = Checkpoint.load(Path(checkpoint))
        self.device = torch.device(device)
        check_backend(self.device, torch.float32)
        self.model = self.checkpoint.model().to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.preprocess, self.classes = self.checkpoint.preprocess, self.checkpoint.classes
        # takes pictures as they are read
        self._frozen = freeze(self.model, mean=self.preprocess.mean, std=self.preprocess.std)

    def predict(self, path: str | Path) -> Prediction:
        """What one picture is taken for, in fp32.

        Raises:
            DataError: it cannot be read.
            TrainingError: the network's outputs are not finite.
        """
        (ranking,) = self._rankings([self._read(Path(path))])
        return Prediction(Path(path), ranking)

    def predict_many(
        self, paths: Iterable[str | Path], *, batch_size: int = BATCH_SIZE
    ) -> Iterator[Prediction | Failure]:
        """What pictures are taken for, in fp32 and in their order; while a batch goes through the
        network the next one is read.

        Args:
            paths: picture files, any number; no more of them is taken than is read.
            batch_size: pictures that go through the network together, at least 1.

        Returns:
            An iterator over a Prediction for each path, or a Failure where it cannot be read. It
            raises TrainingError where the network's outputs are not finite.

        Raises:
            ValueError: batch_size is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        return self._predict_many(map(Path, paths), batch_size)

    def _predict_many(
        self, paths: Iterator[Path], batch_size: int
    ) -> Iterator[Prediction | Failure]:
        readers = ThreadPoolExecutor(min(READERS, os.cpu_count() or 1))

        def begin() -> list[tuple[Path, Future[Tensor | DataError]]]:
            return [(p, readers.submit(self._try_to_read, p)) for p in islice(paths, batch_size)]

        try:
            batch = begin()
            while batch:
                following = begin()
                results = [(path, future.result()) for path, future in batch]
                rankings = iter(self._rankings([r for _, r in results if isinstance(r, Tensor)]))
                for path, result in results:
                    if isinstance(result, DataError):
                        yield Failure(path, result)
                    else:
                        yield Prediction(path, next(rankings))
                batch = following
        finally:
            readers.shutdown(cancel_futures=True)

    def _read(self, path: Path) -> Tensor:
        preprocess = self.preprocess
        return read_picture(path, preprocess.size, preprocess.channels, crop=preprocess.crop)

    def _try_to_read(self, path: Path) -> Tensor | DataError:
        try:
            return self._read(path)
        except DataError as error:
            return error

    @torch.inference_mode()
    def _rankings(self, pictures: Sequence[Tensor]) -> list[Ranking]:
        """Of pictures uint8 [H, W, C], which go through the network together."""
        if not pictures:
            return []
        images = torch.stack(list(pictures)).to(self.device)
        logits = self._frozen(images).to(torch.float64)
        if not logits.isfinite().all():
            raise TrainingError("the network's outputs are not finite: its weights are of no use")
        probabilities, order = F.softmax(logits, 1).sort(dim=1, descending=True, stable=True)
        return [
            tuple((self.classes[i], p) for i, p in zip(labels, shares, strict=True))
            for labels, shares in zip(order.tolist(), probabilities.tolist(), strict=True)
        ]

    def evaluate(self, data: Data, part: str = "test") -> Evaluation:
        """How the network does on labelled pictures, in the dtype it was trained in.

        Args:
            data: of the same classes and size.
            part: "test" or "train".

        Raises:
            DataError: the data differ in classes, size or channels from what it was trained on.
        """
        pictures = data.train if part == "train" else data.test
        if data.classes != self.classes:
            raise DataError(
                f"{data.source}: its classes are {_listed(data.classes)}, those of the checkpoint "
                f"{_listed(self.classes)}"
            )
        expected = (*self.preprocess.size, self.preprocess.channels)
        if (*pictures.size, pictures.channels) != expected:
            raise DataError(
                f"{data.source}: its pictures are {[*pictures.size, pictures.channels]}, those of "
                f"the checkpoint {list(expected)} [H, W, C]"
            )
        dtype = self.checkpoint.recipe.computes_in(self.device)
        return evaluate(
            self.model, pictures, self.preprocess, len(self.classes), self.device, dtype
        )


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" ... ({len(names)})" if len(names) > most else "")
