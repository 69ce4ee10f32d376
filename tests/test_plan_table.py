"""Plans and configurations are data: the shipped table, entries that decide, and malformed ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import pytest
import torch

from fusedres import _plan_table, backends, use_plan
from fusedres._conv import Conv
from fusedres._plan_table import Shape, lookup
from fusedres.backends import Choice, plan_of

POINTWISE = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)
ENTRY = {
    "device": "cpu",
    "dtype": "bfloat16",
    "in_channels": 64,
    "out_channels": 256,
    "kernel": [1, 1],
    "stride": [1, 1],
}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts entries in the place of the shipped ones."""

    def put(*entries: dict[str, Any]) -> None:
        monkeypatch.setattr(_plan_table, "entries", lambda: list(entries))
        _plan_table.reload()

    yield put
    monkeypatch.undo()
    _plan_table.reload()


def plan(dtype: torch.dtype = torch.bfloat16, rows: int | None = None, **changes: Any) -> str:
    conv = POINTWISE._replace(**{k: v for k, v in changes.items() if k in POINTWISE._fields})
    weight = torch.empty(256, 64, *changes.get("kernel", (1, 1)))
    shape = None if rows is None else (1, 256, 1, rows)
    asked = changes.get("asked", "auto")
    return plan_of(Choice("triton", asked, ""), dtype, weight, conv, shape)


def test_the_users_entries_come_first_and_a_reload_sees_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = Shape(64, 256, (1, 1), (1, 1))
    config = {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 2}
    shipped = [ENTRY | {"plan": "split", "configs": {"fwd": config}}]
    user = [ENTRY | {"plan": "fused"}]
    monkeypatch.setattr(_plan_table, "shipped_entries", lambda: shipped)
    monkeypatch.setattr(_plan_table, "user_entries", lambda: user)
    _plan_table.reload()
    try:
        found = lookup("cpu", torch.bfloat16, shape)
        # the plan of the user's, the configurations that only the shipped one has
        assert found is not None and found["plan"] == "fused"
        assert found["configs"] == {"fwd": config}
        assert _plan_table.light("cpu", "bn_act", torch.bfloat16) == ()
        light = {"device": "cpu", "dtype": "bfloat16", "op": "bn_act", "backend": "cpp"}
        user[:] = [light | {"bytes": [0, None]}]
        _plan_table.reload()
        assert _plan_table.light("cpu", "bn_act", torch.bfloat16) == ((0, None, "cpp"),)
        found = lookup("cpu", torch.bfloat16, shape)
        assert found is not None and found["plan"] == "split"
    finally:
        monkeypatch.undo()
        _plan_table.reload()


def test_the_shipped_table_is_well_formed() -> None:
    _plan_table._read.cache_clear()
    assert isinstance(_plan_table.entries(), list)
    table = json.loads(resources.files("fusedres").joinpath(_plan_table.PATH).read_text())
    assert table["format"] == _plan_table.FORMAT


