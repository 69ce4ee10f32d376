"""Scopes, the environment variable, and reasons."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

import fusedres
from fusedres import _plan_table, backends, use_backend, use_plan
from fusedres._conv import Conv
from fusedres.ops import conv_bn
from fusedres.ops.conv_bn_relu_maxpool import stem_way

X, W = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 1, 1)


def test_scopes_nest_and_end() -> None:
    assert backends.requested_backend() == "auto"
    with use_backend("reference"):
        with use_backend("auto"):
            assert backends.requested_backend() == "auto"
        assert backends.requested_backend() == "reference"
    assert backends.requested_backend() == "auto"


def test_scope_ends_where_its_block_raises() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backends.requested_backend() == "auto"


def test_scope_is_a_decorator_and_of_its_own_thread() -> None:
    seen: list[str] = []

    @use_backend("reference")
    def asked() -> str:
        thread = threading.Thread(target=lambda: seen.append(backends.requested_backend()))
        thread.start()
        thread.join()
        return backends.requested_backend()

    assert asked() == "reference" and seen == ["auto"]


@pytest.mark.parametrize("scope", [use_backend, use_plan])
def test_unknown_names_are_refused_at_once(scope: type) -> None:
    with pytest.raises(ValueError, match="got 'fast', accepted: "):
        scope("fast")


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    assert backends.requested_backend() == "reference"
    with use_backend("auto"):
        assert backends.requested_backend() == "auto"
    monkeypatch.setenv("FUSEDRES_BACKEND", "warp")
    with pytest.raises(ValueError, match="FUSEDRES_BACKEND: got 'warp'"):
        conv_bn(X, W)


def test_a_backend_asked_for_that_cannot_serve_raises_with_the_reason() -> None:
    with use_backend("cuda"), pytest.raises(RuntimeError, match="serves cuda tensors, not cpu"):
        conv_bn(X, W)
    with use_backend("triton"), pytest.raises(RuntimeError, match="serves cuda tensors, not cpu"):
        conv_bn(X, W)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="serves cuda tensors, not cpu"):
        fusedres.add_relu(X, X)


def test_auto_falls_back_with_the_reason() -> None:
    choice = backends.choose("conv_bn", "cpu", torch.float16)
    assert choice.backend == "reference" and "not float16" in choice.reason
    assert conv_bn(X.half(), W.half()).value().dtype == torch.float16


def test_auto_takes_the_compiled_backend_where_it_is_built() -> None:
    ready = backends.not_ready("cpp") is None
    choice = backends.choose("conv_bn", "cpu", torch.float32)
    assert (choice.backend == "cpp") == ready
    assert ready or choice.reason


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Says which backends are ready, as on a machine with a GPU."""

    def is_ready(*names: str) -> None:
        def not_ready(name: str) -> str | None:
            return None if name in names else f"{name} is off here"

        monkeypatch.setattr(backends, "not_ready", not_ready)
        backends._choose.cache_clear()

    yield is_ready
    monkeypatch.undo()
    backends._choose.cache_clear()


HALF = torch.bfloat16
POINTWISE, WIDE = torch.empty(8, 8, 1, 1), torch.empty(8, 8, 3, 3)


def ways(device: str = "cuda") -> list[tuple[str, str]]:
    """Backend and plan of a 1x1 and of a 3x3 convolution."""
    choice = backends.choose("conv_bn", device, HALF)
    geometry = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)
    return [backends.way_of(choice, HALF, w, geometry) for w in (POINTWISE, WIDE)]


def stem_ways() -> dict[str, tuple[str, str]]:
    """Backend and plan of the stem, by the plan that is asked for."""
    geometry, found = Conv((2, 2), (3, 3, 3, 3), (1, 1), 1), {}
    for plan in ("auto", "fused"):
        with use_plan(plan):
            choice = backends.choose("conv_bn_relu_maxpool", "cuda", HALF)
        found[plan] = stem_way(choice, HALF, torch.empty(64, 3, 7, 7), geometry)
    return found


