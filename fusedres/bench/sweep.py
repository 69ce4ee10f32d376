"""Which block sizes the kernels of a layer should have here, and then which plan it should take.

Every configuration is held against the fp64 truth before it is timed, by the rule that judges all
rows, and in memory full of NaN, so that what it leaves unwritten shows. One that is right takes
turns with the configuration in force, in the direction in which a training step runs the kernel. It
is taken where it is faster by MARGIN, by the median of the ratios within the rounds, and ahead in
four rounds of five. Of many the luckiest looks best: so the best is timed once more, and the second
figures decide. Last, the plans are timed beside each other, and beside how the layer runs now, with
the configurations that were found.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusedres import backends
from fusedres._plan_table import device_name
from fusedres.bench.convolutions import DIRECTIONS, Site, Tuned, kernels_of
from fusedres.bench.harness import Rotation, captured, compare, without_search
from fusedres.bench.judging import suspect
from fusedres.bench.measure import (
    ANCHOR,
    Setting,
    failed_row,
    largest_error,
    name_of,
    own_backends,
    reason_of,
    run_job,
    timed_rows,
)
from fusedres.bench.ops import Candidate, Inputs, OpCase, input_sets, op_job, repeats
from fusedres.bench.rows import Row
from fusedres.triton_kernels import _configs
from fusedres.triton_kernels._configs import Config, trying

MARGIN = 0.02  # of the time: less is noise
NOW = "now"  # the configuration in force, or how a layer runs now
Run = Callable[[Inputs], Sequence[Tensor]]


class DeviceLostError(RuntimeError):
    """A configuration broke the GPU's context: nothing more can be measured in this process."""


