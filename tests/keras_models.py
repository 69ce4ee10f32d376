"""Networks to be written as Keras would and read again: narrow ones, but where widths decide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fusedres.models import resnet, stages

# stage 1 as wide as it is: there the shortcut has the shape of the last convolution
PLANES = (64, 8, 8, 8)


@contextmanager
def narrowed(blocks: int | None = None) -> Iterator[None]:
    """Networks of few channels while it lasts; of so many blocks a stage, if that is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_PLANES", PLANES)
        if blocks is not None:
            patch.setitem(stages._DEPTHS, 50, (blocks,) * 4)
        yield


def make(depth: int = 50, classes: int = 6, variant: str = "coursera", **options: object):
    """A network of values that every float type has exactly, also less another such one."""
    generator = torch.Generator().manual_seed(depth)

    def whole(t: torch.Tensor, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, t.shape, generator=generator) / 16

    cls = getattr(resnet, f"resnet{depth}")
    with torch.device("meta"):
        model = cls(classes or 1, variant=variant, **options)
    model.to_empty(device="cpu")
    if classes == 0:
        model.reset_classifier(0)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if "num_batches" in name:
                t.zero_()
            else:
                t.copy_(whole(t, 8, 25) if "var" in name else whole(t, -8, 9))
    return model


def calmed(model: nn.Module) -> nn.Module:
    """With values scaled so that activations stay of order 1, and the image counts to the end."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight *= 5.0 / module.weight[0].numel() ** 0.5
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.abs_().add_(0.5)
    return model


def assert_images_count(logits: torch.Tensor) -> None:
    """Else the beginning of the network would be compared with nothing."""
    assert (logits[0] - logits[1]).abs().max() > 0.05 * logits.abs().max()