def test_auto_on_a_gpu_fuses_by_triton_and_passes_by_cuda(machine: Callable[..., None]) -> None:
    machine("cuda", "triton", "cpp")
    assert ways() == [("triton", "fused"), ("cuda", "split")]
    passes = set(backends.OPS) - set(backends.TWO_PLANS)
    assert {backends.choose(op, "cuda", HALF).backend for op in passes} == {"cuda"}
    assert stem_ways() == {"auto": ("cuda", "split"), "fused": ("triton", "fused")}
    with use_plan("split"):
        assert ways() == [("cuda", "split")] * 2
    with use_backend("triton"):
        assert ways() == [("triton", "fused"), ("triton", "split")]
    with use_backend("cuda"):
        assert ways() == [("cuda", "split")] * 2


def test_without_the_extension_a_gpu_runs_on_triton(machine: Callable[..., None]) -> None:
    machine("triton")
    assert ways() == [("triton", "fused"), ("triton", "split")]
    for op in backends.OPS:
        choice = backends.choose(op, "cuda", HALF)
        assert choice.backend == "triton" and choice.reason == "cuda is off here"


def test_without_triton_a_gpu_runs_on_cuda(machine: Callable[..., None]) -> None:
    machine("cuda", "cpp")
    assert ways() == [("cuda", "split")] * 2
    assert stem_ways() == {"auto": ("cuda", "split"), "fused": ("cuda", "split")}
    assert backends.choose("conv_bn", "cuda", HALF).reason == "triton is off here"
    assert backends.choose("bn_act", "cuda", HALF).reason == ""
    message = r"backend 'cuda' has no 'fused' plan \(triton is off here\)"
    with use_plan("fused"), pytest.raises(RuntimeError, match=message):
        backends.choose("conv_bn", "cuda", HALF)


# --- the products of the backend "cuda" -----------------------------------------------------------

TILED, UNTILED = torch.empty(256, 64, 1, 1), torch.empty(256, 72, 1, 1)
POINT = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)
OFF = "its self-check failed"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Says which plan was measured as the fastest of the 1x1 convolution of TILED."""
    entry = {"device": "cpu", "dtype": "bfloat16", "in_channels": 64, "out_channels": 256}
    entry |= {"kernel": [1, 1], "stride": [1, 1]}

    def put(plan: str) -> None:
        _plan_table.check(entry | {"plan": plan})
        monkeypatch.setattr(_plan_table, "entries", lambda: [entry | {"plan": plan}])
        _plan_table.reload()

    yield put
    monkeypatch.undo()
    _plan_table.reload()


@pytest.fixture
def gpu_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says which products the GPU runs."""

    def set_(*products: str) -> None:
        monkeypatch.setattr(
            backends, "product_problem", lambda product, _: None if product in products else OFF
        )

    return set_


def way(
    weight: torch.Tensor = TILED,
    conv: Conv = POINT,
    dtype: torch.dtype = HALF,
    memory_format: torch.memory_format = torch.channels_last,
) -> tuple[str, str]:
    choice = backends.choose("conv_bn", "cuda", dtype)
    return backends.way_of(choice, dtype, weight, conv, None, memory_format)


@pytest.mark.parametrize("product", ["mma", "wgmma"])
def test_by_name_a_product_runs_where_it_serves(
    machine: Callable[..., None], gpu_runs: Callable[..., None], product: str
) -> None:
    plan = f"fused+{product}"
    gpu_runs("mma", "wgmma")
    for others in (("triton", "cpp"), ("cpp",), ()):
        machine("cuda", *others)
        for backend in ("auto", "cuda"):
            with use_backend(backend), use_plan(plan):
                assert way() == way(dtype=torch.float16) == ("cuda", plan)
                for split in (
                    way(UNTILED),
                    way(torch.empty(72, 64, 1, 1)),
                    way(torch.empty(64, 64, 3, 3)),
                    way(torch.empty(64, 2112, 1, 1)),
                    way(torch.empty(2112, 64, 1, 1)),
                    way(torch.empty(64, 64, 1, 1), Conv((1, 1), (0, 0, 0, 0), (1, 1), 2)),
                    way(conv=Conv((2, 2), (0, 0, 0, 0), (1, 1), 1)),
                    way(conv=Conv((1, 1), (1, 1, 1, 1), (1, 1), 1)),
                    way(dtype=torch.float32),
                    way(dtype=torch.float64),
                    way(memory_format=torch.contiguous_format),
                ):
                    assert split == ("cuda", "split")
                # of other ops there is no such plan
                stem = backends.choose("conv_bn_relu_maxpool", "cuda", HALF)
                geometry = Conv((2, 2), (3, 3, 3, 3), (1, 1), 1)
                assert stem_way(stem, HALF, torch.empty(64, 3, 7, 7), geometry)[1] == "split"
                assert backends.choose("conv_act", "cuda", HALF).plan == "split"


