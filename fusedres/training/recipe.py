"""How to train: what changes the weights a run ends with, apart from data and model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from fusedres.training.files import TrainingError
from fusedres.training.preprocess import AUGMENTATIONS

OPTIMIZERS = ("adamw", "sgd")
LEARNING_RATE = {"sgd": 0.05, "adamw": 2e-3}
WEIGHT_DECAY = {"sgd": 5e-4, "adamw": 0.05}
SCHEDULES = ("cosine", "step")
STEP_FALLS = 3  # parts of a run between which the schedule "step" divides the rate by 10
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


@dataclass(frozen=True)
class Recipe:
    """Choices of a training run.

    Args:
        epochs: times through the training pictures.
        batch_size: pictures a step in each process, from 2 up, as BatchNorm needs more than one; in
            all processes together at most as many as there are.
        optimizer: "adamw", or "sgd" (momentum 0.9).
        nesterov: whether the momentum of "sgd" is Nesterov's.
        lr: learning rate at its peak. None: LEARNING_RATE of the optimizer, for a batch of 32.
        weight_decay: None: WEIGHT_DECAY of the optimizer.
        schedule: "cosine": the learning rate falls from its peak to zero along a cosine; "step": it
            is divided by 10 after a third of the steps and again after two.
        warmup: share of the steps over which the learning rate rises to its peak, along a cosine.
            With "step" it rises beside the falls, in a straight line.
        label_smoothing: of the cross-entropy, from 0 up to 1.
        augment: "affine" (turned, scaled, shifted, lit anew at each reading), "affine+flip"
            (mirrored, too, every other time), "shift", "crop+flip" (a random part of the picture,
            as is usual for ImageNet; of pictures in files it is cut out before they are scaled) or
            "none".
        amp: "bf16", "fp16" or "off" (dtype); "auto": bf16 where the device computes in it natively.
        dtype: of the parameters, "fp32" or "fp64": everything in double precision, to compare runs;
            needs amp "auto" or "off".
        sync_bn: whether BatchNorm takes its statistics over the batches of all processes.
        compile: whether torch.compile compiles the model.
        seed: of batches and augmentation, and of the weights where `train` makes the model.

    Raises:
        TrainingError: an argument out of range, named.
    """

    epochs: int = 40
    batch_size: int = 32
    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    warmup: float = 0.2
    schedule: str = "cosine"
    nesterov: bool = True
    label_smoothing: float = 0.1
    augment: str = "affine"
    amp: str = "auto"
    dtype: str = "fp32"
    sync_bn: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (("epochs", 1), ("batch_size", 2), ("seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not minimum <= value < 2**63:
                raise TrainingError(f"{name} must be an integer from {minimum} up, got {value!r}")
        for name, accepted in (
            ("optimizer", OPTIMIZERS),
            ("augment", AUGMENTATIONS),
            ("amp", ("auto", *AMP)),
            ("dtype", tuple(DTYPES)),
            ("schedule", SCHEDULES),
        ):
            if getattr(self, name) not in accepted:
                names = ", ".join(accepted)
                raise TrainingError(f"{name} must be one of {names}, got {getattr(self, name)!r}")
        if self.dtype == "fp64" and self.amp not in ("auto", "off"):
            raise TrainingError(f"dtype fp64 needs amp off, got amp {self.amp}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise TrainingError(f"lr must be above 0, got {self.lr}")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise TrainingError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if not 0 <= self.warmup <= 1:
            raise TrainingError(f"warmup is a share of the steps, from 0 to 1, got {self.warmup}")
        if not 0 <= self.label_smoothing < 1:
            raise TrainingError(
                f"label_smoothing must be from 0 up to, but not, 1, got {self.label_smoothing}"
            )

    @property
    def peak_lr(self) -> float:
        """lr, or the optimizer's own."""
        return LEARNING_RATE[self.optimizer] if self.lr is None else self.lr

    def computes_in(self, device: torch.device) -> torch.dtype:
        """The dtype of the parameters, or the half type that autocast computes in on the device."""
        if self.dtype != "fp32":
            return DTYPES[self.dtype]
        if self.amp != "auto":
            return AMP[self.amp]
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = device.type == "cpu" and _cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over all parameters of the model."""
        decay = self.weight_decay
        decay = WEIGHT_DECAY[self.optimizer] if decay is None else decay
        if self.optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), self.peak_lr, weight_decay=decay)
        return torch.optim.SGD(
            model.parameters(),
            self.peak_lr,
            momentum=0.9,
            nesterov=self.nesterov,
            weight_decay=decay,
        )

    def make_schedule(
        self, optimizer: torch.optim.Optimizer, steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate over so many steps."""
        if self.schedule == "step":
            return torch.optim.lr_scheduler.LambdaLR(optimizer, _Falls(steps, self.warmup * steps))
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.peak_lr,
            total_steps=max(steps, 2),  # of a single step torch would take the last, slowest rate
            # a rise of one step or less is none, and torch would divide by its length less one
            pct_start=float(self.warmup) if self.warmup * steps > 1 else 0.0,
            cycle_momentum=False,
        )


class _Falls:
    """The share of the peak at a step."""

    def __init__(self, steps: int, rise: float) -> None:
        self.steps, self.rise = steps, rise

    def __call__(self, step: int) -> float:
        falls = min(STEP_FALLS * step // self.steps, STEP_FALLS - 1)
        return min(1.0, (step + 1) / max(self.rise, 1.0)) * 0.1**falls


def _cpu_has_bf16() -> bool:
    """Whether the CPU has instructions for bf16; torch says so under names that may change."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
