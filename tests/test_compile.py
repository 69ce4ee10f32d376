"""torch.compile on a training step: one graph, eager's numbers, no compilation for another batch
size; and opcheck of every op there is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from fuzzing import SETTINGS, setting
from test_fuse import Small
from test_fuzz import BACKENDS as KERNELS
from test_fuzz import REGISTERED, call_of
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from fusedres import ConvBlock, ConvBNReLU, IdentityBlock, fuse, use_backend
from fusedres.nn import Stage
from fusedres.nn.blocks import set_memory
from fusedres.testing import CHANNELS_LAST, serving_backends

BACKENDS = serving_backends()
FASTEST = BACKENDS[-1]
slow = pytest.mark.slow


def stage() -> nn.Module:
    """Of channels that the CPU's fused plan takes."""
    return Stage(ConvBlock(32, (32, 32, 64)), IdentityBlock(64, (32, 32, 64)))


def block() -> nn.Module:
    return Stage(IdentityBlock(32, (32, 8, 32)))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "stage": (stage, 32),
    "block": (block, 32),
    "layer": (lambda: Stage(ConvBNReLU(8, 8, 3, padding=1)), 8),
    "fused": (lambda: fuse(Small()), 3),
    "recompute": (lambda: fuse(Small(), memory="recompute"), 3),
}


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = MODELS[name][0]().to(dtype)
    return model.to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]


def images(name: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, MODELS[name][1], 12, 10, generator=generator, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=CHANNELS_LAST)


def step(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one step."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return {"out": out.detach(), "x": x.grad} | grads | buffers  # type: ignore[dict-item]


def assert_equal(ours: dict[str, Tensor], truth: dict[str, Tensor], tol: float = 1e-10) -> None:
    assert ours.keys() == truth.keys()
    for name, true in truth.items():
        limit = tol * max(1.0, float(true.abs().max()))
        torch.testing.assert_close(ours[name], true, rtol=0, atol=limit, msg=name)


# --- one graph, and no other ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "backend"),
    [("stage", FASTEST), ("fused", FASTEST), pytest.param("stage", "reference", marks=slow)],
)
def test_one_graph_serves_every_batch_size(name: str, backend: str) -> None:
    """In training: marked as dynamic, a batch that the graph were bound to would raise."""
    eager = made(name)
    model, counter = copy.deepcopy(eager), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def run(x: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, 0)
        return compiled(x)

    with use_backend(backend):
        for batch in (2, 3, 5):
            x = images(name, batch)
            assert_equal(step(model, run, x), step(eager, eager, x))
    assert counter.frame_count == 1


def test_dynamic_shapes_modes_and_backends() -> None:
    """dynamic=True compiles a first batch, of whatever BatchNorm, twice: a size that is a number to
    it becomes a constant then. No other batch does; another mode and another backend do once.
    """
    eager = made("layer")
    model, counter = copy.deepcopy(eager), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for training, backend in [(True, FASTEST), (False, FASTEST), (True, FASTEST)] + [
        (True, "reference"),
        (True, FASTEST),
    ]:
        model.train(training), eager.train(training)
        for batch in (2, 3, 5):
            x = images("layer", batch)
            with use_backend(backend):
                assert_equal(step(model, compiled, x), step(eager, eager, x))
            counts.append(counter.frame_count)
    first = counts[::3]
    assert counts == [n for n in first for _ in range(3)]
    assert first[0] < first[1] == first[2] < first[3] == first[4] <= 6
    graphs = [str(counter.graphs[count - 1].graph) for count in first]
    assert ["autograd_function_apply" in g for g in graphs] == [True, True, True, False, False]


@pytest.mark.parametrize("name", ["block", *(pytest.param(n, marks=slow) for n in MODELS)])
def test_nothing_breaks_the_graph(name: str) -> None:
    found = torch._dynamo.explain(made(name))(images(name))
    assert (found.graph_break_count, found.graph_count) == (0, 1), found.break_reasons


# --- numbers --------------------------------------------------------------------------------------


def test_under_autocast() -> None:
    eager = made("block", torch.float32)
    model, x = copy.deepcopy(eager), images("block", dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for m, run in ((model, compiled), (eager, eager)):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(m, run, x))
    assert found[0]["out"].dtype == torch.bfloat16
    kinds = {t.dtype for n, t in found[0].items() if n != "out"}
    assert kinds == {torch.float32, torch.int64}
    assert_equal(*found, tol=0.0)


def convolutions(graph: torch.fx.GraphModule) -> int:
    """How many run forward; an op that may change an argument is an argument itself."""
    called = [str((node.target, *node.args[:1])) for node in graph.graph.nodes]
    return sum("conv_bn_fwd" in name for name in called)


def test_recompute_stays_in_backward() -> None:
    """The last convolution runs again there, and forward gives it one map less to keep."""
    x, found = images("block"), []
    for memory in ("exact", "recompute"):
        eager = made("block")
        set_memory(eager, memory)
        model = copy.deepcopy(eager)
        graphs: list[torch.fx.GraphModule] = []

        def note(graph: torch.fx.GraphModule, _: Any, graphs: Any = graphs) -> Any:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        counting = aot_autograd(fw_compiler=note, bw_compiler=note)
        compiled = torch.compile(model, backend=counting, fullgraph=True)
        with use_backend(FASTEST):
            assert_equal(step(model, compiled, x), step(eager, eager, x), tol=0.0)
        forward, backward = graphs
        (results,) = (n.args[0] for n in forward.graph.nodes if n.op == "output")
        maps = sum(r.meta["val"].dim() == 4 for r in results if isinstance(r, torch.fx.Node))
        found.append((maps, convolutions(backward)))
        assert convolutions(forward) == 3
    assert found[0][1] == 0 and found[1] == (found[0][0] - 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fp64", "bf16", "eval"])
@pytest.mark.parametrize(
    ("name", "backend"),
    [("stage", b) for b in BACKENDS] + [("fused", FASTEST), ("recompute", FASTEST)],
)
def test_inductor_gives_eagers_numbers(name: str, backend: str, mode: str) -> None:
    """Two steps of SGD in one graph of machine code; under autocast one, up to rounding."""
    dtype = torch.float32 if mode == "bf16" else torch.float64
    eager = made(name, dtype).train(mode != "eval")
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (model, eager)]
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"):
        for batch in (2,) if mode == "bf16" else (2, 2):
            x = images(name, batch, dtype)
            ours, truth = step(model, compiled, x), step(eager, eager, x)
            assert_equal(ours, truth, 0.05 if mode == "bf16" else 1e-10)
            for optimizer in optimizers:
                optimizer.step()


# --- ops ------------------------------------------------------------------------------------------

OPS = sorted(
    name.removeprefix("fusedres::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fusedres::")
)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_every_op_there_is(name: str, backend: str) -> None:
    """On arguments of the fuzzer, whose table must know it."""
    assert name in REGISTERED, f"{name}: tests/test_fuzz.py has no arguments for it"
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    for number in (0, 7919 * 3 % SETTINGS):
        call = call_of(f"ops.{name}", backend, setting(number, backend == "triton"))
        torch.library.opcheck(call.function.default, (), call.arguments, test_utils=checks)
