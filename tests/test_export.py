"""torch.export and ONNX: a recorded graph is one of plain torch ops, of the plain modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peers
import pytest
import torch
from test_fuse import Small
from torch import Tensor, nn

import fusedres
from fusedres import fuse

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: fusedres.resnet18(4),
    "ours, bottlenecks": lambda: nn.Sequential(
        fusedres.ConvBNReLU(3, 8, 3),
        fusedres.ConvBlock(8, (4, 4, 16)),
        fusedres.IdentityBlock(16, (4, 4, 16)),
    ),
    "fused": lambda: fuse(Small()),
}


def prepared(name: str) -> tuple[nn.Module, Tensor]:
    model, x = MODELS[name](), torch.randn(2, 3, 64, 64)
    model(x)  # running statistics that are not the first
    return model.eval(), x


def targets(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_graph_holds_aten_ops_alone(name: str) -> None:
    model, x = prepared(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    called = targets(exported.graph)
    assert called and not any("fusedres" in target for target in called)
    assert any("conv2d" in t for t in called) and any("batch_norm" in t for t in called)
    larger = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(exported.module()(larger), model(larger), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_training_graph_exports_too(name: str) -> None:
    model, x = prepared(name)
    model.train()
    exported = torch.export.export(copy.deepcopy(model), (x,))
    assert not any("fusedres" in target for target in targets(exported.graph))
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_traced_graph_holds_no_op_of_ours(name: str) -> None:
    model, x = prepared(name)
    traced = torch.jit.trace(model, x)
    assert "fusedres::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.peers
@pytest.mark.parametrize("name", [*MODELS, "FusedResNet50", "fused resnet50 of torchvision"])
def test_onnx_gives_the_same_numbers(name: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    if name in MODELS:
        model, x = prepared(name)
    else:
        made = (
            fusedres.FusedResNet50(5) if name == "FusedResNet50" else fuse(peers.make("resnet50"))
        )
        x = torch.randn(2, 3, 64, 64)
        made(x)
        model = made.eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (x,), path, dynamo=True, input_names=["x"], output_names=["out"], external_data=False
    )
    domains = {node.domain for node in onnx.load(path).graph.node}
    assert domains <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-4)