def test_by_name_a_product_that_cannot_run_raises(
    machine: Callable[..., None], gpu_runs: Callable[..., None]
) -> None:
    machine("cuda", "triton", "cpp")
    gpu_runs("mma")
    message = rf"conv_bn: plan 'fused\+wgmma' cannot run: {OFF} \(asked for by use_plan"
    with use_plan("fused+wgmma"):
        assert way(UNTILED) == ("cuda", "split")
        with pytest.raises(RuntimeError, match=message):
            way()
    gpu_runs()
    with use_backend("cuda"), use_plan("fused"), pytest.raises(RuntimeError, match=r"fused\+mma"):
        way()
    machine("cuda", "triton", "cpp", "reference")
    for name in ("triton", "reference"):
        message = rf"'{name}' has no 'fused\+mma' plan"
        with (
            use_backend(name),
            use_plan("fused+mma"),
            pytest.raises(RuntimeError, match=message),
        ):
            way()
    machine("triton", "cpp")
    message = r"backend 'triton' has no 'fused\+mma' plan \(cuda is off here\)"
    with use_plan("fused+mma"), pytest.raises(RuntimeError, match=message):
        way()
    with use_plan("fused+mma"), pytest.raises(RuntimeError, match=r"serves cuda tensors, not cpu"):
        backends.choose("conv_bn", "cpu", torch.float32)


def test_the_cuda_backend_by_name(
    machine: Callable[..., None], gpu_runs: Callable[..., None], table: Callable[[str], None]
) -> None:
    machine("cuda", "triton", "cpp")
    gpu_runs("mma", "wgmma")
    with use_backend("cuda"):
        assert way() == ("cuda", "split")
        for asked in ("fused", "fused+masks", "fused+merged", "fused_1x1", "ideal"):
            with use_plan(asked):
                assert way() == ("cuda", "fused+mma")
                assert way(UNTILED) == ("cuda", "split")
                assert way(torch.empty(64, 64, 3, 3))[1] in ("split", "split+keep")
        with use_plan("epilogue"), pytest.raises(RuntimeError, match="has no 'epilogue' plan"):
            way()
        for plan in ("fused", "fused+masks", "split+keep"):
            table(plan)
            assert way() == ("cuda", "split")
        table("fused+wgmma")
        assert way() == ("cuda", "fused+wgmma")
        assert way(dtype=torch.float16) == ("cuda", "split")


@pytest.mark.parametrize("product", ["mma", "wgmma"])
def test_the_table_may_name_a_product(
    machine: Callable[..., None],
    gpu_runs: Callable[..., None],
    table: Callable[[str], None],
    product: str,
) -> None:
    """Where it cannot run, the rule holds, and the reason is at hand."""
    table(f"fused+{product}")
    gpu_runs("mma", "wgmma")

    def passed_over() -> str:
        return backends.passed_over(backends.choose("conv_bn", "cuda", HALF), HALF, TILED, POINT)

    for others, rule in ((("triton", "cpp"), ("triton", "fused")), (("cpp",), ("cuda", "split"))):
        machine("cuda", *others)
        assert way() == ("cuda", f"fused+{product}") and passed_over() == ""
        contiguous = way(memory_format=torch.contiguous_format)
        assert contiguous == rule and way(UNTILED) == rule
        assert way(dtype=torch.float32)[1] in ("fused", "split")
        gpu_runs()
        assert way() == rule
        assert passed_over() == f"'fused+{product}' of the plan table: {OFF}"
        gpu_runs("mma", "wgmma")
    machine("cuda", "triton")
    with use_backend("triton"):
        assert way() == ("triton", "fused") and passed_over() == ""
    with use_plan("fused"):
        assert way() == ("triton", "fused") and passed_over() == ""
    with use_plan("split"):
        assert way() == ("cuda", "split")
    machine("triton")
    assert way() == ("triton", "fused")
    assert backends.choose("conv_bn", "cuda", HALF).reason == "cuda is off here"


