"""From uint8 pictures to what a network reads, on the device they are on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.nn.frames import Normalization, normalized
from fusedres.training.data import Pictures
from fusedres.training.data.crops import DRAWS, random_box

SAMPLE = 4096  # pictures that mean and standard deviation are taken over, at most
SAMPLE_OF_FILES = 1024  # where each has to be decoded for it
AT_ONCE = 2**24  # values read at a time for them
AUGMENTATIONS = ("affine", "affine+flip", "shift", "crop+flip", "none")
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
        crop: share of the sides that is kept of pictures in files that are not trained on.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0

    @classmethod
    def fit(cls, pictures: Pictures) -> Preprocess:
        """Mean and standard deviation over the pictures, or over some of them, evenly spread: up to
        SAMPLE, SAMPLE_OF_FILES where they are not in memory.
        """
        most = SAMPLE_OF_FILES if pictures.whole else SAMPLE
        index = range(0, len(pictures), -(-len(pictures) // most))
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
        mean, std = _columns(tuple(self.mean), tuple(self.std), images.device, images.dtype)
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)

    def frames(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [N, H, W, C] -> standardised [N, C, H, W] in channels_last, in one pass, rounded
        once.
        """
        vectors = _vectors(tuple(self.mean), tuple(self.std), images.device, dtype)
        return normalized(images, vectors, dtype)


# kept, as a GPU would be waited for where they are made
@lru_cache(32)
def _vectors(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the first to ask may be a test
        return Normalization(mean, std).vectors(device, dtype)


@lru_cache(32)
def _columns(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        first, second = (torch.tensor(v, device=device, dtype=dtype) for v in (mean, std))
        return first.view(-1, 1, 1), second.view(-1, 1, 1)


def moved(t: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, without waiting for what that computes."""
    if device.type != "cuda":
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)


def unit(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [N, H, W, C] -> [N, C, H, W] with values from 0 to 1, fp32 or fp64."""
    return images.permute(0, 3, 1, 2).to(dtype) / 255


def draw(augmentation: str, count: int, generator: torch.Generator) -> Tensor:
    """The numbers from 0 to 1 that pictures are augmented by: [count, some], a row for each; on the
    CPU, so that every device sees the same pictures.
    """
    if augmentation == "crop+flip":
        return torch.rand(count, DRAWS, generator=generator)
    return torch.rand(6, count, generator=generator).T


def augmented(images: Tensor, augmentation: str, draws: Tensor) -> Tensor:
    """Each picture turned, scaled, shifted and lit anew, or only shifted, its border repeated
    outwards; or a random part of it at the size of the whole.

    Args:
        images: [N, C, H, W] with values from 0 to 1.
        augmentation: one of AUGMENTATIONS.
        draws: [N, some], of `draw`.
    """
    if augmentation == "none":
        return images
    if augmentation == "crop+flip":
        return _sampled(images, _rows_of_parts(draws, images.shape[2], images.shape[3]))
    count, _, height, width = images.shape
    spread = draws.T * 2 - 1  # each -1 to 1
    angle, zoom = spread[0] * ANGLE, 1 + spread[1] * ZOOM
    x, y = spread[2] * SHIFT, spread[3] * SHIFT
    brightness, mirror = spread[4] * BRIGHTNESS, torch.ones(count)
    if augmentation == "affine+flip":
        mirror = torch.where(spread[5] < 0, -1.0, 1.0)
    if augmentation == "shift":
        angle, zoom, brightness = torch.zeros(count), torch.ones(count), torch.zeros(count)
    cos, sin = angle.cos(), angle.sin()
    rows = (
        torch.stack((zoom * cos * mirror, -zoom * sin * (height / width), 2 * x), 1),
        torch.stack((zoom * sin * mirror * (width / height), zoom * cos, 2 * y), 1),
    )
    lit = moved(brightness.view(-1, 1, 1, 1), images.device).to(images.dtype)
    return _sampled(images, torch.stack(rows, 1)) + lit


def _rows_of_parts(draws: Tensor, height: int, width: int) -> Tensor:
    """[N, 2, 3], as _sampled takes them, for the parts of crops.random_box."""
    rows = []
    for row in draws.tolist():
        left, top, right, bottom, mirrored = random_box((height, width), row)
        across = (left - right) if mirrored else (right - left)
        rows.append([[across, 0.0, left + right - 1], [0.0, bottom - top, top + bottom - 1]])
    return torch.tensor(rows)


def _sampled(images: Tensor, rows: Tensor) -> Tensor:
    """Pictures moved; rows [N, 2, 3] map from where a value goes to where it comes from, a picture
    spanning -1 to 1.
    """
    theta = moved(rows, images.device).to(images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
