"""Two files of results against each other, one against limits, and what tune makes of rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fusedres import _plan_table
from fusedres.bench.measure import Job
from fusedres.bench.rows import Row
from fusedres.bench.tune import decides, entries_from
from fusedres.bench.verdict import BAD, changes, exceeded, read_limits


def row(**fields: Any) -> Row:
    base: Row = {"section": "light", "case": "bn_act_fwd", "shape": [2, 64, 8, 8], "batch": 2}
    base |= {"dtype": "float32", "device": "NVIDIA H200", "name": "fusedres-cuda", "plan": None}
    base |= {"ms": 1.0, "p20": 0.98, "p80": 1.02, "against": "eager", "max_error": 1e-7}
    base |= {"ratio": 0.5, "ratio_p20": 0.48, "ratio_p80": 0.52, "backend": "cuda"}
    return base | fields


def verdict(old: Row, new: Row, margin: float | None = None) -> str:
    (change,) = changes([old], [new], margin)
    return change.verdict


def test_times_on_a_gpu_part_by_more_than_the_margin_or_are_the_same() -> None:
    assert verdict(row(), row()) == "same"
    assert verdict(row(), row(ms=1.09, p20=1.07, p80=1.11)) == "same"
    assert verdict(row(), row(ms=1.12, p20=1.10, p80=1.14)) == "slower"
    assert verdict(row(), row(ms=1.12, p20=1.10, p80=1.14), margin=0.2) == "same"
    assert verdict(row(), row(ms=1.5, p20=1.01, p80=2.0)) == "same"  # the ranges touch
    assert verdict(row(), row(ms=0.8, p20=0.79, p80=0.81)) == "faster"
    assert verdict(row(), row(ms=0.8, p20=0.5, p80=0.99)) == "same"
    assert verdict(row(), row(ms=1.0, ratio=5.0, ratio_p20=4.9, ratio_p80=5.1)) == "same"


def test_on_a_cpu_ratios_within_a_run_count_not_the_machines_mood() -> None:
    old = row(device="cpu")
    slow_day = row(device="cpu", ms=3.0, p20=2.9, p80=3.1)
    assert verdict(old, slow_day) == "same"
    slower = row(device="cpu", ratio=0.7, ratio_p20=0.66, ratio_p80=0.72)
    assert verdict(old, slower) == "slower"
    assert verdict(old, slower, margin=0.5) == "same"
    measure = row(device="cpu", name="eager")
    assert len(changes([old, measure], [old, measure])) == 1  # eager is held to nothing


def test_what_tune_left_is_passed_over() -> None:
    tuned = {k: v for k, v in row(section="tuned").items() if k not in ("ms", "p20", "p80")}
    assert len(changes([row(), tuned], [row(), tuned])) == 1


def test_errors_and_failures_outrank_speed() -> None:
    assert verdict(row(), row(max_error=2e-6)) == "same"  # within the floor of float32
    assert verdict(row(), row(max_error=1e-3, ms=0.5, p20=0.5, p80=0.5)) == "wrong"
    assert verdict(row(max_error=1e-3), row(max_error=1.9e-3)) == "same"
    assert verdict(row(), row(max_error=math.nan)) == "wrong"
    assert verdict(row(), row(max_error=None)) == "same"
    failed = {k: v for k, v in row().items() if k not in ("ms", "p20", "p80")}
    (change,) = changes([row()], [failed | {"error": "RuntimeError: out of memory"}])
    assert (change.verdict, change.detail) == ("failed", "RuntimeError: out of memory")


def test_only_the_same_on_the_same_device_is_compared() -> None:
    other = [row(device="NVIDIA A100"), row(dtype="bfloat16"), row(name="eager"), row(plan="split")]
    with pytest.raises(ValueError, match="no row in common"):
        changes([row()], other)
    others = [row(name="copy"), row(section="ceilings", name="matmul")]
    found = changes([row(), *others], [*others, *other, row()])
    assert [c.what for c in found] == ["light, bn_act_fwd, 2x64x8x8, float32, fusedres-cuda"]


def test_who_is_gone_from_a_job_that_ran_is_missed() -> None:
    other_job = row(case="add_relu_fwd")
    found = changes([row(), row(name="eager"), other_job], [row(name="eager")])
    assert [(c.verdict, c.what.split(", ")[-1]) for c in found] == [
        ("missing", "fusedres-cuda"),
        ("same", "eager"),
    ]


def test_a_missing_row_is_as_bad_as_a_slow_one() -> None:
    assert BAD == ("failed", "missing", "wrong", "slower")


def test_gradients_that_became_wrong_are_wrong() -> None:
    old, new = row(grad_error=0.01), row(grad_error=0.2)
    assert verdict(old, new) == "wrong"
    assert verdict(old, row(grad_error=0.11)) == "same"  # ReLU's masks are chance near zero


def test_the_worst_comes_first() -> None:
    names = ("a", "b", "c", "d")
    old = [row(name=name) for name in names]
    new = [row(name="a"), row(name="b", ms=2.0, p20=2.0, p80=2.0)]
    new += [row(name="c", ms=4.0, p20=4.0, p80=4.0), row(name="d", max_error=1.0)]
    assert [c.what[-1] for c in changes(old, new)] == ["d", "c", "b", "a"]


# --- limits ---------------------------------------------------------------------------------------

LIMIT = {"section": "light", "case": "bn_act_fwd", "shape": [2, 64, 8, 8], "dtype": "float32"}
LIMIT |= {"name": "fusedres-cuda", "ratio": 0.4, "margin": 1.25}


def test_a_limit_holds_unless_even_the_faster_fifth_exceeds_it() -> None:
    assert exceeded([row()], [LIMIT]) == []  # p20 0.48 of at most 0.5
    (line,) = exceeded([row(ratio_p20=0.51)], [LIMIT])
    assert "0.50 of eager's time (p20 0.51), at most 0.50" in line
    assert exceeded([row(ratio_p20=0.51)], [LIMIT | {"margin": 1.5}]) == []


def test_what_was_not_measured_holds_no_limit() -> None:
    (line,) = exceeded([row(name="eager")], [LIMIT])
    assert line.endswith("fusedres-cuda: not measured")
    (line,) = exceeded([row(ratio=None)], [LIMIT])
    assert line.endswith("nothing to hold it against")
    (line,) = exceeded([row(ratio=None, error="RuntimeError: no")], [LIMIT])
    assert line.endswith("RuntimeError: no")


@pytest.mark.parametrize(
    "content", ['{"a": 1}', "[1]", json.dumps([LIMIT | {"margin": 0.5}]), '[{"section": "light"}]']
)
def test_limits_are_checked(tmp_path: Path, content: str) -> None:
    path = tmp_path / "limits.json"
    path.write_text(json.dumps([LIMIT]))
    assert read_limits(path) == [LIMIT]
    path.write_text(content)
    with pytest.raises(ValueError, match="expected a list of limits with case, dtype, margin"):
        read_limits(path)


# --- from rows to the plan table ------------------------------------------------------------------


def layer(batch: int, plan: str, case: str, ms: float, **fields: Any) -> Row:
    shape = [batch, 56, 64, 256, 1, 1]
    who = {"name": "fusedres-triton", "backend": "triton", "plan": plan, "batch": batch}
    return row(section="conv_bn", case=case, shape=shape, ms=ms, dtype="bfloat16", **who) | fields


def both(batch: int, fused: float, split: float) -> list[Row]:
    rows = [layer(batch, "fused", "fwd", fused), layer(batch, "fused", "bwd", 2 * fused)]
    return rows + [layer(batch, "split", "fwd", split), layer(batch, "split", "bwd", 2 * split)]


def test_a_layers_plan_is_the_one_that_is_faster_both_ways_together() -> None:
    (entry,) = entries_from(both(256, 1.0, 1.5))
    assert entry == {
        "device": "NVIDIA H200",
        "dtype": "bfloat16",
        "in_channels": 64,
        "out_channels": 256,
        "kernel": [1, 1],
        "stride": [1, 1],
        "rows": [256 * 56 * 56 // 4, None],
        "plan": "fused",
        "source": "measured",
    }
    # forward alone would say fused
    rows = [layer(8, "fused", "fwd", 1), layer(8, "fused", "bwd", 9)]
    rows += [layer(8, "split", "fwd", 2), layer(8, "split", "bwd", 3)]
    assert entries_from(rows)[0]["plan"] == "split"
    parts = [layer(8, "fused", "fwd", 1), layer(8, "fused", "dgrad", 1)]
    assert entries_from(rows[2:] + parts) == []  # half a backward
    assert entries_from([*rows[2:], *parts, layer(8, "fused", "wgrad", 1)])[0]["plan"] == "fused"


def test_the_best_backend_speaks_for_a_plan() -> None:
    other = [r | {"backend": "cuda", "ms": r["ms"] * 0.5} for r in both(8, 9.0, 1.6)[2:]]
    (entry,) = entries_from(both(8, 1.0, 1.6) + other)
    assert entry["plan"] == "split"


def test_between_sizes_with_different_winners_lies_a_border() -> None:
    rows = both(1, 2.0, 1.0) + both(4, 2.0, 1.0) + both(64, 1.0, 2.0)
    first, second = entries_from(rows)
    border = round(math.sqrt(4 * 56 * 56 * 64 * 56 * 56))
    assert (first["plan"], first["rows"]) == ("split", [56 * 56 // 4, border])
    assert (second["plan"], second["rows"]) == ("fused", [border + 1, None])


def test_pixels_are_those_of_the_output() -> None:
    strided = [r | {"shape": [8, 56, 64, 256, 1, 2]} for r in both(8, 1.0, 2.0)]
    (entry,) = entries_from(strided)
    assert entry["rows"] == [8 * 28 * 28 // 4, None] and entry["stride"] == [2, 2]


def test_what_failed_or_is_no_number_is_no_reason() -> None:
    rows = both(8, 1.0, 2.0)
    assert entries_from([rows[0] | {"max_error": math.inf}, *rows[1:]]) == []
    assert entries_from([rows[0] | {"error": "RuntimeError"}, *rows[1:]]) == []
    assert entries_from(both(8, 1.0, 2.0)[:2]) == []  # one plan alone is no choice


def passes(size: int, **ms: float) -> list[Row]:
    shape = [1, 64, size, size]
    return [
        row(case=case, shape=shape, ms=value, backend=backend, name=f"fusedres-{backend}")
        for case in ("bn_act_fwd, residual", "bn_act_bwd")
        for backend, value in ms.items()
    ]


def test_a_light_pass_goes_to_the_backend_that_is_faster_in_all_its_passes_together() -> None:
    rows = passes(8, cuda=1.0, triton=2.0)
    (entry,) = entries_from(rows)
    assert entry == {
        "device": "NVIDIA H200",
        "dtype": "float32",
        "op": "bn_act",
        "bytes": [64 * 64, None],
        "backend": "cuda",
        "source": "measured",
    }
    rows[-1]["ms"] = 0.1  # triton's backward makes up for its forward? 2.1 against 2.0: no
    assert entries_from(rows)[0]["backend"] == "cuda"
    rows[1]["ms"] = 1.8
    assert entries_from(rows)[0]["backend"] == "triton"
    sizes = entries_from(passes(8, cuda=1.0, triton=2.0) + passes(32, cuda=2.0, triton=1.0))
    border = round(math.sqrt(64 * 64 * 4 * 64 * 1024 * 4))
    assert [(e["backend"], e["bytes"]) for e in sizes] == [
        ("cuda", [64 * 64, border]),
        ("triton", [border + 1, None]),
    ]


def test_shapes_of_one_size_count_together() -> None:
    rows = passes(8, cuda=1.0, triton=1.5)
    other = [r | {"shape": [1, 16, 16, 16]} for r in passes(8, cuda=3.0, triton=2.0)]
    assert [e["backend"] for e in entries_from(rows + other)] == ["triton"]  # 8 against 7
    assert [e["backend"] for e in entries_from(other + rows)] == ["triton"]
    assert entries_from(rows + other[:1]) == []  # nobody ran all


def test_passes_that_span_ops_and_rows_of_others_decide_nothing() -> None:
    assert (
        entries_from([r | {"case": "bn_act_bwd + batch_norm_bwd"} for r in passes(8, a=1, b=2)])
        == []
    )
    assert entries_from([r | {"backend": None} for r in passes(8, a=1, b=2)]) == []
    assert entries_from(passes(8, cuda=1.0)) == []


@pytest.mark.parametrize(
    ("section", "case", "names", "decides_something"),
    [
        ("conv_bn", "fwd", ("fusedres-triton, fused", "fusedres-cuda, split", "eager"), False),
        ("light", "bn_act_fwd", ("fusedres-cuda", "fusedres-triton", "eager", "copy"), True),
        ("light", "bn_act_fwd", ("fusedres-cpp", "eager", "copy"), False),
    ],
)
def test_tune_measures_light_passes_of_two_backends(
    section: str, case: str, names: tuple[str, ...], decides_something: bool
) -> None:
    job = Job({"section": section, "case": case}, "", names, lambda _: [])
    assert decides(job) is decides_something


def test_entries_are_what_the_table_takes() -> None:
    for entry in entries_from(both(8, 1.0, 2.0) + passes(8, cuda=1.0, triton=2.0)):
        _plan_table.check(entry)