def test_what_was_measured_comes_before_what_was_modelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The user's first among equals: a modelled one of the user's counts less than a measured one
    that was shipped.
    """
    shape = Shape(64, 256, (1, 1), (1, 1), 1000)
    model, measured = {"source": "model"}, {"source": "measured"}
    shipped: list[dict[str, Any]] = [ENTRY | {"plan": "split"} | model]
    user: list[dict[str, Any]] = []
    monkeypatch.setattr(_plan_table, "shipped_entries", lambda: shipped)
    monkeypatch.setattr(_plan_table, "user_entries", lambda: user)

    def found() -> str:
        _plan_table.reload()
        entry = lookup("cpu", torch.bfloat16, shape)
        assert entry is not None
        return str(entry["plan"])

    try:
        assert found() == "split"
        user.append(ENTRY | {"plan": "fused"} | model)
        assert found() == "fused"
        shipped.append(ENTRY | {"plan": "split"} | measured)
        assert found() == "split"
        user.append(ENTRY | {"plan": "fused"})  # which does not say: measured
        assert found() == "fused"
        assert _plan_table.counts("cpu") == {"measured": 2, "model": 2}
        assert _plan_table.counts("NVIDIA H200") == {"measured": 0, "model": 0}
    finally:
        monkeypatch.undo()
        _plan_table.reload()


def test_a_reload_reaches_the_configurations_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedres.triton_kernels._configs import Config, config_of

    user: list[dict[str, Any]] = []
    monkeypatch.setattr(_plan_table, "user_entries", lambda: user)
    _plan_table.reload()
    shape = Shape(64, 256, (1, 1), (1, 1), 4096)
    by_rule = config_of("fwd", "cpu", torch.bfloat16, shape, 0, 90)
    config = {"BM": 16, "BN": 16, "BK": 16, "num_warps": 2, "num_stages": 5}
    user.append(ENTRY | {"configs": {"fwd": config}})
    assert config_of("fwd", "cpu", torch.bfloat16, shape, 0, 90) == by_rule
    _plan_table.reload()
    assert config_of("fwd", "cpu", torch.bfloat16, shape, 0, 90) == Config(**config)
    monkeypatch.undo()
    _plan_table.reload()


def test_an_entry_decides_where_it_fits(table: Callable[..., None]) -> None:
    assert plan() == "fused"  # the heuristic
    table(ENTRY | {"plan": "split"})
    assert plan() == "split"
    assert plan(torch.float16) == "fused" and plan(stride=(2, 2)) == "fused"
    assert plan(asked="fused") == "fused"  # by name, whatever the table says
    table(ENTRY | {"plan": "split", "device": "NVIDIA H200"})
    assert plan() == "fused"
    table(ENTRY | {"plan": "fused+masks"}, ENTRY | {"plan": "split"})
    assert plan() == "fused+masks"  # the first that fits


def test_rows_bound_an_entry_and_unknown_ones_count_as_many(table: Callable[..., None]) -> None:
    table(ENTRY | {"rows": [0, 999], "plan": "split"}, ENTRY | {"rows": [1000, None]})
    assert [plan(rows=r) for r in (1, 999, 1000)] == ["split", "split", "fused"]
    assert plan(rows=None) == "fused"


LIGHT = {"device": "cpu", "dtype": "bfloat16", "op": "bn_act"}


def test_entries_of_light_passes_say_who_runs_them_by_size(
    table: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "unavailable", lambda *_: None)
    choice = Choice("triton", "auto", "", light="cuda")
    device = torch.device("cpu")

    def runs(size: int | None, op: str = "bn_act", chosen: Choice = choice) -> str:
        return backends.light_backend(chosen, op, device, torch.bfloat16, size)

    assert runs(100) == "cuda"
    table(
        ENTRY | {"plan": "split"},
        LIGHT | {"bytes": [0, 999], "backend": "triton"},
        LIGHT | {"bytes": [5000, None], "backend": "cpp"},
    )
    assert [runs(size) for size in (0, 999, 1000, 5000, None)] == [
        "triton", "triton", "cuda", "cpp", "cpp",
    ]  # fmt: skip
    assert runs(0, "add_relu") == "cuda"
    by_name = Choice("triton", "auto", "")
    assert runs(5000, chosen=by_name) == "triton"
    weight = torch.empty(256, 64, 3, 3)
    way = backends.way_of(choice, torch.bfloat16, weight, POINTWISE, (1, 256, 2, 2))
    assert way == ("cuda", "split")  # 2,048 bytes
    monkeypatch.setattr(backends, "unavailable", lambda name, *_: "off" if name == "cpp" else None)
    assert runs(None) == "cuda"


def test_the_heuristic_follows_the_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plans = {d: plan(d) for d in (torch.float16, torch.float32, torch.float64)}
    assert plans == {torch.float16: "fused", torch.float32: "split", torch.float64: "split"}
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert plan(torch.float32) == "fused" and plan(torch.float64) == "split"


def test_what_has_no_kernel_is_split_whatever_is_asked() -> None:
    assert plan(asked="fused", groups=2) == plan(groups=2) == "split"


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": (3, 3)},
        {"kernel": (1, 2)},
        {"padding": (1, 1, 1, 1)},
        {"stride": (3, 3)},
    ],
)
def test_what_is_not_pointwise_is_fused_where_it_is_asked_for(changes: dict[str, Any]) -> None:
    assert plan(asked="fused", **changes) == "fused" and plan(**changes) == "split"


def test_a_backend_without_a_plan_raises() -> None:
    x, w = torch.randn(2, 4, 3, 3), torch.randn(4, 4, 1, 1)
    with use_plan("epilogue"), pytest.raises(RuntimeError, match="has no 'epilogue' plan"):
        from fusedres.ops import conv_bn

        conv_bn(x, w)
    assert "fused" in backends.BACKENDS["triton"].plans


def test_an_entry_configures_kernels(table: Callable[..., None]) -> None:
    pytest.importorskip("triton")
    from fusedres.triton_kernels._configs import Config, _config_of, config_of

    config = {"BM": 64, "BN": 32, "BK": 16, "num_warps": 2, "num_stages": 5}
    table(ENTRY | {"configs": {"dgrad": config}})
    _config_of.cache_clear()
    shape = Shape(64, 256, (1, 1), (1, 1), 4096)
    assert config_of("dgrad", "cpu", torch.bfloat16, shape, 0, 90) == Config(**config)
    assert config_of("fwd", "cpu", torch.bfloat16, shape, 0, 90) != Config(**config)
    _config_of.cache_clear()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"plan": "fast"}, "plan must be"),
        ({"source": "hearsay"}, "source must be"),
        ({"configs": {"bwd": {}}}, "configs are of"),
        ({"configs": {"fwd": {"BM": 64}}}, "configs are of.*num_warps"),
        ({"rows": [1]}, "rows must be"),
        ({"rows": [1, "many"]}, "rows must be"),
        ({"speed": 1}, "an entry has"),
    ],
)
def test_malformed_entries_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _plan_table.check(ENTRY | changes)
    with pytest.raises(ValueError, match="an entry has"):
        _plan_table.check({k: v for k, v in ENTRY.items() if k != "kernel"})
    config = {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 2}
    _plan_table.check(ENTRY | {"configs": {"bwd": config | {"programs": 2}}})
    for wrong in ({"BM": 48}, {"BK": 8}, {"BN": 64.0}):  # no block of a kernel's
        with pytest.raises(ValueError, match="powers of two from 16 on"):
            _plan_table.check(ENTRY | {"configs": {"fwd": config | wrong}})
    for source in _plan_table.SOURCES:
        _plan_table.check(ENTRY | {"plan": "split", "source": source})
    light = LIGHT | {"bytes": [0, None], "backend": "cuda"}
    _plan_table.check(light)
    _plan_table.check(light | {"source": "measured"})
    with pytest.raises(ValueError, match="source must be"):
        _plan_table.check(light | {"source": "hearsay"})
    for wrong in ({"bytes": [1]}, {"backend": "warp"}, {"op": "conv"}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            _plan_table.check(light | wrong)
    with pytest.raises(ValueError, match="an entry of an op has"):
        _plan_table.check(light | {"rows": [0, None]})
