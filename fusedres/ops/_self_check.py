"""Whether the kernels of the plan "fused+wgmma" compute on a GPU what the split plan does: what
they have to pass there before anything may run on them. `backends.wgmma_problem` asks once a
process.

Values lie on a grid and none comes near ReLU's kink, so that all masks agree and errors are of
rounding. Against fp64, the split plan's kernels and the library's in fp64, an element may be off by
FACTOR times what the split plan is, and FLOOR of the largest. The kernels come first: memory then
holds nothing that could pass for their result. They run twice, to the same bits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fusedres import backends
from fusedres._conv import Conv, Source, Upstream
from fusedres.ops import _conv_bn_ops

FACTOR, FLOOR = 2.0, 1e-2
_CONV = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)
_EPS = 1e-5
Results = dict[str, Tensor]


class Case(NamedTuple):
    """A convolution with its BatchNorm, forward and backward."""

    shape: tuple[int, int, int, int]  # [N, C, H, W]
    filters: int
    residual: str = ""  # "tensor", "normalised"
    deferred: bool = True
    relu: bool = True
    emit: bool = False
    training: bool = True
    masked: bool = True  # the gradient that comes; else it is yet to be
    step: int = 1  # between the pixels whose gradient joins, where one does

    def __str__(self) -> str:
        changed = [f"{f}={v}" for f, v in zip(self._fields[2:], self[2:], strict=True)]
        default = [f"{f}={v}" for f, v in self._field_defaults.items()]
        sizes = f"{'x'.join(map(str, self.shape))} to {self.filters} channels"
        return ", ".join([sizes, *(c for c in changed if c not in default)])


# rows that fill no tile, one tile and several of a block; channels in and out in one tile and more
CASES = (
    Case((3, 64, 13, 11), 64, deferred=False, emit=True),
    Case((1, 64, 3, 5), 64, relu=False, training=False),
    Case((2, 320, 13, 11), 128, masked=False),
    Case((3, 64, 13, 11), 256, "tensor", emit=True),
    Case((3, 320, 7, 9), 512, "normalised", emit=True, step=2),
    Case((2, 128, 9, 7), 192, "normalised"),
)


def cases(multiprocessors: int) -> tuple[Case, ...]:
    """CASES, and more tiles of rows than the device has multiprocessors: a block then has several,
    and makes all pieces of their columns itself, of a tile that it keeps or one that does not fit
    (tests/cuda_emulator/plans.cpp holds these sizes to that).
    """
    rows = 128 * (multiprocessors + 2) + 77
    return (
        *CASES,
        Case((1, 64, rows, 1), 128),
        Case((1, 128, rows, 1), 512, "normalised", emit=True),
        Case((1, 512, rows, 1), 128, masked=False),
        Case((1, 256, rows, 1), 1024),
        Case((1, 1024, rows, 1), 512),
    )


def _multiprocessors(device: torch.device) -> int:
    """3 of what stands in for a GPU."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def problem(device: torch.device) -> str | None:
    """What is wrong on a device, which is logged too; None where nothing is.

    Raises:
        torch.OutOfMemoryError: the device has no room for the check now.
    """
    try:
        with _aside(device):
            reason = next(_wrong(device), None)
    except torch.OutOfMemoryError:
        raise  # which says nothing of the kernels
    except Exception as error:  # of a launch, most likely
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return None
    reason = f"its self-check failed: {reason}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    logging.getLogger("fusedres").warning("plan 'fused+wgmma' is off on %s: %s", name, reason)
    return reason


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """A scope in which tensors are real and plain, whatever surrounds it."""
    search = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # which takes longer than all that runs here
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            _disable_current_modes(),
        ):
            yield
    finally:
        torch.backends.cudnn.benchmark = search


def _wrong(device: torch.device) -> Iterator[str]:
    """What disagrees, in words."""
    for dtype in (torch.bfloat16, torch.float16):
        for number, case in enumerate(cases(_multiprocessors(device))):
            t = _inputs(case, dtype, device, number)
            where = f"{str(dtype).removeprefix('torch.')}, {case}"
            ours, again = (_run(case, dict(t), "fused+wgmma") for _ in range(2))
            peer, truth = _run(case, dict(t), "split"), _run(case, _wide(t), "split")
            for name, true in truth.items():
                if not torch.equal(ours[name], again[name]):  # or not a number
                    yield f"{name} of {where}: two runs differ"
                off, allowed = _distance(ours[name], true), _distance(peer[name], true)
                scale = float(true.abs().max())
                if not off <= FACTOR * allowed + FLOOR * scale:
                    yield (
                        f"{name} of {where}: off by {off:.2e}, the split plan by {allowed:.2e}, "
                        f"of up to {scale:.2e}"
                    )