class Budget:
    """Seconds that may be spent, and how long measurements of each kind have taken."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.start = seconds, clock, clock()
        self.taken: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=10))

    def allows(self, *kinds: str) -> bool:
        """Whether these measurements would end in time, if each took as long as the longest of the
        last ten of its kind; one of a new kind, as the longest of all.
        """
        longest = max((max(of) for of in self.taken.values() if of), default=0.0)
        expected = sum(max(self.taken[kind], default=longest) for kind in kinds)
        return self.clock() - self.start + expected < self.seconds

    @contextmanager
    def measuring(self, kind: str) -> Iterator[None]:
        """Within the block a measurement of this kind runs."""
        before = self.clock()
        yield
        self.taken[kind].append(self.clock() - before)


@torch.no_grad()
def tune_site(site: Site, count: int, setting: Setting, budget: Budget, rows: list[Row]) -> bool:
    """Sweep a layer's configurations, and compare its plans.

    Args:
        count: how many such layers the network has.
        rows: get those of sections "configs" and "conv_bn", and at the end one of "tuned".

    Returns:
        Whether the budget sufficed to compare the plans; else there is nothing to go by, and no
        row "tuned".

    Raises:
        DeviceLostError: see there; the message names the configuration.
    """
    if not budget.allows("preparation", "plans"):
        return False
    sweep = _Layer(site, count, setting, budget, rows)
    for backend in own_backends("conv_bn", site.device, site.dtype):
        kernels = kernels_of(site.layer, backend)
        for run in dict.fromkeys((kernel.plan, kernel.direction) for kernel in kernels):
            sweep.run(backend, [k for k in kernels if (k.plan, k.direction) == run])
    if not budget.allows("plans"):
        return False
    backend, plan = _way_now(site)
    with budget.measuring("plans"):
        now = (backend, plan) if sweep.sound else None
        rows += _plan_rows(site, count, setting, sweep.found, now)
    was = {"plan": plan, "configs": _as_json(sweep.before)}
    tuned = site.case(site.training[0], count).fields | {"section": "tuned", "case": ""}
    tuned |= {"dtype": name_of(site.dtype), "name": "fusedres-tune", "plan": None, "backend": None}
    tuned |= {"configs": _as_json(sweep.found), "gains": sweep.gains, "was": was}
    rows.append(tuned | {"missed": sweep.missed, **setting.where})
    return True


def _as_json(configs: Mapping[str, Config]) -> dict[str, dict[str, int]]:
    return {kernel: asdict(config) for kernel, config in configs.items()}


class _Layer:
    """The configurations of all kernels of a layer.

    Attributes:
        before: those in force.
        found: those to take, where the rule has others.
        gains: the time of those over that of those before.
        missed: how many were not tried.
        sound: whether those before are right.
    """

    def __init__(
        self, site: Site, count: int, setting: Setting, budget: Budget, rows: list[Row]
    ) -> None:
        self.site, self.count, self.setting = site, count, setting
        self.budget, self.rows = budget, rows
        self.before: dict[str, Config] = {}
        self.found: dict[str, Config] = {}
        self.gains: dict[str, float] = {}
        self.missed, self.sound = 0, True

    def run(self, backend: str, kernels: Sequence[Tuned]) -> None:
        """Those of kernels that run together."""
        self.before |= {kernel.kernel: in_force(self.site, kernel) for kernel in kernels}
        if not self.budget.allows("preparation", "configuration", "plans"):
            tried = (_configs.candidates(k.kernel, self.site.shape) for k in kernels)
            self.missed += sum(map(len, tried))
            return
        case = self.site.case(kernels[0].direction, self.count)
        if self.setting.on_gpu:
            torch.cuda.empty_cache()  # of the graphs of the direction before
        try:
            with self.budget.measuring("preparation"):
                bench = _Bench(case, self.setting)
                others = self._sound(bench, backend, kernels) if len(kernels) > 1 else {}
        except DeviceLostError:
            raise
        except Exception as error:  # of memory, most likely
            _check_device(self.setting, f"{backend}, {self.site.layer}")
            known = case.fields | {"section": "configs", "name": f"fusedres-{backend}"}
            known |= {"dtype": name_of(case.dtype), "backend": backend, "plan": kernels[0].plan}
            self.rows.append(failed_row(known, reason_of(error), self.setting).row)
            return
        for kernel in kernels:
            one = _Sweep(bench, self.site, backend, kernel, others | self.found)
            one.try_all(self.before[kernel.kernel], self.budget, self.rows)
            self.missed += one.missed
            self.sound &= one.sound
            if one.taken is not None:
                self.found[kernel.kernel] = one.taken
            if one.gain is not None:
                self.gains[kernel.kernel] = one.gain

    def _sound(self, bench: _Bench, backend: str, kernels: Sequence[Tuned]) -> dict[str, Config]:
        """Where kernels that run together are wrong together: for each a configuration that is
        right alone, in a direction of its own, lest the one be blamed for the other.
        """
        first = _Sweep(bench, self.site, backend, kernels[0], {})
        if first.is_right(self.before[kernels[0].kernel]):
            return {}
        found: dict[str, Config] = {}
        for kernel in (k for k in kernels if k.kernel in DIRECTIONS):
            alone = _Bench(self.site.case(kernel.kernel, self.count), self.setting)
            sweep = _Sweep(alone, self.site, backend, kernel, {})
            candidates = _configs.candidates(kernel.kernel, self.site.shape)
            tried = [self.before[kernel.kernel], *candidates]
            right = next((config for config in tried if sweep.is_right(config)), None)
            if right is not None:
                found[kernel.kernel] = right
        return found


def _residual(site: Site, kernel: Tuned) -> int:
    """How the kernel's configuration is asked for; backward reads the joined activation."""
    return int(site.joins and kernel.direction == "fwd")


def in_force(site: Site, kernel: Tuned) -> Config:
    """The configuration that the kernel takes, by the table or by rule."""
    about = (site.shape, _residual(site, kernel), _configs.arch_of(site.device))
    return _configs.config_of(kernel.kernel, device_name(site.device), site.dtype, *about)


