"""Data and networks small enough to train in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fusedres
from fusedres.training.data import ArrayPictures, Data

SIDE = 32
CLASSES = ("blue", "green", "red")


def pictures(count: int, seed: int = 0, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """uint8 [N, H, W, 3] and int64 [N]: noise, with the channel of the label brighter."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 128, (count, side, side, 3), generator=generator)
    labels = torch.arange(count) % 3
    images[torch.arange(count), :, :, 2 - labels] += 100
    return images.to(torch.uint8), labels


def data(train: int = 26, test: int = 12) -> Data:
    """Three classes that one convolution can tell apart."""
    parts = [ArrayPictures(*pictures(train)), ArrayPictures(*pictures(test, seed=1))]
    return Data(parts[0], parts[1], CLASSES, "tiny")


def model(seed: int = 0) -> nn.Module:
    """A fused block, dropout and a classifier."""
    torch.manual_seed(seed)
    return nn.Sequential(
        fusedres.ConvBNReLU(3, 8, 3, stride=4),
        fusedres.IdentityBlock(8, (4, 4, 8)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8, 3),
    )


def write_npz(path: Path, train: int = 26, test: int = 12, side: int = SIDE) -> Path:
    """The pictures as an .npz by Keras's names."""
    arrays = {}
    for part, count, seed in (("train", train, 0), ("test", test, 1)):
        images, labels = pictures(count, seed, side)
        arrays |= {f"x_{part}": images.numpy(), f"y_{part}": labels.numpy()}
    np.savez(path, classes=np.array(CLASSES), **arrays)
    return path