def test_report_and_info_say_that_wgmma_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = "plan 'fused+wgmma' is off: no GPU of compute capability 9.0 has been seen here"
    with use_backend("reference"):
        served = fusedres.report(fusedres.IdentityBlock(256, (64, 64, 256)))
        other = fusedres.report(fusedres.ConvBNReLU(3, 4, 1))
    assert str(served).splitlines()[-1] == line == served.note
    assert other.note == "" and "wgmma" not in str(other)
    page = fusedres.info()
    assert page["wgmma"] == line == str(page).splitlines()[-1]


def test_report_says_what_the_table_names_in_vain(
    machine: Callable[..., None],
    gpu_runs: Callable[..., None],
    table: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = replace(backends.BACKENDS["cuda"], devices=("cpu",))
    monkeypatch.setitem(backends.BACKENDS, "cuda", cuda)
    machine("cuda")
    gpu_runs()
    table("fused+wgmma")
    block = fusedres.ConvBNReLU(64, 256, 1).to(HALF, memory_format=torch.channels_last)
    (row,) = fusedres.report(block)
    reason = f"cpp is off here; 'fused+wgmma' of the plan table: {OFF}"
    assert (row.backend, row.plan, row.reason) == ("cuda", "split", reason)


def test_with_neither_a_gpu_runs_plain_torch(machine: Callable[..., None]) -> None:
    machine("cpp")
    assert ways() == [("reference", "split")] * 2
    assert "cuda is off here; triton is off" in backends.choose("bn_act", "cuda", HALF).reason


@pytest.mark.parametrize(
    ("archs", "capability", "served"),
    [
        (["80", "90", "100", "120"], (8, 0), True),
        (["80", "90", "100", "120"], (8, 9), True),  # machine code of its generation
        (["80", "90", "100", "120"], (10, 3), True),
        (["80", "90", "100", "120"], (12, 1), True),
        (["80", "90", "100", "120"], (13, 0), True),  # PTX of the newest
        (["80", "90", "100", "120"], (11, 0), False),
        (["80", "90", "100", "120"], (7, 5), False),
        (["90"], (8, 0), False),
        (["90a"], (9, 0), True),
        (["90a"], (10, 0), False),  # has no PTX
    ],
)
def test_a_gpu_without_code_turns_cuda_off(
    monkeypatch: pytest.MonkeyPatch, archs: list[str], capability: tuple[int, int], served: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    reason = backends._cuda_without_code(archs)
    assert (reason is None) == served
    if reason is not None:
        assert "a GPU has compute capability" in reason and "FUSEDRES_CUDA_ARCHS=" in reason


def test_a_scope_may_be_entered_again() -> None:
    scope = use_backend("reference")
    for _ in range(2):
        with scope, scope:
            assert backends.requested_backend() == "reference"
        assert backends.requested_backend() == "auto"


def test_the_scope_counts_around_compiled_code() -> None:
    """Dynamo compiles again for another scope, also where another instance came first."""
    modules = [fusedres.ConvBNReLU(3, 4, 1).eval() for _ in range(2)]
    first, second = (torch.compile(m, backend="eager", fullgraph=True) for m in modules)
    torch.testing.assert_close(first(X), modules[0](X))
    with use_backend("cuda"), pytest.raises(Exception, match="serves cuda tensors, not cpu"):
        second(X)
    with use_backend("reference"):
        assert "ApplyTemplate" not in type(second(X).grad_fn).__name__
    torch.testing.assert_close(second(X), modules[1](X))


def test_backward_runs_what_forward_chose() -> None:
    x = X.clone().requires_grad_()
    with use_backend("auto"):
        value = conv_bn(x, W).value()
    with use_backend("cuda"):
        value.sum().backward()
    assert x.grad is not None


def test_info_lists_every_backend() -> None:
    page = fusedres.info()
    assert set(page["backends"]) == set(backends.BACKENDS)
    for name, backend in page["backends"].items():
        assert backend["ready"] or backend["reason"], name
    assert page["version"] == fusedres.__version__
    assert all(name in str(page) for name in backends.BACKENDS)
