"""pytest-benchmark tables of fusedres.bench's suites: `pytest benchmarks --benchmark-only`.

The providers of a job are timed in turns, in one go (`fusedres.bench.harness.compare`), when the
first of their tests runs; each test then hands its provider's rounds to pytest-benchmark, through a
timer that shows them again. So the tables, `--benchmark-save` and `pytest-benchmark compare` hold
times that were taken side by side and, on a GPU, on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fusedres.bench.measure import Job, Measured, Setting, run_job
from fusedres.bench.rows import label
from fusedres.bench.suites import jobs_of, prepare, setting_for, with_ceilings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Replay:
    """A timer that shows given durations again, one for every two readings."""

    def __init__(self) -> None:
        self.now, self.left = 0.0, list[float]()

    def __call__(self) -> float:
        self.left, (step, *self.left) = [], self.left or [0.0]
        self.now += step
        return self.now

    def load(self, durations: tuple[float, ...]) -> None:
        """What the next readings will show."""
        self.left = [step for duration in durations for step in (0.0, duration)]


REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedres")
    group.addoption("--full", action="store_true", help="all sizes, rounds and providers")
    group.addoption("--dtype", choices=tuple(DTYPES), help="default: bf16 on a GPU, else fp32")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each provider of each job of the suite that the module is named after."""
    suite = metafunc.module.__name__.rpartition("test_")[2]
    setting, dtype = _here(metafunc.config)
    quick = not metafunc.config.getoption("full")
    pairs = [
        (job, name) for job in jobs_of(suite, setting, dtype, quick=quick) for name in job.names
    ]
    ids = [f"{job.about['section']}: {job.title}, {name}".replace(" ", "_") for job, name in pairs]
    metafunc.parametrize(("job", "name"), pairs, ids=ids)


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=REPLAY))


@pytest.fixture
def replayed(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> Callable[[Job, str], None]:
    """Measures a job, once for all its providers, and shows one of them."""
    setting, dtype = _here(request.config)

    def show(job: Job, name: str) -> None:
        measured = _measured(job, setting, dtype).get(name)
        assert measured is not None, f"{name} was not measured"
        row = measured.row
        assert "error" not in row, row["error"]
        benchmark.group = f"{job.about['section']}: {job.title}"
        benchmark.extra_info.update(row)
        REPLAY.load(measured.seconds)
        benchmark.pedantic(lambda: None, rounds=len(measured.seconds))

    return show


def _here(config: pytest.Config) -> tuple[Setting, torch.dtype]:
    on_gpu = torch.cuda.is_available()
    dtype = DTYPES[config.getoption("dtype") or ("bf16" if on_gpu else "fp32")]
    return _setting(not config.getoption("full")), dtype


@cache
def _setting(quick: bool) -> Setting:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare(device)
    return setting_for(device, quick)


_CEILINGS: dict[torch.dtype, Setting] = {}
_DONE: dict[str, dict[str, Measured]] = {}  # of the last job: its tests follow each other


def _measured(job: Job, setting: Setting, dtype: torch.dtype) -> dict[str, Measured]:
    if dtype not in _CEILINGS:
        _CEILINGS[dtype], _ = with_ceilings(setting, dtype)
    if job.title not in _DONE:
        _DONE.clear()
        _DONE[job.title] = {label(m.row): m for m in run_job(job, _CEILINGS[dtype])}
    return _DONE[job.title]
