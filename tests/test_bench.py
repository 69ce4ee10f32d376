"""The timing harness under a clock that its providers move; the rows that come of it."""

from __future__ import annotations

import gc
import json
import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedres
from fusedres.bench import compare, harness, rows, stopwatch_for
from fusedres.bench.harness import HostStopwatch, Rotation
from fusedres.bench.measure import (
    Ceilings,
    Setting,
    largest_error,
    measure_ceilings,
    timed_rows,
)


class Clock:
    """Stands still but for what providers add to it, and keeps the order in which they ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def provider(self, name: str, *durations: float) -> Callable[[], None]:
        """Takes the durations in turn, in seconds."""
        left = list(durations)

        def run() -> None:
            self.ran.append(name)
            self.now += left.pop(0)

        return run


def test_every_round_runs_each_provider_once_in_rotating_order() -> None:
    clock = Clock()
    providers = {name: clock.provider(name, *[1.0] * 4) for name in "abc"}
    compare(providers, rounds=3, warmup=1, stopwatch=HostStopwatch(clock))
    assert "".join(clock.ran) == "abcbcacababc"


def slow_and_fast() -> harness.Comparison:
    clock = Clock()
    return compare(
        {
            "slow": clock.provider("slow", 100, 2, 4, 6, 8, 10, 12),
            "fast": clock.provider("fast", 100, 1, 1, 3, 2, 5, 30),
        },
        rounds=6,
        warmup=1,
        stopwatch=HostStopwatch(clock),
    )


def test_medians_percentiles_and_ratios_leave_the_warm_up_out() -> None:
    result = slow_and_fast()
    assert result.seconds == {"slow": (2, 4, 6, 8, 10, 12), "fast": (1, 1, 3, 2, 5, 30)}
    slow = result.spread("slow")
    assert (slow.p20, slow.median, slow.p80) == pytest.approx((4, 7, 10))
    assert result.ratio("slow", "fast") == pytest.approx(7 / 2.5)
    paired = result.paired_ratio("slow", "fast")  # 2, 4, 2, 4, 2, 0.4
    assert (paired.p20, paired.median, paired.p80) == pytest.approx((2, 2, 4))


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, -1)])
def test_counts_out_of_range(rounds: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=r"rounds >= 1 and warmup >= 0"):
        compare({"a": lambda: None}, rounds=rounds, warmup=warmup)


def test_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="providers is empty"):
        compare({})


def test_no_round_starts_past_the_budget_but_three_run() -> None:
    found = compare({"a": lambda: None}, rounds=100, budget=0.0)
    assert len(found.seconds["a"]) == 3
    assert len(compare({"a": lambda: None}, rounds=5, budget=1e9).seconds["a"]) == 5


def test_no_garbage_is_collected_while_time_is_taken() -> None:
    seen = []
    compare({"a": lambda: seen.append(gc.isenabled())}, rounds=1, warmup=0)
    assert seen == [False] and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        compare({"a": lambda: 1 / 0}, rounds=1)
    assert gc.isenabled()


def test_a_rotation_meets_every_set_in_turn() -> None:
    met: list[int] = []
    rotation = Rotation(met.append, [1, 2, 3], count=2)
    rotation()
    rotation()
    assert met == [1, 2, 3, 1]


def test_caches_and_malloc_of_this_machine() -> None:
    assert 2**18 <= harness.cache_bytes(torch.device("cpu")) < 2**33
    assert isinstance(harness.keep_freed_memory(), bool)


class FakeGpu:
    """torch.cuda, as far as a capture and events need it, on a machine without one: what was called
    in which order, and a clock that only work moves.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.milliseconds = 0.0
        self.stream = "current"
        names = ("synchronize", "reset_peak_memory_stats")
        fakes = {name: lambda *_, name=name: self.log.append(name) for name in names}
        fakes |= {"current_stream": lambda: types.SimpleNamespace(wait_stream=lambda _: None)}
        fakes |= {"Stream": lambda: types.SimpleNamespace(wait_stream=lambda _: None)}
        fakes |= {"stream": self.on_stream, "graph": self.graph, "Event": self.event}
        fakes |= {"CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: "replayed")}
        fakes |= {"set_stream": lambda _: self.log.append("set_stream")}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def on_stream(self, _: object) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, _: object, pool: object) -> Iterator[None]:
        self.log.append(f"capture into {pool}")
        try:
            yield
        except RuntimeError:  # as torch: what ends the capture raises over it
            raise RuntimeError("capture was invalidated") from None
        self.log.append("captured")

    def event(self, enable_timing: bool) -> Any:
        at = {}
        return types.SimpleNamespace(
            at=at,
            record=lambda: at.update(ms=self.milliseconds),
            elapsed_time=lambda other: other.at["ms"] - at["ms"],
        )


