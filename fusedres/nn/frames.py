"""From the uint8 images of a camera to what a network was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fusedres._tensors import stat_dtype


class Normalization(NamedTuple):
    """From uint8 images to what a model was trained on: u/255 less mean, over std, a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, mean: object, std: object) -> Self | None:
        """Checked; None where neither is given."""
        if mean is None and std is None:
            return None
        values: dict[str, Any] = {"mean": mean, "std": std}
        for name, given in values.items():
            if not isinstance(given, Sequence) or not all(
                isinstance(v, int | float) and not isinstance(v, bool) for v in given
            ):
                raise TypeError(
                    f"freeze: {name} must be a number for each channel, got {given!r}"
                    + ("; mean and std come together" if given is None else "")
                )
        means, stds = (tuple(map(float, given)) for given in values.values())
        if len(means) != len(stds) or not means:
            raise ValueError(
                f"freeze: mean and std must be of as many channels, got {len(means)} and "
                f"{len(stds)}"
            )
        if not all(0 < s < float("inf") for s in stds) or not all(abs(m) < 1e6 for m in means):
            raise ValueError(
                f"freeze: mean must be finite, std above 0, got {list(means)} and {list(stds)}"
            )
        return cls(means, stds)

    def vectors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[C] each, for images to be of that dtype: what u is multiplied by, and what is added."""
        options = {"dtype": stat_dtype(dtype), "device": device}
        scale = torch.tensor([1 / (255 * s) for s in self.std], **options)  # type: ignore[arg-type]
        shift = [-m / s for m, s in zip(self.mean, self.std, strict=True)]
        return scale, torch.tensor(shift, **options)  # type: ignore[arg-type]

    def check(self, name: str, images: Tensor) -> None:
        """Raises ValueError where uint8 images are not [N, H, W, C] of so many channels."""
        channels = len(self.mean)
        if images.dim() != 4 or images.size(3) != channels:
            raise ValueError(
                f"{name}: uint8 images must be [N, H, W, {channels}], got {list(images.shape)}"
            )


def normalized(images: Tensor, vectors: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """uint8 [N, H, W, C] -> [N, C, H, W] in channels_last, rounded once."""
    scale, shift = vectors
    return torch.addcmul(shift, images.to(scale.dtype), scale).to(dtype).permute(0, 3, 1, 2)
