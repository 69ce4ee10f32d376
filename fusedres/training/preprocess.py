"""From uint8 pictures to what a network reads, on the device they are on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.training.data import Pictures

SAMPLE = 4096  # pictures that mean and standard deviation are taken over, at most
AT_ONCE = 2**24  # values read at a time for them
AUGMENTATIONS = ("affine", "affine+flip", "shift", "none")
ANGLE = math.radians(15)
ZOOM = 0.15
SHIFT = 0.15  # of the picture's width and height
BRIGHTNESS = 0.2


@dataclass(frozen=True)
class Preprocess:
    """Standardises pictures by the mean and standard deviation of those trained on.

    Attributes:
        size: (H, W) of the pictures.
        mean, std: one a channel, for values from 0 to 1.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, pictures: Pictures) -> Preprocess:
        """Mean and standard deviation over the pictures, or SAMPLE of them evenly spread."""
        index = range(0, len(pictures), -(-len(pictures) // SAMPLE))
        height, width = pictures.size
        at_once = max(1, AT_ONCE // (height * width * pictures.channels))
        count = 0
        mean = m2 = torch.zeros(pictures.channels, dtype=torch.float64)
        for start in range(0, len(index), at_once):  # merged by Chan's formula
            values = unit(pictures.read(index[start : start + at_once])).to(torch.float64)
            n = values.numel() // pictures.channels
            part_var, part_mean = torch.var_mean(values, (0, 2, 3), correction=0)
            shift = part_mean - mean
            m2 = m2 + part_var * n + shift**2 * (count * n / (count + n))
            mean = mean + shift * (n / (count + n))
            count += n
        std = (m2 / count).sqrt().clamp(min=1e-3)
        return cls(pictures.size, tuple(mean.tolist()), tuple(std.tolist()))

    @property
    def channels(self) -> int:
        """Of the pictures."""
        return len(self.mean)

    def __call__(self, images: Tensor) -> Tensor:
        """[N, C, H, W] with values from 0 to 1 -> standardised, channels_last."""
        mean, std = (images.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def unit(images: Tensor) -> Tensor:
    """uint8 [N, H, W, C] -> fp32 [N, C, H, W] with values from 0 to 1."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 255


def augmented(images: Tensor, augmentation: str, generator: torch.Generator) -> Tensor:
    """Each picture turned, scaled, shifted and lit anew, or only shifted; its border is repeated
    outwards.

    Args:
        images: [N, C, H, W] with values from 0 to 1.
        augmentation: one of AUGMENTATIONS.
        generator: of a CPU, so that every device sees the same pictures.
    """
    if augmentation == "none":
        return images
    count, _, height, width = images.shape
    draws = torch.rand(6, count, generator=generator) * 2 - 1  # each -1 to 1
    angle, zoom, x, y = draws[0] * ANGLE, 1 + draws[1] * ZOOM, draws[2] * SHIFT, draws[3] * SHIFT
    brightness, mirror = draws[4] * BRIGHTNESS, torch.ones(count)
    if augmentation == "affine+flip":
        mirror = torch.where(draws[5] < 0, -1.0, 1.0)
    if augmentation == "shift":
        angle, zoom, brightness = torch.zeros(count), torch.ones(count), torch.zeros(count)
    cos, sin = angle.cos(), angle.sin()
    # rows of the map from where a value goes to where it comes from, the picture spanning -1 to 1
    rows = (
        torch.stack((zoom * cos * mirror, -zoom * sin * (height / width), 2 * x), 1),
        torch.stack((zoom * sin * mirror * (width / height), zoom * cos, 2 * y), 1),
    )
    theta = torch.stack(rows, 1).to(images.device, images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved + brightness.view(-1, 1, 1, 1).to(images.device, images.dtype)