def test_a_run_is_captured_after_it_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    replay = harness.captured(lambda: gpu.log.append("run"), "pool")
    assert replay() == "replayed"
    expected = ["run", "run", "synchronize", "reset_peak_memory_stats", "capture into pool"]
    assert gpu.log == [*expected, "run", "captured"]


def test_a_failed_capture_says_why_and_gives_the_stream_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch)

    def run() -> None:
        if any(word.startswith("capture") for word in gpu.log):
            raise RuntimeError("synchronises while it is captured")

    with pytest.raises(RuntimeError, match="synchronises while"):
        harness.captured(run)
    assert gpu.log[-2:] == ["set_stream", "synchronize"]


def test_events_tell_the_devices_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)

    def run() -> None:
        gpu.milliseconds += 40

    lap = stopwatch_for("cuda")(run)
    assert lap.seconds == pytest.approx(0.04) and 0 <= lap.wall < 0.03
    assert gpu.log == ["synchronize", "synchronize"]


@pytest.mark.gpu
def test_the_stopwatch_waits_for_the_gpu() -> None:
    matrix = torch.ones(8192, 8192, device="cuda")
    stopwatch = stopwatch_for("cuda")
    stopwatch(lambda: matrix @ matrix)
    one = stopwatch(lambda: matrix @ matrix)
    three = stopwatch(lambda: [matrix @ matrix for _ in range(3)])
    assert 2 < three.seconds / one.seconds < 4
    assert one.seconds <= one.wall


@pytest.mark.gpu
def test_a_captured_run_is_replayed() -> None:
    x = torch.zeros(8, device="cuda")
    replay = harness.captured(lambda: x.add_(1))
    before = x.clone()
    replay()
    replay()
    assert torch.equal(x, before + 2)


# --- rows -----------------------------------------------------------------------------------------

SETTING = Setting(torch.device("cpu"), 3, 1.0, 0.0, 0, {"device": "cpu", "threads": 2})
ABOUT = {"section": "train", "case": "resnet50", "shape": [4, 3, 8, 8], "batch": 4}
ABOUT |= {"dtype": "float32", "plan": None}


def test_rows_of_a_comparison() -> None:
    measured = timed_rows(
        slow_and_fast(),
        {"slow": 1, "fast": 2},
        {name: ABOUT | {"name": name} for name in ("slow", "fast")},
        SETTING,
        work={"slow": [(3.5e9, 7e9)], "fast": [(2e9, 0.0), (0.0, 8e9)]},
        ceilings=Ceilings(1e9, 4e9),
        anchor="fast",
    )
    slow, fast = (m.row for m in measured)
    assert measured[0].seconds == (2, 4, 6, 8, 10, 12)
    assert (slow["ms"], slow["p20"], slow["p80"]) == pytest.approx((7e3, 4e3, 10e3))
    assert fast["ms"] == pytest.approx(1.25e3) and fast["runs"] == 12
    assert slow["img_s"] == pytest.approx(4 / 7) and slow["wall_ms"] in (6e3, 8e3)
    assert (slow["gb_s"], slow["tflops"]) == pytest.approx((0.5, 1e-3))
    assert slow["of_roofline"] == pytest.approx(0.5)  # 3.5 s for the bytes, 1.75 s for the FLOP
    assert slow["against"] == "fast" and fast["ratio"] == 1
    assert (slow["ratio_p20"], slow["ratio_p80"]) == pytest.approx((4, 8))
    assert fast["wall_ms"] <= 1.5e3  # of one of the two runs of a round
    assert slow["ratio"] == pytest.approx(2 * 2)  # two runs of the fast one a round
    assert (fast["bytes"], fast["flops"]) == (2e9, 8e9)
    assert fast["of_roofline"] == pytest.approx(4 / 1.25)  # kernel by kernel: 2 s and 2 s
    assert slow["device"] == "cpu"


