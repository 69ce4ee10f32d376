"""What the demo does: scikit-learn's handwritten digits, a training run, the fp64 parity check."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fusedres.models import FusedResNet50
from fusedres.nn import unfuse
from fusedres.training import Data, Preprocess, Recipe, Trainer
from fusedres.training.data import ArrayPictures, Pictures
from fusedres.training.data import load as load_data
from fusedres.training.preprocess import unit

PARITY_STEPS = 3
PARITY_BATCH = 32
# Of plain SGD: a step still moves the loss visibly, the gradient of a new network being that large.
# Larger rates magnify rounding a hundredfold per step, between runs of plain PyTorch as well: they
# would show how chaotic training is, not whether gradients agree.
PARITY_LEARNING_RATE = 1e-6
PARITY_LIMIT = 1e-9


@dataclass(frozen=True)
class Training:
    """How a training run went: the loss of every step, and the accuracy (0 to 1) on test images."""

    losses: list[float]
    test_accuracy: float
    seconds: float


@dataclass(frozen=True)
class Parity:
    """Fused against unfused in fp64; `difference` is the largest relative one of their losses."""

    difference: float
    limit: float = PARITY_LIMIT
    steps: int = PARITY_STEPS
    batch_size: int = PARITY_BATCH
    learning_rate: float = PARITY_LEARNING_RATE

    @property
    def passed(self) -> bool:
        """Within the limit; NaN is not."""
        return self.difference <= self.limit


def load(train: int | None = None, test: int | None = None) -> Data:
    """The digits, 32x32 RGB; all of them, or so many evenly spread ones."""
    digits = load_data("digits")
    return Data(_some(digits.train, train), _some(digits.test, test), digits.classes, "digits")


def _some(pictures: Pictures, count: int | None) -> Pictures:
    index = np.linspace(0, len(pictures) - 1, count or len(pictures)).astype(int).tolist()
    return ArrayPictures(pictures.read(index), pictures.labels[index])


def initial_model(
    seed: int, device: torch.device, dtype: torch.dtype, zero_init_residual: bool
) -> nn.Module:
    """FusedResNet50 for ten classes; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = FusedResNet50(10, variant="torchvision", zero_init_residual=zero_init_residual)
    return model.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def train(
    model: nn.Module, digits: Data, recipe: Recipe, *, device: torch.device, name: str
) -> Training:
    """Train under a progress bar."""
    from tqdm import tqdm

    trainer = Trainer(model, digits, recipe, device=device)
    losses: list[float] = []
    start = time.perf_counter()
    with tqdm(total=trainer.steps, desc=name, unit="step", mininterval=0.5) as bar:

        def on_step() -> None:
            losses.append(trainer.loss.item())
            speed = trainer.step * trainer.batch_size / (time.perf_counter() - start)
            bar.set_postfix_str(
                f"loss {losses[-1]:.3f}, accuracy {trainer.accuracy:.0%}, {speed:.0f} img/s",
                refresh=False,
            )
            bar.update()

        evaluation = trainer.run(on_step)
    return Training(losses, evaluation.accuracy, time.perf_counter() - start)


def parity(digits: Data, seed: int, device: torch.device) -> Parity:
    """Hold fused against unfused in fp64.

    Both start from the same weights and take PARITY_STEPS steps of SGD on the same batches; their
    losses are compared before each step and after the last.
    """
    # No branch starts at zero, so that every parameter has a gradient from the first step on.
    fused = initial_model(seed, device, torch.float64, False)
    unfused = unfuse(copy.deepcopy(fused))
    pairs = zip(_fp64_losses(fused, digits), _fp64_losses(unfused, digits), strict=True)
    off = [abs(ours - plain) / abs(plain) for ours, plain in pairs]
    return Parity(float(np.max(off)))  # NaN if one of them is


def _fp64_losses(model: nn.Module, digits: Data) -> list[float]:
    device = next(model.parameters()).device
    preprocess = Preprocess.fit(digits.train)
    optimizer = torch.optim.SGD(model.parameters(), PARITY_LEARNING_RATE)
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(PARITY_STEPS + 1):
        index = order[step * PARITY_BATCH : (step + 1) * PARITY_BATCH]
        images = unit(digits.train.read(index.tolist())).to(device, torch.float64)
        loss = F.cross_entropy(model(preprocess(images)), digits.train.labels[index].to(device))
        losses.append(loss.item())
        if step < PARITY_STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses
