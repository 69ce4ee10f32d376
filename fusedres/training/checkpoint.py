"""Checkpoints: tensors and plain data, written whole or not at all, read without executing code."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedres import models
from fusedres._version import __version__
from fusedres.models.weights import DamagedFileError, load_plain, wanted_by
from fusedres.training.files import CheckpointError, one_line, write_atomically
from fusedres.training.preprocess import Preprocess
from fusedres.training.recipe import Recipe

FILE = "checkpoint.pt"
FORMAT = "fusedres checkpoint 1"
NETWORKS: dict[str, Callable[..., models.ResNet]] = {
    name: getattr(models, name)
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
}


@dataclass(frozen=True)
class Network:
    """Which network it is, apart from its weights.

    Attributes:
        model: one of NETWORKS.
        variant: as FusedResNet50 takes it.
        num_classes, in_channels: what goes out and in.
    """

    model: str
    variant: str
    num_classes: int
    in_channels: int

    def build(self) -> models.ResNet:
        """The network with new weights, drawn from torch's generator."""
        return NETWORKS[self.model](
            self.num_classes, variant=self.variant, in_channels=self.in_channels
        )


@dataclass(frozen=True)
class Checkpoint:
    """A training run at some point: all that is needed to go on with it, and to use its model.

    Attributes:
        network, recipe, preprocess, classes: what is trained, how, on what.
        source: of the data, as `load` takes it.
        fingerprint: of the data.
        wall: seconds that the run took so far.
        state: the Trainer's.
    """

    network: Network
    recipe: Recipe
    preprocess: Preprocess
    classes: tuple[str, ...]
    source: str
    fingerprint: str
    wall: float
    state: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write it, in place of an older one.

        Raises:
            CheckpointError: it could not be written; the older one, if any, is as it was.
        """
        content = {**vars(self), "format": FORMAT, "version": __version__}
        for name in ("network", "recipe", "preprocess"):
            content[name] = asdict(content[name])
        buffer = io.BytesIO()
        torch.save(content, buffer)
        kept = "; the checkpoint there is the one of before" if path.exists() else ""
        try:
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot write: {error.strerror}{kept}") from None

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read one, onto the CPU.

        Args:
            path: the file, or the folder of a run.

        Raises:
            CheckpointError: no such file; not one of ours; damaged; or a pickle that holds more
                than tensors and plain data, of which nothing has been executed.
        """
        path = path / FILE if path.is_dir() else path
        try:
            content = load_plain(path)
        except DamagedFileError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such checkpoint") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
        except Exception as error:  # whatever a hostile or damaged file makes of the reader
            wanted = wanted_by(error)
            raise CheckpointError(
                f"{path}: refused: not a whole file of tensors and plain data"
                + (f" ({wanted})" if wanted else "")
            ) from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not a checkpoint of fusedres train ({FORMAT!r})")
        content.pop("format")
        content.pop("version", None)
        try:
            checkpoint = cls(
                **{
                    **content,
                    "network": Network(**content["network"]),
                    "recipe": Recipe(**content["recipe"]),
                    "preprocess": Preprocess(**content["preprocess"]),
                    "classes": tuple(content["classes"]),
                }
            )
            checkpoint.check()
        except Exception as error:  # the file says anything it likes
            raise CheckpointError(f"{path}: damaged: {one_line(error)}") from None
        return checkpoint

    def check(self) -> None:
        """See that the parts fit each other.

        Raises:
            Exception: of any kind; they do not.
        """
        self.model()
        network, preprocess = self.network, self.preprocess
        counts = len(self.classes), len(preprocess.mean), len(preprocess.std)
        if counts != (network.num_classes, network.in_channels, network.in_channels):
            raise ValueError("classes, mean and std do not fit the network")
        numbers = (*preprocess.size, *preprocess.mean, *preprocess.std, self.wall)
        texts = (*self.classes, self.source, self.fingerprint)
        if not all(isinstance(n, int | float) for n in numbers) or len(preprocess.size) != 2:
            raise TypeError("size, mean, std and wall must be numbers")
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("classes, source and fingerprint must be strings")

    def model(self) -> nn.Module:
        """The network with the weights of the checkpoint, in eval mode."""
        with torch.device("meta"):
            model = self.network.build()
        # a plain dict: torch notes `assign` in a state_dict's metadata, and would assign again when
        # a Trainer loads it, behind its optimizer's back
        model.load_state_dict(dict(self.state["model"]), assign=True)
        return model.eval()
