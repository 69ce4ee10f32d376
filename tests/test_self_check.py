"""What the plan "fused+wgmma" has to pass on a GPU before anything runs on it, and when that is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from plain_extension import Extension, installed
from torch._subclasses import FakeTensorMode

import fusedres
from fusedres import backends, native, use_backend, use_plan
from fusedres.ops import _self_check, conv_bn
from fusedres.testing import CHANNELS_LAST

CPU = torch.device("cpu")


class Wrong(Extension):
    """Kernels with a fault: what a wrong tile, mask, sum or barrier comes to."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.calls = fault, 0

    def conv_bn_fwd(self, head: Any, filters: int, *args: Any) -> None:
        super().conv_bn_fwd(head, filters, *args)
        _, act, training, *_, t, _, product = args
        y = self._full(head, t[0], filters)
        self.calls += 1
        if product == 0 or y.size(1) < 128:
            return
        if self.fault == "the last row":
            y[-1, :, -1, -1] = 0
        if self.fault == "one channel":
            y[:, 77] = y[:, 76]
        if self.fault == "not a number":
            y[0, 3, 1, 1] = float("nan")
        if self.fault == "what is emitted" and act[8]:
            self._full(head, act[8])[-1, -1] = 7
        if self.fault == "the mean" and training:
            self._vectors(head, t[1], channels=filters)[0][3] += 0.1
        if self.fault == "chance":
            y[0, 0, 0, 0] += self.calls / 64
        if self.fault == "a launch":
            raise RuntimeError("conv_bn_fwd: too many resources requested for launch")

    def conv_bn_dgrad(self, head: Any, filters: int, training: bool, t: Any, *rest: Any) -> None:
        if self.fault == "the mask of g" and rest[-1] == 1:
            t = (*t[:6], 0, *t[7:])
        super().conv_bn_dgrad(head, filters, training, t, *rest)
        act, product = rest[2], rest[-1]
        if product == 0:
            return
        if self.fault == "dy":
            self._full(head, t[7], filters)[:, -1] *= 1.1
        if self.fault == "the gradient of the input":
            self._full(head, act[9])[0, 0, 0, :2] += 1
        if self.fault == "several pieces of a tile" and head[1][1] >= 512:
            self._full(head, act[9])[0, -64:, -1] = 0
        if self.fault == "its sums" and act[10]:
            self._sums(head, act[10])[1, 5] *= 1.25
        if self.fault == "the residual's sums" and act[11]:
            self._sums(head, act[11])[0] = 0


FAULTS = {
    "the last row": "y of",
    "one channel": "y of",
    "not a number": "y of",
    "what is emitted": "activation of",
    "the mean": "mean of",
    "chance": "two runs differ",
    "a launch": "RuntimeError: conv_bn_fwd: too many resources",
    "the mask of g": "masked=False",
    "dy": "dy of",
    "the gradient of the input": "dgrad of",
    "several pieces of a tile": "dgrad of",
    "its sums": "sums of",
    "the residual's sums": "residual's sums of",
}


