"""`fusedres tune` from end to end on layers small enough for Triton's interpreter; test_triton.py
runs it in a process of its own, with TRITON_INTERPRET=1.

Times mean nothing here. What counts: which configurations are timed, which are named, and what
is in the table afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fusedres import _plan_table, use_backend
from fusedres._tensors import INTERPRETED
from fusedres.bench import convolutions, light, measure, sweep
from fusedres.bench import rows as results
from fusedres.bench.convolutions import Site
from fusedres.bench.measure import Setting
from fusedres.bench.roofline import Layer
from fusedres.cli import main, tune
from fusedres.triton_kernels import _configs, _pointwise
from fusedres.triton_kernels._configs import Config

assert INTERPRETED, "run by test_triton.py"
CPU = torch.device("cpu")
RIGHT, WRONG, SILENT, LARGE = (Config(bm, 16, 16, 4, 1) for bm in (16, 32, 64, 128))
LAYERS = (
    Layer("stage 1", "layer1.1.conv3", "conv3", 4, 8, 16, 1, 1),
    Layer("stage 1", "layer1.1.conv1", "conv1", 4, 16, 8, 1, 1),
)
SETTING = Setting(CPU, 3, 5.0, 1e-6, 1, {"device": "cpu", "commit": "c", "time": "2026-01-01"})
FULL = {"BM": 16, "BN": 16, "BK": 16, "num_warps": 4, "num_stages": 1}


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Watch:
    """What the kernels are launched with, and by whom."""

    def __init__(self) -> None:
        self.timing = False
        self.timed: set[Config] = set()
        self.checked: set[Config] = set()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's table, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _plan_table.reload()
    yield tmp_path / "fusedres" / "plan_table.json"
    monkeypatch.undo()
    _plan_table.reload()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A sweep of the two layers, with kernels of which some configurations are broken."""
    found = Watch()
    right, compare = _pointwise.launch, sweep.compare

    def launch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=True))
        blocks = (named[side] for side in ("BM", "BN", "BK"))
        block = Config(*blocks, options["num_warps"], options["num_stages"])
        (found.timed if found.timing else found.checked).add(block)
        if block == LARGE:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if block == SILENT:  # the result of the run before may still be in memory
            return
        right(kernel, grid, *args, **options)
        if block == WRONG:
            for name in ("y", "g_in", "part"):
                if isinstance(named.get(name), torch.Tensor):
                    named[name].mul_(1.5)

    def timed(*args: Any, **options: Any) -> Any:
        found.timing = True
        try:
            return compare(*args, **options)
        finally:
            found.timing = False

    def sites(device: torch.device, dtype: torch.dtype, batches: Any) -> list[tuple[Site, int]]:
        return [(Site(layer, 1, dtype, device), 2) for layer in LAYERS]

    monkeypatch.setattr(_pointwise, "launch", launch)
    monkeypatch.setattr(sweep, "compare", timed)
    for module in (convolutions, measure, sweep, tune):
        monkeypatch.setattr(module, "own_backends", lambda *_: ["triton"])
    monkeypatch.setattr(light, "own_backends", lambda *_: [])
    monkeypatch.setattr(tune, "sites_of", sites)
    monkeypatch.setattr(tune, "prepare", lambda _: None)
    monkeypatch.setattr(tune, "setting_for", lambda *_: SETTING)
    monkeypatch.setattr(tune, "light_cases", lambda *_: [])
    monkeypatch.setattr(
        _configs, "candidates", lambda kernel, shape=None: [RIGHT, WRONG, SILENT, LARGE]
    )
    return found


