"""`fusedres tune` from end to end on layers small enough for Triton's interpreter; test_triton.py
runs it in a process of its own, with TRITON_INTERPRET=1.

Times mean nothing here. What counts: which configurations are timed, which are named, and what
is in the table afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fusedres import _plan_table, use_backend
from fusedres._tensors import INTERPRETED
from fusedres.bench import convolutions, light, measure, ops, sweep
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
SETTING = Setting(CPU, 2, 5.0, 1e-6, 1, {"device": "cpu", "commit": "c", "time": "2026-01-01"})
RESULTS = {
    "conv_bn_fwd_kernel": "y_ptr",
    "conv_bn_dgrad_kernel": "g_in_ptr",
    "conv_bn_wgrad_kernel": "part_ptr",
}
KERNELS = {"fwd", "dgrad", "wgrad"}
FULL = {"BM": 16, "BN": 16, "BK": 16, "num_warps": 4, "num_stages": 1, "programs": 0}


class Watch:
    """What the kernels are launched with, and by whom."""

    def __init__(self) -> None:
        self.layer = LAYERS[0]
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
    """A sweep of one layer, with kernels of which some configurations are broken."""
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
            named[RESULTS[kernel.fn.__name__]].mul_(1.5)

    def timed(*args: Any, **options: Any) -> Any:
        found.timing = True
        try:
            return compare(*args, **options, warmup=0)
        finally:
            found.timing = False

    def sites(device: torch.device, dtype: torch.dtype, batches: Any) -> list[tuple[Site, int]]:
        return [(Site(found.layer, 1, dtype, device), 2)]

    for module in (sweep, ops):  # the interpreter is slow
        monkeypatch.setattr(module, "repeats", lambda *_: 1)
    monkeypatch.setattr(ops, "compare", partial(compare, warmup=0))
    monkeypatch.setattr(_pointwise, "launch", launch)
    monkeypatch.setattr(sweep, "compare", timed)
    for module in (convolutions, measure, sweep, tune):
        monkeypatch.setattr(module, "own_backends", lambda *_: ["triton"])
    monkeypatch.setattr(light, "own_backends", lambda *_: [])
    monkeypatch.setattr(convolutions, "_with_options", lambda _: [])
    monkeypatch.setattr(tune, "sites_of", sites)
    monkeypatch.setattr(tune, "prepare", lambda _: None)
    monkeypatch.setattr(tune, "setting_for", lambda *_: SETTING)
    monkeypatch.setattr(tune, "light_cases", lambda *_: [])
    monkeypatch.setattr(
        _configs, "candidates", lambda kernel, shape=None: [RIGHT, WRONG, SILENT, LARGE]
    )
    return found


def named(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("WRONG")]


def test_a_sweep(table: Path, watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    """The wrong are named and never timed, the too large counted; the rest is timed, and the table
    is one that the kernels take.
    """
    with use_backend("triton"):
        assert main(["tune", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert {WRONG, SILENT, LARGE, RIGHT} <= watch.checked
    assert RIGHT in watch.timed and not watch.timed & {WRONG, SILENT, LARGE}
    assert len(named(said)) == 2 * 3  # two configurations, three kernels
    start = "WRONG  dgrad, 1x4x8x16x1x1, float32, fusedres-triton 32x16x16/4/1, fused: error "
    assert any(line.startswith(start) for line in named(said))
    assert "15 configurations tried" in said and "3 OutOfResources" in said
    (entry,) = _plan_table.user_entries()
    assert set(entry["configs"]) <= KERNELS
    assert all(config == FULL for config in entry["configs"].values())
    rows = results.read([table.with_suffix(".rows.json")])
    wrong = [row for row in rows if "wrong" in row]
    assert len(wrong) == 6 and all("ms" not in row for row in wrong)
    assert all(math.isinf(r["max_error"]) for r in wrong if r["config"]["BM"] == SILENT.BM)
    assert (
        main(["bench", "report", str(table.with_suffix(".rows.json")), "--out", str(table.parent)])
        == 0
    )


def test_what_is_in_force_may_be_the_wrong_one(
    table: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then the right one is taken, however fast, and nothing else is blamed."""
    watch.layer = LAYERS[1]
    monkeypatch.setattr(_configs, "rule", lambda *_: SILENT)
    monkeypatch.setattr(_configs, "candidates", lambda *_: [LARGE, RIGHT])
    _plan_table.reload()
    with use_backend("triton"):
        assert main(["tune", "--device", "cpu"]) == 1
    (entry,) = _plan_table.user_entries()
    assert entry["configs"] == dict.fromkeys(KERNELS, FULL)
    assert SILENT not in watch.timed
    said = named(capsys.readouterr().out)
    assert len(said) == 3 and all("64x16x16/4/1" in line for line in said)
