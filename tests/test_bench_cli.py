"""fusedres bench and fusedres tune, as typed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench_verdict import LIMIT, both, passes, row

from fusedres import _plan_table
from fusedres.bench import rows as results
from fusedres.bench.measure import Ceilings, Job, Measured, Setting, is_done
from fusedres.cli import bench, main, tune
from fusedres.info import info

info_module = importlib.import_module("fusedres.info")  # the module, not the function

ROW = {"section": "train", "case": "resnet50", "shape": [4, 3, 224, 224], "batch": 4}
ROW |= {"dtype": "float32", "device": "cpu", "plan": None, "backend": None, "against": "eager"}


def network(name: str, ratio: float, **fields: Any) -> results.Row:
    times = {"ms": 10 * ratio, "p20": 9 * ratio, "p80": 11 * ratio, "ratio": ratio}
    errors = {"max_error": 1e-6, "grad_error": 1e-3}
    ratios = {"ratio_p20": ratio * 0.98, "ratio_p80": ratio * 1.02}
    return ROW | {"name": name} | times | ratios | errors | fields


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[results.Row]:
    """What the only job of every suite will give, instead of minutes of measuring."""
    found = [network("eager", 1.0), network("fusedres-cpp", 1.25)]

    def jobs_of(suite: str, *_: Any) -> list[Job]:
        about = {f: ROW[f] for f in ("section", "case", "shape", "dtype", "batch")}
        names = ("eager", "fusedres-cpp")

        def run_it(_: Setting) -> list[Measured]:
            if not found:
                raise OSError("no space\nat all")
            return [Measured(row) for row in found]

        job = Job(about, "batch 4", names, run_it)
        return [job] if suite == "model" else []

    def with_ceilings(setting: Setting, _: torch.dtype) -> tuple[Setting, list[Measured]]:
        name = {"section": "ceilings", "case": "", "shape": [], "name": "copy", "dtype": "float32"}
        return setting, [Measured(name | {"device": "cpu", "gb_s": 10.0})]

    monkeypatch.setattr(bench, "jobs_of", jobs_of)
    monkeypatch.setattr(bench, "with_ceilings", with_ceilings)
    monkeypatch.setattr(bench, "prepare", lambda device: None)
    return found


def test_rows_go_to_the_file_in_the_place_of_older_ones(
    measured: list[results.Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    other = network("eager", 1.0, batch=16)
    results.write(out, [other, network("eager", 9.0)])
    assert main(["bench", "--suite", "model", "--out", str(out)]) == 0
    rows = results.read([out])
    assert [(r["name"], r.get("batch"), r.get("ratio")) for r in rows] == [
        ("eager", 16, 1.0),
        ("copy", None, None),
        ("eager", 4, 1.0),
        ("fusedres-cpp", 4, 1.25),
    ]
    said = capsys.readouterr().out
    assert "0.80x as fast as eager (0.78 to 0.82)  train, resnet50" in said
    assert f"fusedres bench report {out}" in said


def test_a_wrong_result_of_ours_ends_in_an_error_code(
    measured: list[results.Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "--out", str(tmp_path / "rows.json")]
    measured[1]["max_error"] = 0.5
    assert main(command) == 1
    assert "WRONG          train, resnet50, 4x3x224x224, float32, fusedres-cpp" in (
        capsys.readouterr().out
    )
    measured[1] = {**ROW, "name": "compile", "error": "InductorError: no compiler"}
    assert main(command) == 0  # not ours
    assert "failed         train, resnet50" in capsys.readouterr().out


def test_a_job_that_fails_leaves_its_reason_and_one_that_is_done_is_left_out(
    measured: list[results.Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "--commit", "c0ffee", "--out", str(tmp_path / "rows.json")]
    for found in measured:
        found["commit"] = "c0ffee"
    assert main(command) == 0
    measured.clear()
    assert main([*command, "--resume"]) == 0
    assert "failed" not in capsys.readouterr().out
    assert main([*command[:1], "--commit", "decaf", *command[3:], "--resume"]) == 0
    said = capsys.readouterr().out
    assert said.count("failed         train, resnet50") == 2 and "OSError: no space\n" in said
    rows = results.read([tmp_path / "rows.json"])
    assert {row["error"] for row in rows if row["section"] == "train"} == {"OSError: no space"}


def test_a_job_is_done_where_all_its_rows_are_of_this_device_and_commit() -> None:
    about = {f: ROW[f] for f in ("section", "case", "shape", "dtype", "batch")}
    job = Job(about, "", ("eager", "fusedres-cpp"), lambda _: [])
    done = [network(name, 1.0, commit="c") for name in job.names]
    here = {"commit": "c", "device": "cpu"}
    assert is_done(job, done, here)
    assert not is_done(job, done[:1], here)
    assert not is_done(job, done, here | {"device": "NVIDIA H200"})
    assert not is_done(job, done, here | {"commit": "d"})
    assert not is_done(job, [row | {"batch": 9} for row in done], here)


def test_no_job_and_no_such_provider(
    measured: list[results.Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "rows.json")]
    assert main(["bench", "--suite", "model", "--providers", "convolution", *out]) == 2
    assert "'convolution', accepted:" in capsys.readouterr().err
    assert main(["bench", "--suite", "ops", "--only", "nothing", *out]) == 1
    assert "no job's title holds 'nothing'" in capsys.readouterr().err
    assert main(["bench", "--providers", "fusedres-opencl", *out]) == 2
    assert "--providers: provider: got 'fusedres-opencl', accepted:" in capsys.readouterr().err
    (tmp_path / "rows.json").write_text("{}")
    assert main(["bench", *out]) == 1
    assert "--out: " in capsys.readouterr().err


def written(path: Path, *rows: results.Row) -> str:
    results.write(path, rows)
    return str(path)


def test_compare_and_gate_end_in_an_error_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = written(tmp_path / "old.json", row(), row(name="eager"))
    slow = row(ms=2.0, p20=1.9, p80=2.1, ratio=0.9, ratio_p20=0.85, ratio_p80=0.95)
    new = written(tmp_path / "new.json", slow, row(name="eager"))
    assert main(["bench", "compare", old, old]) == 0
    assert "2 same, 0 faster, 0 slower, 0 wrong, 0 missing, 0 failed" in capsys.readouterr().out
    assert main(["bench", "compare", old, new]) == 1
    said = capsys.readouterr().out
    assert "slower    2.00x the time  light, bn_act_fwd, 2x64x8x8, float32, fusedres-cuda" in said
    assert main(["bench", "compare", old, new, "--margin", "1.5"]) == 0
    limits = tmp_path / "limits.json"
    limits.write_text(json.dumps([LIMIT]))
    assert main(["bench", "gate", old, str(limits)]) == 0
    assert main(["bench", "gate", new, str(limits)]) == 1
    assert "0.90 of eager's time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "none.json", "none.json"], "none.json"),
        (["gate", "rows.json", "rows.json"], "expected a list of limits"),
        (["report", "limits.json"], "limits.json: a row has no name"),
        (["compare", "rows.json", "other.json"], "no row in common"),
        (["compare", "rows.json", "rows.json", "--margin", "-1"], "--margin: must be a number"),
    ],
)
def test_files_that_do_not_serve(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "rows.json", row())
    written(tmp_path / "other.json", row(dtype="bfloat16"))
    (tmp_path / "limits.json").write_text('[{"section": "light"}]')
    assert main(["bench", *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_report_of_all_results_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "report"]) == 1
    assert "no result files below benchmarks/results" in capsys.readouterr().err
    written(
        tmp_path / "benchmarks/results/cpu/model.json",
        network("eager", 1.0),
        network("fusedres-cpp", 0.8),
    )
    (tmp_path / "benchmarks/results/cpu/signs.json").write_text('{"runs": []}')
    assert main(["bench", "report", "--out", "page"]) == 0
    assert "1.25x" in (tmp_path / "page" / "report.md").read_text()
    assert "fusedres-cpp" in (tmp_path / "page" / "report.html").read_text()


def test_a_profile_is_a_table_of_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def profile_step(*_: Any) -> list[results.Row]:
        part = {**ROW, "section": "profile", "case": "layer1.0.conv1", "name": "fwd", "ms": 1.5}
        part |= {
            "share": 0.25,
            "bytes": 2e6,
            "of_roofline": 0.5,
            "kernels": ["conv"],
            "plan": "split",
        }
        return [part, {**part, "case": "other", "bytes": None, "of_roofline": None, "kernels": []}]

    ceilings = Ceilings(1.0, 1.0)
    monkeypatch.setattr(bench, "profile_step", profile_step)
    monkeypatch.setattr(bench, "with_ceilings", lambda s, dtype: (s, []) if ceilings else None)
    out = tmp_path / "profile.json"
    assert main(["bench", "profile", "--device", "cpu", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "% of step" in lines[1] and "ms" not in lines[1].split()
    assert lines[2].split() == ["layer1.0.conv1", "fwd", "split", "25.0%", "2.0", "50%", "conv"]
    assert len(results.read([out])) == 2
    assert main(["bench", "profile", "--device", "cpu", "--provider", "fusedres-opencl"]) == 0


def test_a_profile_of_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "profile", "--device", "cpu", "--batch", "1", "--provider", "opencl"]
    assert main(command) == 1
    assert "--provider: provider: got 'opencl'" in capsys.readouterr().err


# --- tune -----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's table, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _plan_table.reload()
    yield tmp_path / "fusedres" / "plan_table.json"
    monkeypatch.undo()
    _plan_table.reload()


def test_tune_writes_the_users_table_which_comes_first(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = written(tmp_path / "a.json", *both(256, 1.0, 1.5), *passes(8, cuda=1.0, triton=2.0))
    assert main(["tune", "--from", files]) == 0
    said = capsys.readouterr().out
    assert f"2 entries measured, 0 kept, in {cache}" in said
    assert "1 as before" in said  # by the model it was fused too
    assert "new  NVIDIA H200, float32, bn_act (from 4,096 bytes): backend by rule -> cuda" in said
    shape = _plan_table.Shape(64, 256, (1, 1), (1, 1))
    entry = _plan_table.lookup("NVIDIA H200", torch.bfloat16, shape)
    assert entry is not None and entry["plan"] == "fused"
    # measured again, with another outcome: replaced, and what was not measured stays
    files = written(tmp_path / "b.json", *both(256, 2.0, 1.5))
    assert main(["tune", "--from", files]) == 0
    said = capsys.readouterr().out
    assert "1 entries measured, 1 kept" in said
    where = "NVIDIA H200, bfloat16, 64 -> 256, 1x1/1, batch 256"
    assert f"new  {where}: plan fused -> split, 25.0% less time" in said
    assert "a training step of batch 256 saves 1.500 ms by it (NVIDIA H200, bfloat16)" in said
    entry = _plan_table.lookup("NVIDIA H200", torch.bfloat16, shape)
    assert entry is not None and entry["plan"] == "split"
    assert _plan_table.light("NVIDIA H200", "bn_act", torch.float32) == ((4096, None, "cuda"),)


def test_configurations_outlive_a_new_plan(cache: Path, tmp_path: Path) -> None:
    main(["tune", "--from", written(tmp_path / "a.json", *both(256, 1.0, 1.5))])
    table = json.loads(cache.read_text())
    config = {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 2}
    table["entries"][0]["configs"] = {"fwd": config}
    cache.write_text(json.dumps(table))
    _plan_table.reload()
    main(["tune", "--from", written(tmp_path / "b.json", *both(256, 2.0, 1.5))])
    (entry,) = _plan_table.user_entries()
    assert entry["plan"] == "split" and entry["configs"] == {"fwd": config}


def test_clear_removes_it(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--clear"]) == 0
    assert f"there is no {cache}" in capsys.readouterr().out
    main(["tune", "--from", written(tmp_path / "a.json", *both(256, 1.0, 1.5))])
    assert _plan_table.user_entries()
    assert main(["tune", "--clear"]) == 0
    assert f"removed {cache}" in capsys.readouterr().out
    assert not cache.exists() and _plan_table.entries() == _plan_table.shipped_entries()


def test_wrong_results_do_not_win(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = both(256, 1.0, 1.5)
    rows[0]["max_error"] = 3.0
    assert main(["tune", "--from", written(tmp_path / "a.json", *rows)]) == 1
    said = capsys.readouterr().out
    assert "WRONG  fwd, 256x56x64x256x1x1, bfloat16, fusedres-triton, fused: error 3.0e+00" in said
    assert "nothing to choose in these measurements" in said
    assert not cache.exists()


def test_a_table_elsewhere_and_one_that_is_something_else(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = written(tmp_path / "a.json", *both(256, 1.0, 1.5))
    out = tmp_path / "shipped.json"
    assert main(["tune", "--from", rows, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["entries"][0]["plan"] == "fused" and not cache.exists()
    out.write_text("[]")
    assert main(["tune", "--from", rows, "--out", str(out)]) == 1
    assert "holds another thing" in capsys.readouterr().err
    assert main(["tune", "--from", str(out)]) == 0 and out.read_text() == "[]"


def test_tune_measures_light_passes_behind_the_layers(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ("fusedres-cuda", "fusedres-triton", "eager")
    about = {"section": "light", "case": "bn_act_fwd", "shape": [1], "batch": 1, "dtype": "float32"}
    jobs = {
        "decides": Job(about, "decides", two, lambda _: []),
        "does not": Job(about, "does not", two[1:], lambda _: []),
    }
    ran: list[str] = []

    def run_job(job: Job, _: Setting) -> list[Measured]:
        ran.append(job.title)
        return [Measured(row) for row in passes(8, cuda=1.0, triton=2.0)]

    def tune_site(site: str, *_: Any) -> bool:
        ran.append(site)
        return True

    monkeypatch.setattr(tune, "own_backends", lambda *_: ["cuda", "triton"])
    monkeypatch.setattr(tune, "prepare", lambda _: None)
    monkeypatch.setattr(tune, "in_order", lambda _: [("a layer", 1)])
    monkeypatch.setattr(tune, "_is_done", lambda *_: False)
    monkeypatch.setattr(tune, "_title", str)
    monkeypatch.setattr(tune, "tune_site", tune_site)
    monkeypatch.setattr(tune, "light_cases", lambda *_: list(jobs))
    monkeypatch.setattr(tune, "op_job", lambda case, _: jobs[case])
    monkeypatch.setattr(tune, "run_job", run_job)
    assert main(["tune"]) == 0
    assert ran == ["a layer", "decides"]
    said = capsys.readouterr().out
    assert "1 entries measured" in said and "not reached" not in said
    assert len(results.read([cache.with_suffix(".rows.json")])) == 4


def test_info_counts_the_tables(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["tune", "--from", written(tmp_path / "a.json", *both(256, 1.0, 1.5))])
    monkeypatch.setattr(info_module, "_devices", lambda: ["cpu", "NVIDIA H200"])
    found = info()
    shipped = _plan_table.shipped_entries()
    modelled = sum(e["device"] == "NVIDIA H200" for e in shipped if e["source"] == "model")
    assert found["plan_table"] == {
        "shipped": len(shipped),
        "user": 1,
        "path": str(cache),
        "devices": {
            "cpu": {"measured": 0, "model": 0},
            "NVIDIA H200": {"measured": 1, "model": modelled},
        },
    }
    assert f"{len(shipped)} entries shipped, 1 by `fusedres tune` in {cache}" in str(found)
    assert f"  NVIDIA H200: 1 measured, {modelled} by a model of bytes and rates" in str(found)
    assert "  cpu: 0 measured, 0 by a model" in str(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has something to choose")
def test_on_a_cpu_there_is_nothing_to_choose(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune"]) == 0
    said = capsys.readouterr().out
    assert "every convolution is run by" in said and str(cache) in said


@pytest.mark.parametrize("content", ["{", '{"format": 9, "entries": []}', '{"format": 1}', "[]"])
def test_a_users_table_that_cannot_be_used_is_passed_over_with_a_warning(
    cache: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    _plan_table.reload()
    assert _plan_table.entries() == _plan_table.shipped_entries()
    assert f"{cache} cannot be used" in caplog.text and "tune --clear" in caplog.text
