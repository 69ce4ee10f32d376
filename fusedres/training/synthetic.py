"""The training step by itself, without pictures to wait for."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from fusedres.training.checkpoint import Network
from fusedres.training.data import ArrayPictures, Data
from fusedres.training.preprocess import Preprocess
from fusedres.training.processes import Processes
from fusedres.training.recipe import Recipe
from fusedres.training.trainer import Trainer

SIZE, CLASSES, STEPS = 224, 1000, 50
WARMUP = 10  # steps before those that are timed: kernels are compiled, memory is found


@dataclass(frozen=True)
class Speed:
    """How fast steps are.

    Attributes:
        img_per_s: pictures a second, of all processes together.
        step_ms: a step's time.
        steps, batch_size, size, processes, amp: of what; batch_size that of all processes together.
        memory_gib: most that was allocated on this process's GPU; 0 on a CPU.
    """

    img_per_s: float
    step_ms: float
    steps: int
    batch_size: int
    size: int
    processes: int
    amp: str
    memory_gib: float


def synthetic(
    recipe: Recipe,
    *,
    model: str = "resnet50",
    variant: str = "torchvision",
    size: int = SIZE,
    steps: int = STEPS,
    device: torch.device | str = "cpu",
) -> Speed:
    """Time the steps that `train` takes, on pictures of noise that are on the device already; in
    this process or in all that torch's default group joins.

    Args:
        recipe: as for `train`; augment "none" leaves the step of the network, the optimizer and the
            normalisation of uint8 pictures, which is what "crop+flip" leaves to the device.
        model, variant: as for `train`.
        size: of the pictures, in pixels a side.
        steps: timed, after WARMUP others.
        device: where.

    Raises:
        TrainingError: as `train`. LostProcessError: another process has ended.
    """
    device = torch.device(device)
    processes = Processes.current()
    recipe = replace(recipe, epochs=WARMUP + steps)
    with processes.noticing_loss(lambda: "nothing was to be kept"):
        torch.manual_seed(recipe.seed)
        network = Network(model, variant, CLASSES, 3)
        trainer = Trainer(
            network.build(),
            _noise(recipe.batch_size * processes.count, size),
            recipe,
            device=device,
            preprocess=Preprocess((size, size), (0.5,) * 3, (0.25,) * 3),
            processes=processes,
        )
        trainer.model.train()
        ((images, labels),) = trainer.loader
        images, labels = images.to(device), labels.to(device)
        for _ in range(WARMUP):
            trainer.train_step(images, labels)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = _now(trainer)
        for _ in range(steps):
            trainer.train_step(images, labels)
        seconds = _now(trainer) - start
        trainer.check_finite()
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return Speed(
        img_per_s=steps * trainer.batch_size / seconds,
        step_ms=1e3 * seconds / steps,
        steps=steps,
        batch_size=trainer.batch_size,
        size=size,
        processes=processes.count,
        amp=str(trainer.dtype).removeprefix("torch."),
        memory_gib=memory,
    )


def _noise(count: int, size: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(256, (1, size, size, 3), dtype=torch.uint8, generator=generator)
    images = one.expand(count, -1, -1, -1)  # a process takes its part of it
    pictures = ArrayPictures(images, torch.arange(count) % CLASSES)
    return Data(pictures, pictures, tuple(map(str, range(CLASSES))), "synthetic")


def _now(trainer: Trainer) -> float:
    """The time at which the device has done all that it was given."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter()