def test_ceilings_are_measured() -> None:
    ceilings, found = measure_ceilings(SETTING, torch.float32)
    by_name = {m.row["name"]: m.row for m in found}
    assert by_name["copy"]["bytes"] == 2 * 2**24 * 4
    assert ceilings.bandwidth >= by_name["copy"]["gb_s"] * 1e9 * (1 - 1e-9)
    for name in ("matmul", "convolution"):
        assert ceilings.peak >= by_name[name]["tflops"] * 1e12 * (1 - 1e-9)
    assert 1e8 < ceilings.bandwidth < 1e13 and 1e9 < ceilings.peak < 1e16


def test_the_largest_error_is_of_the_worst_element_and_sees_what_is_not_finite() -> None:
    truth = [torch.tensor([1.0, -4.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    assert largest_error([torch.tensor([1.5, -4.0])], truth) == pytest.approx(0.125)
    assert largest_error([truth[0], torch.tensor([0.0, 3.0])], truth) == 3
    assert largest_error([torch.tensor([math.nan, -4.0])], truth) == math.inf


def row(**fields: object) -> rows.Row:
    base = {"section": "train", "case": "resnet50", "shape": [16, 3, 224, 224], "batch": 16}
    base |= {"dtype": "float32", "device": "cpu", "name": "eager", "plan": None, "ms": 5.0}
    return base | fields


def test_a_file_of_rows_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    written = [row(), row(name="fusedres-cpp", plan="split", p20=None, max_error=math.inf)]
    rows.write(path, written)
    assert rows.read([path]) == written
    assert path.read_text().count("\n") == 4  # a row a line
    rows.write(path, [])
    assert rows.read([path]) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ('{"rows": []}', "expected a list of rows"),
        ("[1]", "expected a list of rows"),
        ('[{"section": "train", "dtype": "float32", "device": "cpu"}]', "a row has no name"),
    ],
)
def test_what_holds_no_rows_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"rows\.json: {message}"):
        rows.read([path])


def test_rows_are_told_apart_by_who_what_and_plan() -> None:
    others = [row(name="graph"), row(plan="split"), row(batch=1), row(shape=[16, 3, 64, 64])]
    others += [row(dtype="bfloat16"), row(case="IdentityBlock 1"), row(section="infer")]
    assert len({rows.key(r) for r in [row(), *others]}) == len(others) + 1
    assert rows.key(row(ms=1.0, commit="x")) == rows.key(row())
    assert rows.group(row(name="graph", plan="split")) == rows.group(row())
    assert rows.label(row(name="fusedres-triton", plan="auto")) == "fusedres-triton"
    assert rows.label(row(name="fusedres-triton", plan="split")) == "fusedres-triton, split"


def test_the_environment_says_where_it_ran() -> None:
    found = rows.environment(torch.device("cpu"))
    assert found["device"] == "cpu" and found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__ and found["fusedres"] == fusedres.__version__
    assert found["driver"] is None and "commit" in found
    json.dumps(found)


def test_the_commit_says_whether_the_tree_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = " M file"
    monkeypatch.setattr(rows, "_said_by", lambda *c: "abc" if "rev-parse" in c else changed)
    monkeypatch.chdir(tmp_path)
    assert rows.environment(torch.device("cpu"))["commit"] is None
    for folder in ("csrc", "fusedres"):
        (tmp_path / folder).mkdir()
    assert rows.environment(torch.device("cpu"))["commit"] == "abc and changes"
    changed = ""
    assert rows.environment(torch.device("cpu"))["commit"] == "abc"
