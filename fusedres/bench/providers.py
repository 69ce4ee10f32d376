"""The ways of running ResNet-50 that are timed against each other, by name.

- "fused": FusedResNet50 as it is, by the backend in force ("auto" unless FUSEDRES_BACKEND or
  use_backend says otherwise);
- "unfused": the same network with its children called as plain torch.nn modules, with ReLU and the
  residual add in place as torchvision has them;
- "reference": the ops in plain torch, slow and obvious.

All three start from the same weights, run channels_last and see the same images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres._tensors import autocast
from fusedres.backends import use_backend
from fusedres.models import FusedResNet50
from fusedres.nn import report, unfuse_in_place

PROVIDERS = ("fused", "unfused", "reference")


@dataclass(frozen=True)
class Workload:
    """What a provider runs on.

    Attributes:
        batch, size: images [batch, 3, size, size].
        dtype: of the computation; float32 and float64 are the parameters' dtype too, float16 and
            bfloat16 run under autocast over float32 parameters.
        device: as torch.device takes it.
        num_classes: outputs of the last layer.
        seed: of the weights, the images and the labels.
    """

    batch: int
    size: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    num_classes: int = 1000
    seed: int = 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"batch {self.batch}, {self.size}x{self.size}, {dtype}, {self.device}"


@dataclass(frozen=True)
class Provider:
    """One way of running a workload.

    Attributes:
        name: one of PROVIDERS.
        backend: what runs its convolutions and BatchNorms: a backend's name, or "torch".
        run: does it once.
    """

    name: str
    backend: str
    run: Callable[[], Tensor]


def training_step(name: str, workload: Workload) -> Provider:
    """Forward, backward and an SGD step; `run` returns the loss, a 0-d tensor.

    Raises:
        ValueError: `name` is none of PROVIDERS.
        RuntimeError: the backend asked for by name cannot serve the workload.
    """
    model, images, labels = _build(name, workload)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def run() -> Tensor:
        with _backend_scope(name):
            optimizer.zero_grad()
            with autocast(workload.device, workload.dtype):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        return loss.detach()

    return Provider(name, _backends_of(name, model, workload), run)


def inference(name: str, workload: Workload) -> Provider:
    """Forward in eval mode; `run` returns the logits [batch, num_classes].

    Raises:
        ValueError: `name` is none of PROVIDERS.
        RuntimeError: the backend asked for by name cannot serve the workload.
    """
    model, images, _ = _build(name, workload)
    model.eval()

    def run() -> Tensor:
        with (
            torch.inference_mode(),
            _backend_scope(name),
            autocast(workload.device, workload.dtype),
        ):
            return model(images)

    return Provider(name, _backends_of(name, model, workload), run)


def _build(name: str, workload: Workload) -> tuple[nn.Module, Tensor, Tensor]:
    if name not in PROVIDERS:
        accepted = ", ".join(map(repr, PROVIDERS))
        raise ValueError(f"provider: got {name!r}, accepted: {accepted}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(workload.seed)
        model: nn.Module = FusedResNet50(workload.num_classes)
        images = torch.randn(workload.batch, 3, workload.size, workload.size)
        labels = torch.randint(workload.num_classes, (workload.batch,))
    wide = torch.float64 if workload.dtype == torch.float64 else torch.float32
    model.to(workload.device, wide).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = images.to(workload.device, wide, memory_format=torch.channels_last)
    if name == "unfused":
        unfuse_in_place(model)
    return model, images, labels.to(workload.device)


def _backend_scope(name: str) -> contextlib.AbstractContextManager[None]:
    return use_backend("reference") if name == "reference" else contextlib.nullcontext()


def _backends_of(name: str, model: nn.Module, workload: Workload) -> str:
    with _backend_scope(name), autocast(workload.device, workload.dtype):
        return "+".join(sorted({row.backend for row in report(model)}))
