"""Paired, interleaved timing.

In every round each provider runs once, so that all of them meet the same moods of the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch


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
    """

    seconds: dict[str, tuple[float, ...]]

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
    timer: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time each provider once a round, in an order that moves on by one from round to round.

    Args:
        providers: functions without arguments, by name.
        rounds: timed rounds, at least 1.
        warmup: rounds before them that do not count.
        timer: the time in seconds; `timer_for(device)` where work is queued on a device.

    Raises:
        ValueError: no providers, or rounds or warmup out of range.
    """
    if not providers:
        raise ValueError("compare: providers is empty, there is nothing to time")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"compare: needs rounds >= 1 and warmup >= 0, got {rounds} and {warmup}")
    names = list(providers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            start = timer()
            providers[name]()
            elapsed = timer() - start
            if i >= warmup:
                seconds[name].append(elapsed)
    return Comparison({name: tuple(values) for name, values in seconds.items()})


def timer_for(device: str | torch.device) -> Callable[[], float]:
    """time.perf_counter, on a GPU after everything queued there is done."""
    device = torch.device(device)
    if device.type != "cuda":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def _spread(values: np.ndarray) -> Spread:
    p20, median, p80 = (float(v) for v in np.percentile(values, (20, 50, 80)))
    return Spread(median, p20, p80)
