"""Scopes, the environment variable, and reasons."""

from __future__ import annotations

import threading

import pytest
import torch

import fusedres
from fusedres import backends, use_backend, use_plan
from fusedres.ops import conv_bn

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