def _by_rule(site: Site, kernel: Tuned) -> Config:
    about = (site.shape, _residual(site, kernel), _configs.arch_of(site.device))
    return _configs.rule(kernel.kernel, site.dtype.itemsize, *about)


def in_words(config: Mapping[str, int]) -> str:
    """ "128x64x64/8/3": BM x BN x BK / warps / stages; "/2" after it for 2 programs of a persistent
    grid on a multiprocessor.
    """
    blocks = "x".join(str(config[side]) for side in ("BM", "BN", "BK"))
    grid = f"/{config['programs']}" if config.get("programs") else ""
    return f"{blocks}/{config['num_warps']}/{config['num_stages']}{grid}"


def faster(row: Row) -> bool:
    """Whether it beat what it was held against by more than the noise."""
    return row.get("ratio", math.inf) <= 1 - MARGIN and row["ratio_p80"] < 1


@dataclass
class _Ready:
    """A run that can be timed."""

    timed: Callable[[], object]
    count: int


class _Bench:
    """A layer in one direction, with its inputs, its truth, and how far eager is from it."""

    def __init__(self, case: OpCase, setting: Setting) -> None:
        self.case, self.setting, self.first = case, setting, case.inputs(0)
        with without_search():
            self.truth = case.truth(self.first)
        eager = next(c for c in case.candidates if c.name == ANCHOR)
        self.allowance = {"max_error": largest_error(eager.run(self.first), self.truth)}
        self.sets = input_sets(case, self.first, setting)

    def candidate(self, backend: str, plan: str) -> Candidate:
        return next(c for c in self.case.candidates if (c.backend, c.plan) == (backend, plan))

    def ready(self, run: Run) -> _Ready:
        rotation = Rotation(run, self.sets, 1)
        rotation.count = repeats(self.case, rotation, self.setting)
        timed = captured(rotation) if self.setting.on_gpu else rotation
        timed()
        return _Ready(timed, rotation.count)

    def versus(self, now: _Ready, new: _Ready, row: Row) -> Row:
        """The row with its times."""
        of = {NOW: now, row["name"]: new}
        measured = compare(
            {name: ready.timed for name, ready in of.items()},
            rounds=self.setting.rounds,
            budget=self.setting.budget,
            stopwatch=self.setting.stopwatch,
        )
        work = {name: [(self.case.bytes, self.case.flops)] for name in of}
        counts = {name: ready.count for name, ready in of.items()}
        ceilings = self.setting.ceilings.get(self.case.dtype)
        rows = timed_rows(
            measured, counts, dict.fromkeys(of, row), self.setting,
            work=work, ceilings=ceilings, anchor=NOW,
        )  # fmt: skip
        return rows[1].row


