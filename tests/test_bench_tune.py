"""fusedres tune with made-up kernels: what is checked, timed, taken, said and kept, and when a run
ends. With real ones, in Triton's interpreter: in_interpreter_tune.py.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedres import _plan_table, backends, use_backend
from fusedres.bench import convolutions, harness, light, measure, sweep
from fusedres.bench import rows as results
from fusedres.bench.convolutions import Site, Tuned, kernels_of, plans_of
from fusedres.bench.harness import Lap
from fusedres.bench.measure import Setting
from fusedres.bench.ops import Candidate, OpCase
from fusedres.bench.plan_model import DEVICES
from fusedres.bench.roofline import Layer, distinct, layers
from fusedres.bench.sweep import Budget
from fusedres.bench.tune import changes_of, entries_from, merged
from fusedres.cli import main, tune
from fusedres.triton_kernels import _configs
from fusedres.triton_kernels._configs import Config

CPU = torch.device("cpu")
FAST, LEVEL, WRONG, LARGE, RULE = (Config(bm, 16, 16, 4, 1) for bm in (16, 32, 64, 128, 256))
LAYERS = (
    Layer("stage 1", "layer1.1.conv3", "conv3", 56, 64, 256, 1, 1),
    Layer("stage 1", "layer1.1.conv1", "conv1", 56, 256, 64, 1, 1),
)
KERNELS = (
    Tuned("fwd", "fused", "fwd"),
    Tuned("dgrad", "fused", "bwd"),
    Tuned("wgrad", "fused", "bwd"),
)
ENTRY = {"device": "cpu", "dtype": "float32", "kernel": [1, 1], "stride": [1, 1]}
OF_CONV3 = ENTRY | {"in_channels": 64, "out_channels": 256}
OF_CONV1 = ENTRY | {"in_channels": 256, "out_channels": 64}
WHERE = {"device": "cpu", "commit": "c", "torch": "2", "triton": "3", "time": "2026-01-01"}


class OutOfResources(RuntimeError):
    """As Triton's."""


