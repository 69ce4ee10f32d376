"""A trained network with what it takes to use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from fusedres.training.checkpoint import Checkpoint
from fusedres.training.data import Data, read_picture
from fusedres.training.files import DataError
from fusedres.training.preprocess import unit
from fusedres.training.recipe import amp_dtype
from fusedres.training.trainer import Evaluation, check_backend, evaluate


@dataclass(frozen=True)
class Prediction:
    """What a picture was taken for.

    Attributes:
        path: the picture.
        ranking: (class, probability), the most probable first.
    """

    path: Path
    ranking: tuple[tuple[str, float], ...]


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

    @torch.inference_mode()
    def predict(self, path: str | Path) -> Prediction:
        """What one picture is taken for, in fp32.

        Raises:
            DataError: it cannot be read.
        """
        picture = read_picture(Path(path), self.preprocess.size, self.preprocess.channels)
        logits = self.model(self.preprocess(unit(picture.unsqueeze(0).to(self.device))))
        probabilities = F.softmax(logits[0].to(torch.float64), 0).cpu()
        order = probabilities.argsort(descending=True, stable=True).tolist()
        ranking = tuple((self.classes[i], probabilities[i].item()) for i in order)
        return Prediction(Path(path), ranking)

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
        dtype = amp_dtype(self.checkpoint.recipe.amp, self.device)
        return evaluate(
            self.model, pictures, self.preprocess, len(self.classes), self.device, dtype
        )


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" ... ({len(names)})" if len(names) > most else "")