@pytest.fixture
def ratio(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the times of a configuration are to be, over those of the one in force: by its words."""
    given: dict[str, float] = {}
    versus = sweep._Bench.versus

    def told(self: Any, now: Any, new: Any, row: Any) -> Any:
        found = versus(self, now, new, row)
        told = given.get(row["case"], 1.0)
        return found | {"ratio": told, "ratio_p20": told, "ratio_p80": told}

    monkeypatch.setattr(sweep._Bench, "versus", told)
    return given


def test_a_sweep(
    table: Path, watch: Watch, ratio: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """The wrong are named and never timed, the too large counted, the fast one taken."""
    ratio |= {"fwd": 0.9, "dgrad": 0.99, "wgrad": 0.8}  # a hundredth is noise
    kept = {"device": "cpu", "dtype": "float32", "in_channels": 9, "out_channels": 9}
    kept |= {"kernel": [1, 1], "stride": [1, 1], "plan": "split"}
    table.parent.mkdir()
    table.write_text(_plan_table.text_of([kept]))
    _plan_table.reload()
    with use_backend("triton"):
        assert main(["tune", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert {WRONG, SILENT, LARGE, RIGHT} <= watch.checked
    assert RIGHT in watch.timed
    assert not watch.timed & {WRONG, SILENT, LARGE}
    named = [line for line in said.splitlines() if line.startswith("WRONG")]
    assert len(named) == 2 * 2 * 3  # two configurations, layers, three kernels
    assert any("dgrad, 1x4x8x16x1x1, float32, fusedres-triton 32x16x16/4/1" in x for x in named)
    assert all("error" in line and "allowed" in line or "error inf" in line for line in named)
    assert "6 OutOfResources" in said
    entries = {e["in_channels"]: e for e in json.loads(table.read_text())["entries"]}
    assert entries[9] == kept
    for channels in (8, 16):
        assert entries[channels]["configs"] == {"fwd": FULL, "wgrad": FULL}
        assert entries[channels]["source"] == "measured"
        assert entries[channels]["plan"] in ("fused", "split")
    assert "cpu, float32, 8 -> 16, 1x1/1, batch 1: fwd " in said
    assert " -> 16x16x16/4/1, 10.0% of the time less" in said and "20.0%" in said
    assert "dgrad 64x" not in said  # no change of it is told
    assert "a training step of batch 1 saves" in said
    assert "2 entries measured, 1 kept" in said
    rows = results.read([table.with_suffix(".rows.json")])
    wrong = [row for row in rows if "wrong" in row]
    assert len(wrong) == 12 and all("ms" not in row for row in wrong)


def test_a_second_run_holds_candidates_against_what_the_first_one_took(
    table: Path, watch: Watch, ratio: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is in force stays where nothing beats it, and is said to stay."""
    ratio |= {"fwd": 0.9, "wgrad": 0.8}
    with use_backend("triton"):
        main(["tune", "--device", "cpu"])
        first = {e["in_channels"]: e["configs"] for e in _plan_table.user_entries()}
        ratio |= {"fwd": 1.0, "wgrad": 1.0}
        capsys.readouterr()
        main(["tune", "--device", "cpu"])
    assert {e["in_channels"]: e["configs"] for e in _plan_table.user_entries()} == first
    said = capsys.readouterr().out
    assert ": fwd " not in said and ": wgrad " not in said


def test_a_run_that_is_killed_leaves_a_table_and_another_goes_on(
    table: Path,
    watch: Watch,
    ratio: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ratio |= {"fwd": 0.5}
    tuned, ran = tune.tune_site, []

    def killed_in_the_second(site: Site, *rest: Any) -> bool:
        ran.append(site.layer.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return tuned(site, *rest)

    monkeypatch.setattr(tune, "tune_site", killed_in_the_second)
    with use_backend("triton"):
        with pytest.raises(KeyboardInterrupt):
            tune.COMMAND.run(arguments("--device", "cpu"))
        first = _plan_table.entries_of(table.read_text())
        assert len(first) == 1 and first[0]["configs"] == {"fwd": FULL}
        main(["tune", "--device", "cpu", "--resume"])
    assert ran[1:] == [ran[1]] * 2 and ran[0] != ran[1]
    assert first[0] in _plan_table.user_entries() and len(_plan_table.user_entries()) == 2


def arguments(*given: str) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args(given)


def test_the_budget_is_kept(
    table: Path,
    watch: Watch,
    ratio: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every check takes ten seconds, every comparison of plans twenty: the second layer does not
    fit into two minutes, and its old entry stays.
    """
    clock, starts = Clock(), []
    checked, plan_rows = sweep._Sweep._checked, sweep._plan_rows

    def slowly(function: Any, seconds: float) -> Any:
        def slow(*args: Any) -> Any:
            starts.append((clock.now, seconds))
            clock.now += seconds
            return function(*args)

        return slow

    old = {"device": "cpu", "dtype": "float32", "in_channels": 8, "out_channels": 16}
    old |= {"kernel": [1, 1], "stride": [1, 1], "plan": "fused"}
    other = old | {"in_channels": 16, "out_channels": 8}
    table.parent.mkdir()
    table.write_text(_plan_table.text_of([old, other]))
    _plan_table.reload()
    monkeypatch.setattr(sweep._Sweep, "_checked", slowly(checked, 10))
    monkeypatch.setattr(sweep, "_plan_rows", slowly(plan_rows, 20))
    monkeypatch.setattr(tune, "Budget", lambda seconds: sweep.Budget(seconds, clock))
    with use_backend("triton"):
        main(["tune", "--device", "cpu", "--budget", "2"])
    said = capsys.readouterr().out
    assert len(starts) > 5 and all(at + seconds <= 120 for at, seconds in starts)
    assert "not reached in 2 minutes: 1" in said and "layer1.1." in said
    assert "configurations were not reached" in said
    entries = _plan_table.user_entries()
    measured = [entry for entry in entries if entry.get("source") == "measured"]
    assert len(measured) == 1
    (left,) = [e for e in (old, other) if e["in_channels"] != measured[0]["in_channels"]]
    assert left in entries


def test_what_is_in_force_may_be_the_wrong_one(
    table: Path, watch: Watch, ratio: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the right one is taken, however fast."""
    monkeypatch.setattr(_configs, "rule", lambda *_: WRONG)
    _plan_table.reload()
    with use_backend("triton"):
        assert main(["tune", "--device", "cpu"]) == 1
    assert all(
        e["configs"] == dict.fromkeys(("fwd", "dgrad", "wgrad"), FULL)
        for e in _plan_table.user_entries()
    )
    assert WRONG not in watch.timed