class World:
    """Kernels whose times and errors are given, and what was done with them."""

    def __init__(self) -> None:
        self.ms: dict[tuple[str, Config], float] = {}  # by kernel; 1 where nothing is said
        self.split = 100.0  # ms of each direction
        self.moods = [1.0]  # of the machine: times are as often as long, one after the other
        self.checked: Counter[Config] = Counter()
        self.timed: Counter[Config] = Counter()
        self.under_watch = False
        self.last = 0.0
        self.now = 0.0  # seconds since the start
        self.seconds_of_a_run = 0.0
        self.starts: list[float] = []
        self.calls = 0

    def case(self, site: Site, direction: str, count: int) -> OpCase:
        """In the place of Site.case."""
        layer = site.layer
        shape = [site.batch, layer.size, layer.in_channels, layer.out_channels, 1, layer.stride]
        ours = [
            Candidate("fusedres-triton", partial(self.run, site, direction, p), "triton", p)
            for p in plans_of(layer, "triton")
        ]
        eager = Candidate("eager", lambda t: [t["x"]])
        fields = {"section": "conv_bn", "case": direction, "shape": shape}
        fields |= {"batch": site.batch, "count": count}
        return OpCase(
            fields, site.dtype, 4.0, 4.0, lambda seed: {"x": torch.ones(1)}, (*ours, eager),
            lambda t: [torch.ones(1, dtype=torch.float64)],
        )  # fmt: skip

    def run(self, site: Site, direction: str, plan: str, inputs: Any) -> list[torch.Tensor]:
        self.starts.append(self.now)
        self.now += self.seconds_of_a_run
        self.calls += 1
        mood = self.moods[self.calls % len(self.moods)]
        if plan == "split":
            self.last = self.split * mood
            return [inputs["x"]]
        own = (k.kernel if direction in ("dgrad", "wgrad") else k.direction for k in KERNELS)
        kernels = [k for k, of in zip(KERNELS, own, strict=True) if of == direction]
        taken = {k.kernel: sweep.in_force(site, k) for k in kernels}
        (self.timed if self.under_watch else self.checked).update(taken.values())
        if LARGE in taken.values():
            raise OutOfResources("out of resource: shared memory")
        self.last = sum(self.ms.get(one, 1.0) for one in taken.items()) * mood
        return [inputs["x"] * (2.0 if WRONG in taken.values() else 1.0)]

    def stopwatch(self, run: Callable[[], object]) -> Lap:
        self.last, self.under_watch = 1.0, True
        try:
            run()
        finally:
            self.under_watch = False
        return Lap(self.last * 1e-3, self.last * 1e-3)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's table, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _plan_table.reload()
    (tmp_path / "fusedres").mkdir()
    yield tmp_path / "fusedres" / "plan_table.json"
    monkeypatch.undo()
    _plan_table.reload()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A GPU of make-believe, on which tune finds two layers."""
    found = World()

    class Told(Setting):
        @property
        def stopwatch(self) -> Any:
            return found.stopwatch

    def sites(device: torch.device, dtype: torch.dtype, batches: Any) -> list[tuple[Site, int]]:
        return [(Site(layer, b, dtype, device), 3) for b in batches for layer in LAYERS]

    monkeypatch.setattr(harness.gc, "collect", lambda: 0)  # a tenth of a second each
    for module in (convolutions, measure, sweep, tune):
        monkeypatch.setattr(module, "own_backends", lambda *_: ["triton"])
    monkeypatch.setattr(light, "own_backends", lambda *_: [])
    monkeypatch.setattr(convolutions, "_with_options", lambda _: [])
    monkeypatch.setattr(sweep, "_way_now", lambda _: ("triton", "split"))
    monkeypatch.setattr(Site, "case", lambda site, *about: found.case(site, *about))
    monkeypatch.setattr(tune, "sites_of", sites)
    monkeypatch.setattr(tune, "prepare", lambda _: None)
    monkeypatch.setattr(tune, "setting_for", lambda *_: Told(CPU, 5, 5.0, 1e-9, 1, WHERE))
    monkeypatch.setattr(tune, "light_cases", lambda *_: [])
    monkeypatch.setattr(tune, "Budget", lambda seconds: Budget(seconds, lambda: found.now))
    monkeypatch.setattr(_configs, "rule", lambda *_: RULE)
    monkeypatch.setattr(
        _configs, "candidates", lambda kernel, shape=None: [LEVEL, WRONG, LARGE, FAST]
    )
    _plan_table.reload()
    return found


def put(table: Path, *entries: dict[str, Any]) -> None:
    table.write_text(_plan_table.text_of(entries))
    _plan_table.reload()


def as_json(config: Config) -> dict[str, int]:
    found: dict[str, int] = vars(config)
    return found


def test_the_fast_is_taken_the_wrong_named_the_large_counted(
    table: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.ms |= {("fwd", FAST): 0.5, ("fwd", LEVEL): 0.8, ("dgrad", FAST): 0.6}
    world.ms |= {("fwd", WRONG): 0.1, ("wgrad", FAST): 0.97}  # of 1.6, with dgrad: noise
    assert main(["tune", "--batch", "2"]) == 1
    said = capsys.readouterr().out
    assert world.checked[WRONG] == 6 and not world.timed[WRONG]
    assert world.checked[LARGE] == 6 and not world.timed[LARGE]
    assert world.timed[FAST] and world.timed[RULE]
    wrong = [line for line in said.splitlines() if line.startswith("WRONG")]
    assert len(wrong) == 6
    assert (
        "WRONG  dgrad, 2x56x64x256x1x1, float32, fusedres-triton 64x16x16/4/1, fused: "
        "error 1.0e+00 (allowed: 1.0e-05)"
    ) in wrong
    assert "30 configurations tried, of which some do not run here: 6 OutOfResources" in said
    entries = _plan_table.user_entries()
    assert len(entries) == 2
    for entry in entries:
        assert entry["configs"] == {"fwd": as_json(FAST), "dgrad": as_json(FAST)}
        assert entry["plan"] == "fused" and entry["source"] == "measured"
        assert entry["rows"] == [2 * 56 * 56 // 4, None]
    where = "new  cpu, float32, 64 -> 256, 1x1/1, batch 2"
    assert f"{where}: plan split -> fused, {1 - 2.1 / 200:.1%} less time" in said
    assert f"{where}: fwd 256x16x16/4/1 -> 16x16x16/4/1, 50.0% less time" in said
    assert f"{where}: dgrad 256x16x16/4/1 -> 16x16x16/4/1, 20.0% less time" in said
    assert "wgrad" not in "".join(x for x in said.splitlines() if x.startswith("new"))
    saved = 2 * 3 * (200 - 2.1)
    assert f"a training step of batch 2 saves {saved:.3f} ms by it (cpu, float32)" in said
    rows = results.read([table.with_suffix(".rows.json")])
    assert Counter(row["section"] for row in rows)["tuned"] == 2
    failed = [row for row in rows if "wrong" in row]
    assert len(failed) == 6 and not any("ms" in row for row in failed)
    assert entries_from(rows) == entries


def test_without_a_wrong_result_the_exit_code_is_0(
    table: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_configs, "candidates", lambda *_: [LEVEL, LARGE])
    assert main(["tune", "--batch", "2"]) == 0
    assert [e["configs"] for e in _plan_table.user_entries()] == [{}, {}]


@pytest.mark.parametrize(
    ("median", "p80", "taken"),
    [
        (0.97, 0.99, True),
        (0.985, 0.99, False),  # less than the margin
        (0.5, 1.01, False),  # not ahead in four rounds of five
    ],
)
def test_noise_is_no_gain(
    median: float,
    p80: float,
    taken: bool,
    table: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versus = sweep._Bench.versus

    def told(bench: Any, now: Any, new: Any, row: Any) -> Any:
        return versus(bench, now, new, row) | {"ratio": median, "ratio_p80": p80}

    monkeypatch.setattr(_configs, "candidates", lambda *_: [FAST])
    monkeypatch.setattr(sweep._Bench, "versus", told)
    main(["tune", "--batch", "2"])
    found = [set(entry["configs"]) for entry in _plan_table.user_entries()]
    assert found == [{"fwd", "dgrad", "wgrad"} if taken else set()] * 2


def test_times_are_held_against_those_of_the_same_round(
    table: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that becomes ten times slower changes no ratio."""
    monkeypatch.setattr(_configs, "candidates", lambda *_: [FAST])
    world.ms = {("fwd", FAST): 0.97}
    world.moods = [1.0] * 13 + [10.0] * 200
    main(["tune", "--batch", "2"])
    tried = [r for r in results.read([table.with_suffix(".rows.json")]) if "ratio_p20" in r]
    forward = [r for r in tried if r["section"] == "configs" and r["case"] == "fwd"]
    assert forward and all(row["against"] == "now" for row in forward)
    assert all(row["ratio"] == pytest.approx(0.97, rel=0.01) for row in forward)