def _distance(result: Tensor, truth: Tensor) -> float:
    if result.shape != truth.shape:
        return float("inf")
    return float((result.double() - truth).abs().max())


def _inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    """The tensors of both directions, by name."""
    generator = torch.Generator(device).manual_seed(seed)
    (n, channels, height, width), filters = case.shape, case.filters

    def integers(most: int, *shape: int) -> Tensor:
        """From -most to most."""
        options: dict[str, Any] = {"generator": generator, "device": device}
        return torch.randint(-most, most + 1, shape, dtype=torch.float32, **options)

    def full(count: int, high: int = height, wide: int = width) -> Tensor:
        values = integers(16, n, count, high, wide).div_(8).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    def affine(count: int, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """mean, scale and bias: (x - mean)*scale in sixteenths, of which `offset` is none."""
        powers = torch.pow(2.0, integers(1, count))
        return integers(8, count) / 8, powers, integers(8, count) / 16 + offset

    weight = integers(64, filters, channels, 1, 1) / (32 * channels**0.5)
    t: dict[str, Any] = {"x": full(channels), "weight": weight.to(dtype)}
    if case.deferred:
        t |= zip(("mean", "scale", "bias"), affine(channels, 1 / 32), strict=True)
    if case.residual:
        t["residual"] = full(channels)
    if case.residual == "normalised":
        t |= zip(("res_mean", "res_scale", "res_bias"), affine(channels), strict=True)
    t |= zip(("y_mean", "y_scale", "y_bias"), affine(filters, 1 / 32), strict=True)
    t |= {"y": full(filters), "g": full(filters), "y_rstd": t["y_scale"].abs() + 0.25}
    t["sums"] = integers(8, 2, filters) * (n * height * width / 32)
    t |= {"running_mean": integers(8, filters) / 8, "running_var": t["y_rstd"] + 1.0}
    if case.emit:
        t["grad_a"] = full(channels, -(-height // case.step), -(-width // case.step))
        if case.deferred:
            t["a"] = backends.kernels("cuda", "bn_act").bn_act_fwd(*_source(case, t))
    return t


def _source(case: Case, t: dict[str, Any]) -> Source:
    tensors: Any = [t.get(name) for name in Source._fields[:-1]]
    return Source._make([*tensors, case.relu and case.deferred])


def _wide(t: dict[str, Any]) -> dict[str, Any]:
    return {name: v.double() for name, v in t.items()}


def _run(case: Case, t: dict[str, Any], plan: str) -> Results:
    """What both directions give; as much of it as the case has."""
    source = _source(case, t)
    running = t["running_mean"].clone(), t["running_var"].clone()
    norm = (t["y_scale"], t["y_bias"], *running, case.training, 0.25, None, _EPS)
    conv = (t["weight"], None, *_CONV)
    emit = case.emit and case.deferred
    forward = _conv_bn_ops.fwd(*source, *conv, emit, *norm, "cuda", plan)
    names = ("y", "mean", "variance", "rstd", "scale", "bias", "activation")
    found = dict(zip(names, forward, strict=False))
    found |= {"running mean": running[0], "running variance": running[1]}
    a = t.get("a")
    if a is not None and case.residual == "tensor":  # which is not kept beside what was emitted
        source = source._replace(residual=None)
    own = (t["y"], t["y_mean"], t["y_scale"], t["y_rstd"], None if case.masked else t["y_bias"])
    stat, grad_a = t["y_mean"].dtype, t.get("grad_a")
    if plan == "split":
        last = (case.training, True, False, stat, stat, "cuda", plan)
        backward = _conv_bn_ops.bwd(*source, *conv, a, None, t["g"], t["sums"], grad_a, *own, *last)
        found |= zip(("dgrad", "sums", "residual's sums"), backward, strict=False)
        apply = backends.kernels("cuda", "batch_norm").batch_norm_bwd
        dy = apply(t["g"], *own[:4], t["sums"], case.training, stat, stat, mask_bias=own[4])
        found |= zip(("dy", "dweight", "dbias"), dy, strict=True)
    else:  # dy is seen here alone, and whose wgrad follows is another matter
        up = Upstream(t["g"], t["sums"], *own, case.training)
        kernel = backends.kernels("cuda", "conv_bn").conv_bn_dgrad
        given = (source, t["weight"], _CONV, a, up, grad_a, "wgmma", True, stat, stat)
        parts = ("dgrad", "sums", "residual's sums", "dy", "dweight", "dbias")
        found |= zip(parts, kernel(*given), strict=True)
    return {name: v for name, v in found.items() if v is not None and v.numel() > 0}