def test_right_kernels_pass(caplog: pytest.LogCaptureFixture) -> None:
    extension = Extension()
    with installed(extension), caplog.at_level(logging.WARNING, "fusedres"):
        assert _self_check.problem(CPU) is None
    assert set(extension.products) == {1} and not caplog.records


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_kernels_do_not(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    with installed(Wrong(fault)), caplog.at_level(logging.WARNING, "fusedres"):
        reason = _self_check.problem(CPU)
    assert reason is not None and reason.startswith("its self-check failed: ")
    assert FAULTS[fault] in reason
    (record,) = caplog.records
    assert record.getMessage() == f"plan 'fused+wgmma' is off on cpu: {reason}"


@pytest.mark.parametrize("around", ["inference", "autocast", "fake", "deterministic", "search"])
def test_it_leaves_everything_as_it_was(around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scopes: Any = {
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "fake": FakeTensorMode,
        "deterministic": torch.enable_grad,
        "search": torch.enable_grad,
    }
    monkeypatch.setattr(_self_check, "cases", lambda _: _self_check.CASES[:3])
    if around == "search":
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = torch.get_rng_state()
    torch.use_deterministic_algorithms(around == "deterministic")
    try:
        with installed(Extension()), scopes[around]():
            modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            assert _self_check.problem(CPU) is None
            assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            assert torch.is_autocast_enabled("cpu") == (around == "autocast")
            assert torch.backends.cudnn.benchmark == (around == "search")
        assert torch.are_deterministic_algorithms_enabled() == (around == "deterministic")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(before, torch.get_rng_state())


# --- when it runs ---------------------------------------------------------------------------------


class Gpu:
    """What torch says of a GPU, and what the self-check of it found."""

    def __init__(self) -> None:
        self.count, self.capability, self.capturing = 1, (9, 0), False
        self.checks: list[str] = []
        self.finding: str | None = None

    def problem(self, device: torch.device) -> str | None:
        self.checks.append(str(device))
        return self.finding


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A machine with one H200, where nothing was checked yet."""
    found = Gpu()
    with installed(Extension()):
        monkeypatch.setattr(backends, "product_problem", _PRODUCT_PROBLEM)
        monkeypatch.setattr(backends, "_wgmma_checked", {})
        monkeypatch.setattr(_self_check, "problem", found.problem)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: found.count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: found.capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
        yield found


_PRODUCT_PROBLEM = backends.product_problem


def test_with_no_gpu_it_is_off_and_never_runs(gpu: Gpu) -> None:
    gpu.count = 0
    expected = "no GPU of compute capability 9.0 has been seen here"
    assert backends.wgmma_problem(None) == expected
    assert backends.wgmma_note(None) == f"plan 'fused+wgmma' is off: {expected}"
    assert gpu.checks == []


def test_it_runs_once(gpu: Gpu) -> None:
    yet = "its self-check has not run yet; it runs where the plan is first asked for"
    assert backends.wgmma_problem(0, check=False) == yet and gpu.checks == []
    assert yet in backends.wgmma_note(None) and gpu.checks == []
    for _ in range(3):
        assert backends.product_problem("wgmma", 0) is None
    assert gpu.checks == ["cuda:0"]
    assert "has passed its self-check" in backends.wgmma_note(0)
    assert backends.product_problem("mma", 0) is None and gpu.checks == ["cuda:0"]
    assert backends.product_problem("wgmma", 1) is None and gpu.checks == ["cuda:0", "cuda:1"]


def test_a_failure_is_kept(gpu: Gpu) -> None:
    gpu.finding = "its self-check failed: y of ..."
    assert [backends.wgmma_problem(0) for _ in range(2)] == [gpu.finding] * 2
    assert len(gpu.checks) == 1
    assert backends.wgmma_note(0) == f"plan 'fused+wgmma' is off: {gpu.finding}"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_capabilities(gpu: Gpu, capability: tuple[int, int]) -> None:
    gpu.capability = capability
    problem = backends.wgmma_problem(0)
    assert (problem is None) == (capability == (9, 0)) == (gpu.checks == ["cuda:0"])
    if problem is not None:
        found = ".".join(map(str, capability))
        needed = "the kernels need 9.0 and no other"
        assert problem == f"a GPU has compute capability {found}, {needed}"
    assert (backends.product_problem("mma", 0) is None) == (capability >= (8, 0))


def test_a_build_without_its_code(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Extension, "wgmma_built", False)
    problem = backends.wgmma_problem(0)
    assert problem is not None and "without code for sm_90a" in problem and not gpu.checks


def test_a_backend_that_is_off(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "not_ready", lambda _: "cuda is off here")
    assert backends.wgmma_problem(0) == "cuda is off here" and not gpu.checks
    assert backends.product_problem("mma", 0) == "cuda is off here"


def test_not_while_a_graph_is_captured(gpu: Gpu) -> None:
    """That is not kept: it runs afterwards. What was checked before may be captured."""
    gpu.capturing = True
    problem = backends.wgmma_problem(0)
    assert problem is not None and "while a CUDA graph is captured" in problem
    assert gpu.checks == []
    gpu.capturing = False
    assert backends.wgmma_problem(0) is None and gpu.checks == ["cuda:0"]
    gpu.capturing = True
    assert backends.wgmma_problem(0) is None and gpu.checks == ["cuda:0"]


def test_too_little_memory_is_no_finding(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.device) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as scope:
        scope.setattr(_self_check, "_run", lambda *_: full(CPU))
        with pytest.raises(torch.OutOfMemoryError):
            _CHECK(CPU)
        scope.setattr(_self_check, "problem", full)
        assert "too little memory" in (backends.wgmma_problem(0) or "")
    assert backends.wgmma_problem(0) is None  # asked again


# --- what asks for it -----------------------------------------------------------------------------

X = torch.randn(2, 64, 5, 5).to(torch.bfloat16, memory_format=CHANNELS_LAST)
W = torch.randn(64, 64, 1, 1).to(torch.bfloat16)


def test_a_call_by_name_runs_or_says_why_not(gpu: Gpu) -> None:
    extension: Any = native.load()
    with use_plan("fused+wgmma"):
        conv_bn(X, W).value()
        assert gpu.checks and extension.products == [1]
        backends._wgmma_checked.clear()
        gpu.finding = "its self-check failed: y"
        message = r"plan 'fused\+wgmma' cannot run: its self-check failed: y \(asked for by"
        running = torch.zeros(64), torch.ones(64)
        with pytest.raises(RuntimeError, match=message):
            conv_bn(X, W, None, None, *running)
        assert not running[0].any() and extension.products == [1]
        conv_bn(X, torch.randn(8, 64, 1, 1).bfloat16())  # split: there is nothing to refuse
    with use_plan("fused+mma"):
        conv_bn(X, W)
    assert extension.products == [1, 0]


@pytest.mark.parametrize("finding", [None, "its self-check failed: y"])
def test_dynamo_traces_through_it(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, finding: Any) -> None:
    """The check itself, on real tensors, where a compiled function is what asks first."""
    torch._dynamo.reset()
    check = _CHECK if finding is None else lambda _: finding
    monkeypatch.setattr(_self_check, "problem", lambda _: check(CPU))
    monkeypatch.setattr(_self_check, "cases", lambda _: _self_check.CASES[:2])
    module = fusedres.ConvBNReLU(64, 64, 1).to(torch.bfloat16, memory_format=CHANNELS_LAST)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with use_backend("cuda"), use_plan("fused+wgmma"):
        if finding is not None:
            with pytest.raises(Exception, match="its self-check failed: y"):
                compiled(X)
            return
        torch.testing.assert_close(compiled(X), module(X))
    extension: Any = native.load()
    assert extension.products.count(1) > 2 * 2 * 2 * 2  # both dtypes, runs and directions, and ours


_CHECK = _self_check.problem
