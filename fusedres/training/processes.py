"""The processes that train one model together, one a device, as torchrun starts them.

Tensors go over torch's default group: NCCL between GPUs, gloo between CPUs. What is said between
hosts (errors, a checkpoint, whether to stop) goes over a group of gloo of its own, which also
notices where a process has ended, as soon as its worker processes have ended too.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fusedres.training.files import TrainingError

T = TypeVar("T")


class ElsewhereError(TrainingError):
    """What is wrong in another process, which says so itself."""


class StoppedElsewhere(KeyboardInterrupt):
    """An interruption that another process tells of."""


class LostProcessError(TrainingError):
    """A process that ended while others waited for it."""


_known: list[Any] = []  # torch's default group, and the Processes of it
_launch: list[Any] = []  # torchrun's store, which outlives a start


@dataclass(frozen=True)
class Processes:
    """Those that train together.

    Attributes:
        rank: which one this is, from 0; 0 writes files and says how it goes.
        count: how many there are.
        local: how many of them are on this machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 1
    _hosts: Any = None

    @classmethod
    def current(cls) -> Processes:
        """Those of torch's default group, which all of them ask for at the same time; without one,
        this process alone.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        world = dist.group.WORLD
        if not _known or _known[0] is not world:
            hosts = dist.new_group(backend="gloo")
            local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
            _known[:] = world, cls(dist.get_rank(), dist.get_world_size(), local, hosts)
        found: Processes = _known[1]
        return found

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of so many things in a row; parts differ by one at most."""
        return slice(self.rank * count // self.count, (self.rank + 1) * count // self.count)

    def add_up(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The sums over all processes; every one of them calls this."""
        if self.count == 1:
            return tensors
        # NCCL would wait for a process that has ended until its time is up
        dist.barrier(group=self._hosts)
        sums = tuple(t.clone() for t in tensors)
        for total in sums:
            dist.all_reduce(total)
        return sums

    def all_do(self, do: Callable[[], T]) -> T:
        """What `do` returns in this process; all call it at the same time.

        Raises:
            TrainingError: of `do`, in the first process in which it fails.
            ElsewhereError: in the others.
        """
        if self.count == 1:
            return do()
        result, error = _tried(do)
        said: list[str | None] = [None] * self.count
        dist.all_gather_object(said, None if error is None else str(error), self._hosts)
        for rank, message in enumerate(said):
            if message is not None:
                raise error if error and rank == self.rank else ElsewhereError(message)
        return result  # type: ignore[return-value]

    def main_does(self, do: Callable[[], T]) -> T:
        """What `do` returns in the main process, sent to all; all call this at the same time.

        Raises:
            TrainingError: of `do`, in the main process.
            ElsewhereError: in the others.
        """
        if self.count == 1:
            return do()
        sent: list[Any] = [None, None]
        error = None
        if self.main:
            result, error = _tried(do)
            sent = [result, None if error is None else str(error)]
        dist.broadcast_object_list(sent, src=0, group=self._hosts)
        if sent[1] is not None:
            raise error or ElsewhereError(sent[1])
        return sent[0]

    @contextmanager
    def noticing_loss(self, advice: Callable[[], str]) -> Iterator[None]:
        """Raises LostProcessError, with the advice, where torch finds a process gone."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _tells_of_a_loss(error):
                raise
            raise LostProcessError(
                f"process {self.rank} of {self.count}: another process has ended or cannot be "
                f"reached any longer; {advice()}"
            ) from error


class Agreement:
    """Lets processes stop at the same step: what one of them is asked in a step, all are told in
    the next one, so that no step waits for the answer.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._open: tuple[Any, Tensor] | None = None

    def reached(self, asked: bool) -> bool:
        """Whether to stop now; every process calls this once a step."""
        if self._processes.count == 1:
            return asked
        answer = self.close()
        flag = torch.tensor(int(asked))
        group = self._processes._hosts
        self._open = dist.all_reduce(flag, dist.ReduceOp.MAX, group, async_op=True), flag
        return answer

    def close(self) -> bool:
        """Wait for the last answer."""
        if self._open is None:
            return False
        work, flag = self._open
        work.wait()
        self._open = None
        return bool(flag)


@contextmanager
def interruptions(once: bool) -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are put on; if only `once`, the second one acts as ever.

    Who started several processes tells each of a signal that all have got already.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before: dict[signal.Signals, Any] = {}

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        if once:
            signal.signal(number, before[signal.Signals(number)])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def launched(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started with this one, if it did, until the block ends.

    A default group that is there already is taken as it is, and left.

    Args:
        device: "cpu" or "cuda"; of several GPUs on a machine each process gets its own.

    Raises:
        TrainingError: fewer GPUs than processes on this machine; environment variables that make no
            sense; or others cannot be reached.
    """
    count, local = _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
    where = torch.device(device)
    if where.type == "cuda":
        if count > 1 and "LOCAL_RANK" not in os.environ:
            raise TrainingError("WORLD_SIZE is set and LOCAL_RANK is not; start it by torchrun")
        if local >= torch.cuda.device_count():
            raise TrainingError(
                f"process {local} of this machine has no GPU: torch finds "
                f"{torch.cuda.device_count()}; start as many processes as there are GPUs"
            )
        where = torch.device("cuda", local)
        torch.cuda.set_device(where)
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if (count == 1 and not by_torchrun) or (dist.is_available() and dist.is_initialized()):
        yield where
        return
    if not dist.is_available():
        raise TrainingError("this build of torch has no torch.distributed; start one process")
    try:
        _meet("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"cannot meet the other processes: {error}") from error
    yield where
    # not after an error: others may be gone, and leaving a group can mean waiting for them
    dist.destroy_process_group()
    _launch.clear()


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise TrainingError(f"the environment variable {name} must be a number, got {value!r}")
    return int(value)


def _meet(backend: str) -> None:
    """init_process_group, by names of this start alone: where torchrun starts processes once more,
    its store still has the addresses of those before, and new groups would call there.
    """
    store, rank, count = next(iter(dist.rendezvous("env://")))
    _launch[:] = [store]
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"start {start}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)


def note(what: str) -> None:
    """Leave word for later starts of the same launch; nothing where torchrun launched none."""
    for store in _launch:
        store.set(f"fusedres {what}", "")


def noted(what: str) -> bool:
    """Whether this launch's processes have left word, in this start or one before."""
    return any(store.check([f"fusedres {what}"]) for store in _launch)


def _tried(do: Callable[[], T]) -> tuple[T | None, TrainingError | None]:
    try:
        return do(), None
    except TrainingError as error:
        return None, error


def _tells_of_a_loss(error: RuntimeError) -> bool:
    kinds = getattr(dist, "DistError", ()), getattr(dist, "DistBackendError", ())
    return isinstance(error, kinds) or "gloo/transport" in str(error)  # gloo has no kind of its own