def test_the_luckiest_is_timed_once_more(
    table: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    versus, times = sweep._Bench.versus, Counter()

    def lucky_at_first(bench: Any, now: Any, new: Any, row: Any) -> Any:
        times[row["name"], row["case"], tuple(row["shape"])] += 1
        first = times[row["name"], row["case"], tuple(row["shape"])] == 1
        told = 0.5 if first and row["config"] == as_json(FAST) else 1.0
        return versus(bench, now, new, row) | {"ratio": told, "ratio_p80": told}

    monkeypatch.setattr(sweep._Bench, "versus", lucky_at_first)
    main(["tune", "--batch", "2"])
    assert [entry["configs"] for entry in _plan_table.user_entries()] == [{}, {}]


def test_what_is_in_force_by_the_table_stays_unless_it_is_beaten(
    table: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    put(table, OF_CONV3 | {"plan": "fused", "configs": {"fwd": as_json(LEVEL)}})
    world.ms = {("fwd", LEVEL): 0.5, ("fwd", FAST): 0.7}  # faster than the rule's 1.0 alone
    main(["tune", "--batch", "2"])
    said = capsys.readouterr().out
    found = {e["in_channels"]: e["configs"] for e in _plan_table.user_entries()}
    assert found == {64: {"fwd": as_json(LEVEL)}, 256: {"fwd": as_json(LEVEL)}}
    assert "64 -> 256, 1x1/1, batch 2: fwd" not in said
    assert "256 -> 64, 1x1/1, batch 2: fwd 256x16x16/4/1 -> 32x16x16/4/1" in said
    capsys.readouterr()
    put(table, *_plan_table.user_entries())
    sweep_again = main(["tune", "--batch", "2"])
    assert sweep_again == 1  # the wrong one is still wrong
    assert {e["in_channels"]: e["configs"] for e in _plan_table.user_entries()} == found


def test_unchanged_layers_are_counted(
    table: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world.split = 0.1
    main(["tune", "--batch", "2"])
    said = capsys.readouterr().out
    assert "new  " not in said and "2 as before" in said and "saves" not in said


def test_where_the_one_in_force_is_wrong_a_right_one_is_taken_however_slow(
    table: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_configs, "rule", lambda *_: WRONG)
    monkeypatch.setattr(_configs, "candidates", lambda *_: [LARGE, FAST])
    _plan_table.reload()
    world.ms = {("fwd", FAST): 50.0}
    assert main(["tune", "--batch", "2"]) == 1
    taken = dict.fromkeys(("fwd", "dgrad", "wgrad"), as_json(FAST))
    assert [entry["configs"] for entry in _plan_table.user_entries()] == [taken, taken]
    named = [x for x in capsys.readouterr().out.splitlines() if x.startswith("WRONG")]
    assert len(named) == 6 and all("64x16x16/4/1" in line for line in named)  # it alone
    assert not world.timed[WRONG]


# --- how long it may take -------------------------------------------------------------------------


def test_a_budget_expects_as_much_as_the_longest_of_the_last_ten() -> None:
    now = [0.0]
    budget = Budget(100.0, lambda: now[0])
    assert budget.allows("plans") and budget.allows("plans", "configuration")
    for seconds in (30.0, 1.0):
        with budget.measuring("plans"):
            now[0] += seconds
    assert budget.allows("plans") and budget.allows("plans", "plans")
    assert not budget.allows("plans", "plans", "plans")
    for _ in range(10):
        with budget.measuring("plans"):
            now[0] += 0.5
    assert budget.allows("plans", "plans", "plans")
    now[0] = 100.0
    assert not budget.allows("configuration")


def test_the_budget_is_kept_and_what_is_not_reached_keeps_its_entries(
    table: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    put(table, OF_CONV3 | {"plan": "split"}, OF_CONV1 | {"plan": "split"})
    world.ms = {("fwd", FAST): 0.5}
    world.seconds_of_a_run = 1.0
    main(["tune", "--batch", "2", "--budget", "3"])  # a layer takes more than two minutes
    said = capsys.readouterr().out
    assert 120 < world.now <= 180 + 20  # what runs to its end was expected to take less
    assert "not reached in 3 minutes: 1\n  layer1.1.conv1 (256 -> 64, 1x1/1), batch 2\n" in said
    entries = _plan_table.user_entries()
    # of the first layer, what smaller batches keep; the second as it was
    assert entries[1:] == [spanned(OF_CONV3, 0, 1567, plan="split"), OF_CONV1 | {"plan": "split"}]
    assert entries[0]["plan"] == "fused" and entries[0]["in_channels"] == 64


def test_a_layer_that_is_cut_short_compares_its_plans_all_the_same(
    table: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.ms = {("fwd", FAST): 0.5}
    world.seconds_of_a_run = 2.0
    main(["tune", "--batch", "2", "--budget", "3"])
    said = capsys.readouterr().out
    (entry,) = _plan_table.user_entries()
    assert entry["plan"] == "fused" and "configurations were not reached" in said
    assert "not reached in 3 minutes: 1" in said


def test_a_killed_run_leaves_a_table_and_another_goes_on(
    table: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, ran = tune.tune_site, []

    def killed_in_the_second(site: Site, *rest: Any) -> bool:
        ran.append(site.layer.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return tuned(site, *rest)

    world.ms = {("fwd", FAST): 0.5}
    monkeypatch.setattr(tune, "tune_site", killed_in_the_second)
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    with pytest.raises(KeyboardInterrupt):
        tune.COMMAND.run(parser.parse_args(["--batch", "2"]))
    (first,) = _plan_table.entries_of(table.read_text())
    assert first["configs"] == {"fwd": as_json(FAST)}
    main(["tune", "--batch", "2", "--resume"])
    assert ran == ["layer1.1.conv3", "layer1.1.conv1", "layer1.1.conv1"]
    assert first in _plan_table.user_entries() and len(_plan_table.user_entries()) == 2
    main(["tune", "--batch", "2"])
    assert len(ran) == 5  # without --resume all is measured anew


def test_a_run_at_another_size_keeps_what_was_measured_before(
    table: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though its own entry would hold for all larger sizes; and it speaks of its own layers."""
    world.ms = {("fwd", FAST): 0.5}
    main(["tune", "--batch", "64"])
    world.split = 0.1
    capsys.readouterr()
    main(["tune", "--batch", "2"])
    assert "batch 64" not in capsys.readouterr().out
    for channels, filters in ((64, 256), (256, 64)):
        shape = _plan_table.Shape(channels, filters, (1, 1), (1, 1))
        found = [
            _plan_table.lookup("cpu", torch.float32, shape._replace(rows=batch * 56 * 56))
            for batch in (2, 64)
        ]
        assert [entry and entry["plan"] for entry in found] == ["split", "fused"]


def test_a_device_that_broke_ends_the_run_and_names_the_reason(
    table: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(setting: Setting, what: str) -> None:
        raise sweep.DeviceLostError(f"{what}: illegal memory access")

    monkeypatch.setattr(sweep, "_check_device", lost)
    monkeypatch.setattr(_configs, "candidates", lambda *_: [LEVEL, LARGE])
    assert main(["tune", "--batch", "2"]) == 1
    said = capsys.readouterr().out
    assert "WRONG  fwd fusedres-triton 128x16x16/4/1" in said and "illegal memory access" in said
    assert not table.exists()  # no layer was done
    assert results.read([table.with_suffix(".rows.json")])


def test_layers_come_batch_by_batch_and_the_largest_share_first() -> None:
    sites = [
        (Site(layer, batch, torch.bfloat16, CPU), count)
        for batch in (256, 32)
        for layer, count in distinct(layers())
        if layer.kernel == 1
    ]
    found = tune.in_order(sites)
    assert sorted(s.layer.name for s, _ in found) == sorted(s.layer.name for s, _ in sites)
    batches = [site.batch for site, _ in found]
    assert batches == [256] * 15 + [32] * 15
    seconds = [
        count
        * sum(max(c.bytes / 3e12, c.flops / 5e14) for c in map(site.case, site.training, [1] * 2))
        for site, count in found
    ]
    assert seconds[:15] == sorted(seconds[:15], reverse=True)
    assert seconds[15:] == sorted(seconds[15:], reverse=True)
    once = tune.in_order([(site, 1) for site, _ in sites])
    assert [site for site, _ in once] != [site for site, _ in found]  # how many there are counts


# --- what a layer offers --------------------------------------------------------------------------


def test_plans_and_kernels_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = {layer.name: layer for layer in layers()}
    pointwise, spatial = by_name["layer1.0.conv3"], by_name["layer1.0.conv2"]
    assert plans_of(pointwise, "triton") == ("fused", "split", "fused+merged")
    assert plans_of(by_name["layer1.1.conv1"], "triton")[2:] == ("fused+masks", "fused+merged")
    assert plans_of(by_name["layer3.1.conv3"], "triton") == ("fused", "split")
    assert plans_of(spatial, "triton") == ("fused", "epilogue", "split")
    assert plans_of(by_name["conv1"], "triton") == ("fused", "split")
    assert plans_of(pointwise, "cuda") == ("split",)
    assert kernels_of(pointwise, "triton") == (*KERNELS, Tuned("bwd", "fused+merged", "bwd"))
    assert kernels_of(spatial, "triton") == (*KERNELS, Tuned("fwd_plain", "epilogue", "fwd"))
    assert kernels_of(pointwise, "cuda") == ()
    gpu, half = torch.device("cuda", 0), torch.bfloat16
    for runs in ((), ("mma",), ("mma", "wgmma")):
        monkeypatch.setattr(
            backends, "product_problem", lambda p, _, runs=runs: None if p in runs else "off here"
        )
        products = (*(f"fused+{product}" for product in runs), "split")
        assert plans_of(pointwise, "cuda", half, gpu) == products
        assert all(map(_plan_table.is_plan, products))
        strided = by_name["layer2.0.downsample.0"]
        for layer, dtype in ((spatial, half), (strided, half), (pointwise, torch.float32)):
            assert plans_of(layer, "cuda", dtype, gpu) == ("split",)
        assert plans_of(pointwise, "cuda", half, CPU) == ("split",)
    for layer in by_name.values():  # what is swept is timed in a plan and a direction that exist
        site = Site(layer, 2, torch.bfloat16, CPU)
        for kernel in kernels_of(layer, "triton"):
            assert kernel.plan in plans_of(layer, "triton") and kernel.direction in site.training
        assert all(map(_plan_table.is_plan, plans_of(layer, "triton")))


def test_the_layers_that_leave_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "own_backends", lambda *_: ["cuda", "triton"])
    found = tune.sites_of(CPU, torch.bfloat16, (256, 32))
    pointwise = [(site, count) for site, count in found if site.layer.kernel == 1]
    assert len(pointwise) == 30 and sum(count for _, count in pointwise) == 72
    monkeypatch.setattr(tune, "own_backends", lambda *_: ["cuda"])
    assert tune.sites_of(CPU, torch.bfloat16, (256,)) == []


def test_memory_is_poisoned_while_a_configuration_is_checked() -> None:
    like = torch.ones(4, 4)
    with sweep._poisoned():
        for made in (torch.empty(64), torch.empty_like(like), like.new_empty(3)):
            assert made.isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


# --- tables that were there before ----------------------------------------------------------------


def spanned(entry: dict[str, Any], least: int, most: int | None, **more: Any) -> dict[str, Any]:
    return entry | {"rows": [least, most]} | more


def test_new_entries_cut_old_ones_down_to_what_they_do_not_speak_of() -> None:
    old = [
        spanned(OF_CONV3, 0, 1000, plan="split"),
        spanned(OF_CONV3, 1001, None, plan="split"),
        OF_CONV1 | {"plan": "fused"},
    ]
    new = [spanned(OF_CONV3, 500, None, plan="fused", configs={}, source="measured")]
    found, kept = merged(new, old)
    assert found == new
    assert kept == [spanned(OF_CONV3, 0, 499, plan="split"), old[2]]
    inside = [spanned(OF_CONV1, 10, 20, plan="split", configs={})]
    _, kept = merged(inside, old[2:])
    assert [entry["rows"] for entry in kept] == [[0, 9], [21, None]]
    modelled = spanned(OF_CONV3, 0, None, plan="split", source="model")
    assert merged(new, [modelled])[1] == [modelled]  # asked last, it does no harm


def test_configurations_of_old_entries_stay_where_no_kernel_was_swept() -> None:
    one, two = {"fwd": as_json(FAST)}, {"fwd": as_json(LEVEL)}
    old = [
        spanned(OF_CONV3, 0, 99, plan="split", configs=one),
        spanned(OF_CONV3, 100, 999, plan="split", configs=two),
    ]
    new = spanned(OF_CONV3, 50, None, plan="fused", source="measured")
    found, kept = merged([new], old)
    assert sorted(((e["rows"], e.get("configs")) for e in found), key=lambda e: e[0][0]) == [
        ([50, 99], one),
        ([100, 999], two),
        ([1000, None], None),
    ]
    assert kept == [spanned(OF_CONV3, 0, 49, plan="split", configs=one)]
    found, _ = merged([new | {"configs": {}}], old)
    assert found == [new | {"configs": {}}]


def test_sizes_with_other_configurations_part() -> None:
    rows = []
    for batch, config in ((8, FAST), (64, LEVEL)):
        base = {"shape": [batch, 56, 64, 256, 1, 1], "batch": batch, "count": 4}
        base |= {"dtype": "bfloat16", "device": "NVIDIA H200"}
        for plan, ms in (("fused", 1.0), ("split", 2.0)):
            about = {"section": "conv_bn", "name": "fusedres-triton", "backend": "triton"}
            both = [base | about | {"plan": plan, "case": c, "ms": ms} for c in ("fwd", "bwd")]
            rows += both
        tuned = {"section": "tuned", "case": "", "name": "fusedres-tune", "plan": None}
        found = {"configs": {"fwd": as_json(config)}, "gains": {"fwd": 0.9}, "missed": 0}
        rows.append(base | tuned | found | {"was": {"plan": "fused", "configs": {}}})
    first, second = entries_from(rows)
    assert (first["configs"], second["configs"]) == (
        {"fwd": as_json(FAST)},
        {"fwd": as_json(LEVEL)},
    )
    assert first["rows"][1] + 1 == second["rows"][0] and second["rows"][1] is None
    changed = changes_of(rows, lambda *_: None)
    assert [change.what for change in changed.changed] == ["fwd", "fwd"]
    assert changed.saved == {}  # nobody timed how it ran before


def test_the_image_has_no_gradient() -> None:
    base = {"section": "conv_bn", "shape": [8, 224, 3, 64, 7, 2], "batch": 8, "count": 1}
    base |= {"dtype": "bfloat16", "device": "NVIDIA H200", "name": "fusedres-triton"}
    rows = [
        base | {"backend": "triton", "plan": plan, "case": case, "ms": ms}
        for plan, ms in (("epilogue", 1.0), ("split", 2.0))
        for case in ("fwd", "wgrad")
    ]
    plans = {entry["plan"] for entry in entries_from(rows)}
    assert plans == {"epilogue"}


def test_a_step_saves_what_its_layers_do_as_often_as_they_come(
    table: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.ms = {("fwd", FAST): 0.5}
    main(["tune", "--batch", "2"])
    rows = results.read([table.with_suffix(".rows.json")])
    found = changes_of(rows, lambda *_: None)
    assert found.saved == {("cpu", "float32", 2): pytest.approx(2 * 3 * (200 - 2.5))}


def test_the_models_entries_are_written_behind_the_measured_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan_table.json"
    measured = OF_CONV3 | {"plan": "split", "source": "measured"}
    stale = OF_CONV1 | {"plan": "fused", "source": "model"}
    path.write_text(_plan_table.text_of([stale, measured]))
    assert main(["tune", "--model", "--out", str(path)]) == 0
    entries = json.loads(path.read_text())["entries"]
    assert entries[0] == measured and stale not in entries
    assert {entry["device"] for entry in entries[1:]} == set(DEVICES)
    assert f"{len(entries) - 1} entries by the model, 1 measured, in {path}" in (
        capsys.readouterr().out
    )
    assert main(["tune", "--model"]) == 2


def test_backends_of_the_real_world_are_asked_how_a_layer_runs(table: Path) -> None:
    with use_backend("reference"):
        assert sweep._way_now(Site(LAYERS[0], 2, torch.float32, CPU)) == ("reference", "split")
