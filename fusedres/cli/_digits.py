"""What the demo does: scikit-learn's handwritten digits, a training loop, the fp64 parity check."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres.bench.providers import autocast, unfuse_in_place
from fusedres.models import FusedResNet50

CLASSES = 10
SIZE = 32  # pixels; the digits come as 8x8
LEARNING_RATE = 3e-3  # AdamW's, at its peak: it rises for a third of the steps, then falls to zero
LABEL_SMOOTHING = 0.1
SHIFT = 3  # pixels at most, each way, each training image anew
PARITY_STEPS = 3
PARITY_BATCH = 32
# Of plain SGD: a step still moves the loss visibly, the gradient of a new network being that large.
# Larger rates magnify rounding a hundredfold per step, between runs of plain PyTorch as well: they
# would show how chaotic training is, not whether gradients agree.
PARITY_LEARNING_RATE = 1e-6
PARITY_LIMIT = 1e-9


@dataclass(frozen=True)
class Digits:
    """Images [N, 3, 32, 32] in fp32 channels_last and labels [N], for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


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


def load(device: torch.device, train: int = 1437, test: int = 360) -> Digits:
    """The digits, 8x8 grey to 32x32 RGB, standardised by the training images; one fixed split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    grey = torch.from_numpy(data.images).to(torch.float32).unsqueeze(1)  # [1797, 1, 8, 8], 0 to 16
    images = F.interpolate(grey, size=(SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)
    train_index, test_index = train_test_split(
        range(len(images)), train_size=train, test_size=test, stratify=data.target, random_state=0
    )
    images = (images - images[train_index].mean()) / images[train_index].std()
    images = images.to(device, memory_format=torch.channels_last)
    labels = torch.from_numpy(data.target).to(device, torch.int64)
    return Digits(images[train_index], labels[train_index], images[test_index], labels[test_index])


def initial_model(
    seed: int, device: torch.device, dtype: torch.dtype, zero_init_residual: bool
) -> nn.Module:
    """FusedResNet50 for ten classes; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = FusedResNet50(CLASSES, variant="torchvision", zero_init_residual=zero_init_residual)
    return model.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def batches(count: int, batch_size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices, a full batch at a time, shuffled anew in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch_size].split(batch_size)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [C, H, W] moved by up to SHIFT pixels each way, its border repeated."""
    count, _, height, width = images.shape
    by = torch.randint(-SHIFT, SHIFT + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + by[0]).clamp(0, height - 1).to(images.device)
    columns = (torch.arange(width) + by[1]).clamp(0, width - 1).to(images.device)
    which = torch.arange(count, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def train(
    model: nn.Module,
    digits: Digits,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    dtype: torch.dtype,
    name: str,
) -> Training:
    """Train with AdamW under a progress bar, then test."""
    from tqdm import tqdm

    count, device = len(digits.train_images), digits.train_images.device
    batch_size = min(batch_size, count)
    steps = epochs * (count // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    moves = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    start = time.perf_counter()
    with tqdm(total=steps, desc=name, unit="step", mininterval=0.5) as bar:
        for index in batches(count, batch_size, epochs, seed):
            index = index.to(device)
            images, labels = digits.train_images[index], digits.train_labels[index]
            images = shifted(images, moves)
            optimizer.zero_grad()
            with autocast(device, dtype):
                logits = model(images.contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            right = (logits.argmax(1) == labels).double().mean().item()
            speed = len(losses) * batch_size / (time.perf_counter() - start)
            bar.set_postfix_str(
                f"loss {losses[-1]:.3f}, accuracy {right:.0%}, {speed:.0f} img/s", refresh=False
            )
            bar.update()
    accuracy = evaluate(model, digits, dtype)
    return Training(losses, accuracy, time.perf_counter() - start)


@torch.inference_mode()
def evaluate(model: nn.Module, digits: Digits, dtype: torch.dtype) -> float:
    """Accuracy on the test images, 0 to 1."""
    model.eval()
    right = 0
    with autocast(digits.test_images.device, dtype):
        for images, labels in zip(
            digits.test_images.split(120), digits.test_labels.split(120), strict=True
        ):
            logits = model(images.contiguous(memory_format=torch.channels_last))
            right += int((logits.argmax(1) == labels).sum())
    return right / len(digits.test_labels)


def parity(digits: Digits, seed: int) -> Parity:
    """Hold fused against unfused in fp64.

    Both start from the same weights and take PARITY_STEPS steps of SGD on the same batches; their
    losses are compared before each step and after the last.
    """
    # No branch starts at zero, so that every parameter has a gradient from the first step on.
    fused = initial_model(seed, digits.train_images.device, torch.float64, False)
    unfused = unfuse_in_place(copy.deepcopy(fused))
    pairs = zip(_fp64_losses(fused, digits), _fp64_losses(unfused, digits), strict=True)
    off = [abs(ours - plain) / abs(plain) for ours, plain in pairs]
    return Parity(float(np.max(off)))  # NaN if one of them is


def _fp64_losses(model: nn.Module, digits: Digits) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), PARITY_LEARNING_RATE)
    losses = []
    for step in range(PARITY_STEPS + 1):
        part = slice(step * PARITY_BATCH, (step + 1) * PARITY_BATCH)
        images = digits.train_images[part].to(torch.float64, memory_format=torch.channels_last)
        loss = F.cross_entropy(model(images), digits.train_labels[part])
        losses.append(loss.item())
        if step < PARITY_STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses
