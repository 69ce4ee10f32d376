"""What `fusedres bench` measures: the jobs of each suite, at sizes that fit the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fusedres.bench.convolutions import conv_cases
from fusedres.bench.harness import cache_bytes, keep_freed_memory
from fusedres.bench.light import light_cases
from fusedres.bench.measure import Job, Measured, Setting, measure_ceilings
from fusedres.bench.networks import BLOCKS, network_job
from fusedres.bench.ops import op_job
from fusedres.bench.providers import SLOW_TO_COMPILE, Workload, default_names
from fusedres.bench.rows import environment

SUITES = ("ops", "blocks", "model")
_SIZES = {"1": (56, 56), "2": (56, 28), "3": (28, 14), "4": (14, 7)}  # ConvBlock's, IdentityBlock's


def prepare(device: torch.device) -> None:
    """Set this process up as one that is measured: cuDNN tries its algorithms out, malloc keeps
    what was freed.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()


def setting_for(
    device: torch.device,
    quick: bool = False,
    wanted: Sequence[str] = (),
    commit: str | None = None,
) -> Setting:
    """How long to measure on a device; `commit` where the source tree cannot say it."""
    where = environment(device)
    if commit is not None:
        where["commit"] = commit
    if device.type == "cuda":
        rounds, budget, seconds = (10, 3.0, 1e-3) if quick else (30, 8.0, 4e-3)
    else:
        rounds, budget, seconds = (7, 10.0, 5e-3) if quick else (15, 60.0, 5e-2)
    return Setting(
        device, rounds, budget, seconds, cache_bytes(device), where, wanted=tuple(wanted)
    )


def jobs_of(
    suite: str,
    setting: Setting,
    dtype: torch.dtype,
    batches: Sequence[int] = (),
    quick: bool = False,
    only: str = "",
) -> list[Job]:
    """The jobs of a suite in the order they run.

    Args:
        suite: one of SUITES.
        batches: instead of the suite's own.
        quick: fewer sizes and providers.
        only: jobs whose title holds this text.

    Raises:
        ValueError: another suite.
    """
    if suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, accepted: {', '.join(SUITES)}")
    make: dict[str, Callable[..., list[Job]]] = {"ops": _ops, "blocks": _blocks, "model": _model}
    found = make[suite](setting, dtype, tuple(batches), quick)
    return [job for job in found if only in job.title]


def with_ceilings(setting: Setting, dtype: torch.dtype) -> tuple[Setting, list[Measured]]:
    """The setting, with what the device reaches in this dtype, and its rows."""
    ceilings, rows = measure_ceilings(setting, dtype)
    return replace(setting, ceilings={**setting.ceilings, dtype: ceilings}), rows


def _ops(setting: Setting, dtype: torch.dtype, batches: tuple[int, ...], quick: bool) -> list[Job]:
    convolved = batches or ((256,) if setting.on_gpu else (2,) if quick else (16,))
    batches = batches or ((256, 32) if setting.on_gpu and not quick else convolved)
    directions = ("fwd", "bwd") if quick else ("fwd", "dgrad", "wgrad", "bwd")
    cases = light_cases(setting.device, dtype, batches, quick)
    cases += conv_cases(setting.device, dtype, convolved, directions)
    return [op_job(case, setting) for case in cases]


def _blocks(
    setting: Setting, dtype: torch.dtype, batches: tuple[int, ...], quick: bool
) -> list[Job]:
    batches = batches or ((256,) if setting.on_gpu else (2,) if quick else (16,))
    return [
        network_job(work, setting, default_names(work, quick))
        for batch in batches
        for work in (_block(name, batch, dtype, setting) for name in BLOCKS)
    ]


def _block(name: str, batch: int, dtype: torch.dtype, setting: Setting) -> Workload:
    kind, stage = name.split()
    size = _SIZES[stage][kind == "IdentityBlock"]
    return Workload(batch, size, dtype, str(setting.device), block=name)


def _model(
    setting: Setting, dtype: torch.dtype, batches: tuple[int, ...], quick: bool
) -> list[Job]:
    training: tuple[int, ...] = (256, 400, 32)
    inference: tuple[int, ...] = (256, 1, 32, 400)
    if not setting.on_gpu:
        training = inference = (1, 16)
    if quick:
        training, inference = ((256,), (1, 256)) if setting.on_gpu else ((4,), (1,))
    found = [
        Workload(batch, 224, dtype, str(setting.device), training=training)
        for training, own in ((True, training), (False, inference))
        for batch in batches or own
    ]
    jobs = [network_job(work, setting, default_names(work, quick)) for work in found]
    if setting.on_gpu and not quick and not setting.wanted:  # what takes minutes to compile, last
        jobs += [network_job(work, setting, SLOW_TO_COMPILE, ", max-autotune") for work in found]
    return jobs
