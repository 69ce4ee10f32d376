"""Launching a kernel, without paying for Triton's look-up twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres._tensors import INTERPRETED

# A compiled kernel by all it was specialised on. The key holds every integer as it is: one entry
# for each layer and batch size, all of which share a few compiled kernels.
_compiled: dict[tuple[Any, ...], Any] = {}
_MOST = 4096


class Launch(NamedTuple):
    """One launch, as `recording` lists it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]  # all of the kernel's arguments, in order, constants included
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.fn.__name__

    def arguments(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.kernel.arg_names, self.args, strict=True))


class _Recording(NamedTuple):
    launches: list[Launch]
    run: bool


_recording: _Recording | None = None


@contextlib.contextmanager
def recording(*, run: bool = True) -> Iterator[list[Launch]]:
    """Lists the launches of all threads within the block; run=False: instead of launching."""
    global _recording
    before, _recording = _recording, _Recording([], run)
    try:
        yield _recording.launches
    finally:
        _recording = before


def launch(
    kernel: Any,  # @triton.jit
    grid: tuple[int, ...],
    *args: Any,  # all of its arguments, in order, constants included
    num_warps: int = 4,
    num_stages: int = 1,
) -> None:
    """Runs the kernel on the current stream of its tensors' device; nothing on an empty grid."""
    if 0 in grid:
        return
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, args, num_warps, num_stages))
        if not _recording.run:
            return
    if INTERPRETED:
        kernel[grid](*args)
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.index == torch.cuda.current_device():
        _run(kernel, grid, args, device, num_warps, num_stages)
    else:
        with torch.cuda.device(device):
            _run(kernel, grid, args, device, num_warps, num_stages)


def _run(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    device: torch.device,
    num_warps: int,
    num_stages: int,
) -> None:
    key = (
        kernel,
        device.index,
        num_warps,
        num_stages,
        *[
            # a tensor counts by its dtype and alignment, all else by its value
            a if not isinstance(a, Tensor) else a.dtype if not a.data_ptr() & 15 else (a.dtype,)
            for a in args
        ],
    )
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*args)
        return
    if len(_compiled) >= _MOST:
        _compiled.clear()
    # contraction is asked for by name, as its default differs between versions of Triton
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    _compiled[key] = kernel[grid](*args, **options)


_turns = [1]  # of what kernels go by; a list, so that a test can hold it still


def turn() -> int:
    """0 and 1 in turns: the direction in which the next kernel goes over its rows.

    No result depends on it, so threads may share the counter.
    """
    _turns[0] ^= 1
    return _turns[0]


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs at once, if each fills a multiprocessor."""
    if INTERPRETED:
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
