"""CUDA graphs of a function of one tensor, one for each shape, that any thread may replay on any
stream.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Run = Callable[[Tensor], Any]


class Graph:
    """One recorded run: its input and output stay where they are."""

    def __init__(self, run: Run, x: Tensor) -> None:
        """Records run(x) on a stream of its own; other threads may go on using the device."""
        self.x = x.clone(memory_format=torch.preserve_format)
        self._graph, self._done = torch.cuda.CUDAGraph(), torch.cuda.Event()
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            run(self.x)  # searches for algorithms, allocates workspaces
        side.synchronize()
        with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
            self.out = run(self.x)
        self._done.record(side)

    def replay(self, x: Tensor) -> Any:
        """What the run gives for x, on the current stream, after earlier replays on any other."""
        stream = torch.cuda.current_stream(x.device)
        stream.wait_event(self._done)
        self.x.copy_(x)
        self._graph.replay()
        out = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self.out)
        self._done.record(stream)
        return out

    def retire(self) -> None:
        """Wait for the last replay: what follows frees its memory."""
        self._done.synchronize()


class Graphs:
    """Those of the last `most` keys, by what `record` makes of a function and its input."""

    def __init__(self, most: int, record: Callable[[Run, Tensor], Any] = Graph) -> None:
        self._most, self._record = most, record
        self._lock = threading.Lock()
        self._recorded: OrderedDict[Any, Any] = OrderedDict()

    def run(self, key: Any, run: Run, x: Tensor, known: bool = False) -> Any:
        """run(x), by a replay; recorded first if the key is new, or None if it must be `known`."""
        with self._lock:
            of, recorded = self._recorded.get(key, (None, None))
            if known and of is not run:
                return None
            if of is not run:  # new, or of weights that changed while it was on its way here
                if recorded is not None:
                    self._recorded.pop(key)[1].retire()
                with torch.cuda.device_of(x):
                    recorded = self._record(run, x)
                self._recorded[key] = run, recorded  # a replay reads the memory that run holds
                while len(self._recorded) > self._most:
                    self._recorded.popitem(last=False)[1][1].retire()
            self._recorded.move_to_end(key)
            with torch.cuda.device_of(x):
                return recorded.replay(x)

    def forget(self) -> None:
        """All of them."""
        with self._lock:
            while self._recorded:
                self._recorded.popitem()[1][1].retire()
