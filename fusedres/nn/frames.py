"""From the uint8 images of a camera to what a network was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

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
    """uint8 [N, H, W, C] -> [N, C, H, W] in channels_last, in one pass, rounded once."""
    scale, shift = vectors
    out = torch.empty(images.shape, dtype=dtype, device=images.device)
    return torch.addcmul(shift, images, scale, out=out).permute(0, 3, 1, 2)


class FromPixels(nn.Module):
    """Pixels, of values from 0 to 255, to what a network takes: less a mean for each channel.

    A step in front of a network whose images were centred before they were padded, which its first
    convolution cannot do: there the border is zero. It has no entry in a state_dict. What is
    subtracted stays exact in half types.

    Args:
        mean: of each channel, in the pixels' order; zeros to subtract nothing.

    Raises:
        TypeError, ValueError: mean that is no finite number for each channel.
    """

    mean: Tensor

    def __init__(self, mean: Sequence[float]) -> None:
        super().__init__()
        numbers = isinstance(mean, Sequence) and all(
            isinstance(m, int | float) and not isinstance(m, bool) for m in mean
        )
        if not numbers:
            raise TypeError(f"FromPixels: mean must be a number for each channel, got {mean!r}")
        if len(mean) == 0 or not all(abs(m) < 1e6 for m in mean):
            raise ValueError(f"FromPixels: mean must be finite, of 1 channel or more, got {mean!r}")
        self.values = tuple(map(float, mean))
        self.centres = any(self.values)
        self.dtype = torch.get_default_dtype()  # of what it makes of uint8
        self.register_buffer("mean", self._mean(torch.empty(0)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """uint8 [N, H, W, C] or floats [N, C, H, W] in any memory format -> [N, C, H, W] in
        channels_last, of the floats' dtype, for uint8 that of the network.

        Raises:
            TypeError, ValueError: another dtype, other dimensions or channels.
        """
        frames = x.dtype == torch.uint8
        if not frames and not x.is_floating_point():
            raise TypeError(
                "FromPixels: pixels must be uint8 [N, H, W, C] or floats [N, C, H, W], got "
                f"{x.dtype}"
            )
        channels = len(self.values)
        if x.dim() != 4 or x.size(3 if frames else 1) != channels:
            shape = f"uint8 [N, H, W, {channels}]" if frames else f"[N, {channels}, H, W]"
            raise ValueError(f"FromPixels: pixels must be {shape}, got {list(x.shape)}")
        dtype = self.dtype if frames else x.dtype
        x = x.permute(0, 3, 1, 2) if frames else x
        x = x - self.mean if self.centres else x
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    def normalization(self) -> Normalization:
        """From uint8 images to the floats that it takes: their values as they are."""
        return Normalization((0.0,) * len(self.values), (1 / 255,) * len(self.values))

    def extra_repr(self) -> str:
        return ", ".join(f"{m:g}" for m in self.values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As any module; but the mean is kept in fp32 where the network is of a half type."""
        like = fn(torch.empty(0, dtype=self.dtype, device=self.mean.device))
        super()._apply(fn, recurse)
        self.dtype, self.mean = like.dtype, self._mean(like)
        return self

    def _mean(self, like: Tensor) -> Tensor:
        """[C, 1, 1], on its device."""
        mean = torch.tensor(self.values, dtype=stat_dtype(like.dtype), device=like.device)
        return mean.view(-1, 1, 1)