class _Sweep:
    """The configurations of one kernel.

    Attributes:
        taken: what the kernel is to take from now on, None for what the rule says.
        gain: its time over that of the one in force.
        missed: how many the budget left out.
        sound: whether the one in force is right.
    """

    def __init__(
        self, bench: _Bench, site: Site, backend: str, kernel: Tuned, found: Mapping[str, Config]
    ) -> None:
        self.bench, self.site, self.kernel, self.found = bench, site, kernel, dict(found)
        self.candidate = bench.candidate(backend, kernel.plan)
        self.taken: Config | None = None
        self.gain: float | None = None
        self.missed, self.sound = 0, True

    def try_all(self, now: Config, budget: Budget, rows: list[Row]) -> None:
        """Each against the one in force; their rows are added."""
        with budget.measuring("configuration"):
            row, reference = self._checked(now)
        rows.append(row)
        self.sound = reference is not None
        best, held = (1.0, now), now
        for config in _configs.candidates(self.kernel.kernel, self.site.shape):
            if config == now:
                continue
            if not budget.allows("configuration", "configuration", "plans"):  # one to confirm it
                self.missed += 1
                continue
            with budget.measuring("configuration"):
                row, ready = self._checked(config)
                if ready is not None and reference is not None:
                    row = self.bench.versus(reference, ready, row)
                elif ready is not None:  # the one in force is wrong, or does not run at all
                    reference, held = ready, config
            rows.append(row)
            if faster(row) and row["ratio"] < best[0]:
                best = row["ratio"], config
        if best[1] != now and budget.allows("configuration", "plans"):
            with budget.measuring("configuration"):
                row, ready = self._checked(best[1])
                if ready is not None and reference is not None:
                    row = self.bench.versus(reference, ready, row)
            rows.append(row)
            if faster(row):
                self.taken, self.gain = best[1], row["ratio"] if held == now else None
        if self.taken is None and (held != now or now != _by_rule(self.site, self.kernel)):
            self.taken = held

    def is_right(self, config: Config) -> bool:
        """Whether it runs, and computes what it should."""
        return "error" not in self._checked(config)[0]

    def _checked(self, config: Config) -> tuple[Row, _Ready | None]:
        """The row with the error of its result, and where that is right, what can be timed."""
        run = under(self.found | {self.kernel.kernel: config}, self.candidate.run)
        case, bench = self.bench.case, self.bench
        row = case.fields | {"section": "configs", "case": self.kernel.kernel}
        row |= {"dtype": name_of(case.dtype), "plan": self.kernel.plan, "config": asdict(config)}
        eager = row | {"name": ANCHOR} | bench.allowance
        row |= {"name": f"{self.candidate.name} {in_words(asdict(config))}"}
        row |= {"backend": self.candidate.backend, **bench.setting.where}
        eager |= bench.setting.where
        try:
            with _poisoned():
                row["max_error"] = largest_error(run(bench.first), bench.truth)
            wrong = suspect(row, [eager])
            if not wrong:
                return row, bench.ready(run)
            return row | {"wrong": wrong, "error": f"wrong result: {wrong}"}, None
        except Exception as error:  # it does not compile, or a multiprocessor cannot hold it
            _check_device(bench.setting, f"{self.kernel.kernel} {row['name']}, {self.site.layer}")
            return row | {"error": reason_of(error)}, None


def under(configs: Mapping[str, Config], run: Run) -> Run:
    """The run with these configurations in force."""

    def configured(inputs: Inputs) -> Sequence[Tensor]:
        with trying(configs):
            return run(inputs)

    return configured


def _plan_rows(
    site: Site,
    count: int,
    setting: Setting,
    found: Mapping[str, Config],
    now: tuple[str, str] | None,
) -> list[Row]:
    """Every plan of every backend, and how the layer runs now, side by side; None where that is
    wrong.
    """
    rows: list[Row] = []
    for direction in site.training:
        case = site.case(direction, count)
        judged = [c for c in case.candidates if c.judged]
        present = [c for c in judged if (c.backend, c.plan) == now]
        candidates = [replace(c, run=under(found, c.run)) if c.plan else c for c in judged]
        name, note = f"fusedres-{NOW}", "how it runs now: " + ", ".join(now or ())
        candidates += [replace(c, name=name, backend=None, plan=None, note=note) for c in present]
        one = replace(case, candidates=tuple(candidates))
        rows += [measured.row for measured in run_job(op_job(one, setting), setting)]
    return rows


def _way_now(site: Site) -> tuple[str, str]:
    """Backend and plan of the layer, as things stand."""
    layer, shape = site.layer, site.shape
    weight = torch.empty(
        layer.out_channels, layer.in_channels, *shape.kernel, dtype=site.dtype, device=site.device
    )
    choice = backends.choose("conv_bn", site.device.type, site.dtype)
    out = (site.batch, layer.out_channels, layer.out_size, layer.out_size)
    return backends.way_of(choice, site.dtype, weight, site.conv, out)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory comes full of NaN: what a kernel before left there cannot pass for a result."""
    before: Any = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _check_device(setting: Setting, what: str) -> None:
    if setting.on_gpu:
        try:
            torch.cuda.synchronize(setting.device)
        except Exception as error:
            raise DeviceLostError(f"{what}: {reason_of(error)}") from error
