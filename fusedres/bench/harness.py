"""Paired, interleaved timing.

In every round each provider runs once, so that all of them meet the same moods of the machine.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

T = TypeVar("T")


class Lap(NamedTuple):
    """What a call took, in seconds: of the device that did the work, and of a wall clock."""

    seconds: float
    wall: float


class Stopwatch(Protocol):
    """Calls a function and says what that took."""

    def __call__(self, run: Callable[[], object]) -> Lap: ...


class HostStopwatch:
    """Takes the time from the host's clock."""

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self.timer = timer

    def __call__(self, run: Callable[[], object]) -> Lap:
        start = self.timer()
        run()
        elapsed = self.timer() - start
        return Lap(elapsed, elapsed)


class EventStopwatch:
    """Takes a GPU's time from CUDA events around the call, the wall's from the host, which waits
    for the GPU before it starts and before it stops.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Callable[[], object]) -> Lap:
        before = torch.cuda.Event(enable_timing=True)
        after = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        before.record()
        run()
        after.record()
        torch.cuda.synchronize(self.device)
        wall = time.perf_counter() - start
        return Lap(before.elapsed_time(after) * 1e-3, wall)


def stopwatch_for(device: str | torch.device) -> Stopwatch:
    """The one that sees what the device does."""
    device = torch.device(device)
    return EventStopwatch(device) if device.type == "cuda" else HostStopwatch()


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of some values."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        seconds: by provider, one per round in the order of the rounds.
        wall: the same by the wall clock.
    """

    seconds: dict[str, tuple[float, ...]]
    wall: dict[str, tuple[float, ...]]

    def spread(self, name: str) -> Spread:
        """Of the provider's seconds."""
        return _spread(np.array(self.seconds[name]))

    def ratio(self, name: str, base: str) -> float:
        """The median of `name` over the median of `base`: below 1 where `name` is faster."""
        return self.spread(name).median / self.spread(base).median

    def paired_ratio(self, name: str, base: str) -> Spread:
        """Of the ratios `name` / `base` within each round, hardly moved by a slow stretch."""
        return _spread(np.array(self.seconds[name]) / np.array(self.seconds[base]))


def compare(
    providers: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 10,
    warmup: int = 2,
    budget: float = math.inf,
    stopwatch: Stopwatch | None = None,
) -> Comparison:
    """Time each provider once a round, in an order that moves on by one from round to round.

    Args:
        providers: functions without arguments, by name.
        rounds: timed rounds, at least 1.
        warmup: rounds before them that do not count.
        budget: seconds after which no further round starts, once three are done.
        stopwatch: by default the host's clock; `stopwatch_for(device)` where work is queued on a
            device.

    Raises:
        ValueError: no providers, or rounds or warmup out of range.
    """
    if not providers:
        raise ValueError("compare: providers is empty, there is nothing to time")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"compare: needs rounds >= 1 and warmup >= 0, got {rounds} and {warmup}")
    names = list(providers)
    laps: dict[str, list[Lap]] = {name: [] for name in names}
    stopwatch = stopwatch or HostStopwatch()
    start = time.perf_counter()
    with _no_garbage_collection():
        for i in range(warmup + rounds):
            if i >= warmup + 3 and time.perf_counter() - start > budget:
                break
            first = i % len(names)
            for name in names[first:] + names[:first]:
                lap = stopwatch(providers[name])
                if i >= warmup:
                    laps[name].append(lap)
    return Comparison(
        {name: tuple(lap.seconds for lap in of) for name, of in laps.items()},
        {name: tuple(lap.wall for lap in of) for name, of in laps.items()},
    )


class Rotation(Generic[T]):
    """Runs a function over sets of inputs in turn, `count` of them a call: where the sets together
    exceed the cache several times, none is found there. Results are held until their set's next
    turn, for else each would be written to the memory of the one before it, in the cache.
    """

    def __init__(self, run: Callable[[T], object], sets: Sequence[T], count: int) -> None:
        self.run, self.sets, self.count, self.at = run, sets, count, 0
        self.held: list[object] = [None] * len(sets)

    def __call__(self) -> None:
        for _ in range(self.count):
            self.held[self.at] = self.run(self.sets[self.at])
            self.at = (self.at + 1) % len(self.sets)


def captured(run: Callable[[], object], pool: Any = None) -> Callable[[], None]:
    """The run as a CUDA graph that is replayed.

    Args:
        run: queues work on the current stream and never waits for it.
        pool: memory shared with other graphs (torch.cuda.graph_pool_handle). Graphs may share it
            that each compute all they read, but for what lives outside: they overwrite each other.

    The peak of memory (torch.cuda.max_memory_allocated) counts from the capture on: a replay
    allocates nothing.

    Raises:
        Exception: what `run` raised; the stream is the caller's again, the pool is spoiled.
    """
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    failure: Exception | None = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    try:
        with torch.cuda.graph(graph, pool=pool):
            try:
                run()
            except Exception as error:  # what ends the capture would hide it
                failure = error
                raise
    except Exception as error:
        torch.cuda.set_stream(current)
        torch.cuda.synchronize()
        raise failure or error from None
    return graph.replay


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory: a GPU's L2, a CPU's largest."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes, default=32 << 20)


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep large buffers instead of mapping each anew, as if the process had
    been started with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1: on a CPU fresh pages cost more
    than many a pass over them, and hide what a benchmark is about.

    Returns:
        Whether this C library took the settings.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt and mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


def profiler(on_gpu: bool, **options: Any) -> torch.profiler.profile:
    """torch's, without its messages on stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, **options)


@contextmanager
def without_search() -> Any:
    """cuDNN takes the algorithms it thinks best: for what runs once none is worth finding."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def _no_garbage_collection() -> Any:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _spread(values: np.ndarray) -> Spread:
    p20, median, p80 = (float(v) for v in np.percentile(values, (20, 50, 80)))
    return Spread(median, p20, p80)
