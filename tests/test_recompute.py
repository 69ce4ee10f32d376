"""What need not be kept for backward: memory="recompute", and activation checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from live import Live
from test_fuse import Small, two_steps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fusedres
from fusedres import FusedResNet50, fuse, unfuse, use_backend
from fusedres.nn.blocks import FusedModule, set_memory
from fusedres.nn.fuse import FusedByProgram
from fusedres.ops import conv_bn
from fusedres.testing import CHANNELS_LAST, CONTIGUOUS, assert_three_way, serving_backends

BACKENDS = serving_backends()
needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")


def blocks(dtype: torch.dtype) -> nn.Module:
    """Blocks of channels that the CPU's fused plan serves, and some that it does not. In half
    types without projections: what is computed again is rounded before it joins.
    """
    if dtype == torch.bfloat16:
        others = (fusedres.IdentityBlock(32, (8, 8, 32)), fusedres.nn.BasicBlock(32, 32))
        return nn.Sequential(fusedres.IdentityBlock(32, (32, 32, 32)), *others)
    return nn.Sequential(
        fusedres.ConvBlock(32, (32, 32, 64)),
        fusedres.IdentityBlock(64, (32, 32, 64)),
        fusedres.ConvBlock(64, (8, 8, 24), stride_in_1x1=True),
        fusedres.nn.BasicBlock(24, 32, 2),
    )


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_gradients_have_the_same_bits(
    backend: str, dtype: torch.dtype, mode: str, memory_format: torch.memory_format
) -> None:
    model = blocks(dtype).to(dtype).to(memory_format=memory_format)  # type: ignore[call-overload]
    if mode != "train":
        model.eval()
    if mode == "frozen":  # statistics alone
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    other = copy.deepcopy(model)
    set_memory(other, "recompute")
    x = torch.randn(3, 32, 17, 17).to(dtype).contiguous(memory_format=memory_format)
    found = []
    for m in (model, other):
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            out = m(leaf)
            out.square().sum().backward()
        grads = [p.grad for p in m.parameters()]
        found.append([out, leaf.grad, *grads, *m.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_projection_in_bf16_is_as_far_off_as_plain_pytorchs(backend: str) -> None:
    """The three-way rule, for outputs and gradients."""
    found: dict[str, list[list[Tensor]]] = {"ours": [], "peer": [], "truth": []}
    for seed in range(4):
        torch.manual_seed(seed)
        block = fusedres.ConvBlock(32, (32, 32, 64)).bfloat16()
        plain, wide = unfuse(block), unfuse(copy.deepcopy(block).double())
        set_memory(block, "recompute")
        x = torch.randn(4, 32, 17, 17).bfloat16()
        for name, model in (("ours", block), ("peer", plain), ("truth", wide)):
            model.zero_grad()
            leaf = x.detach().clone().to(next(model.parameters()).dtype).requires_grad_()
            with use_backend(backend):
                out = model(leaf)
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
            out.backward(upstream.bfloat16().to(out.dtype))
            grads = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
            found[name].append([out.detach(), leaf.grad, *grads])  # type: ignore[list-item]
    for i in range(len(found["ours"][0])):
        ours, peer, truth = ([seed[i] for seed in found[name]] for name in found)
        assert_three_way(f"result {i}", ours, peer, truth, torch.bfloat16, trim=0.02)


def test_a_fused_model_recomputes_as_ours_does() -> None:
    model, x = Small().double(), torch.randn(3, 3, 21, 18).double()
    truth = two_steps(fuse(copy.deepcopy(model)), x)
    fused = fuse(copy.deepcopy(model), memory="recompute")
    kept = [m.memory for m in fused.modules() if isinstance(m, FusedModule)]
    assert kept and set(kept) == {"recompute"}
    found = two_steps(fused, x)
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    assert not any("memory" in vars(m) for m in unfuse(fused).modules())


@pytest.mark.parametrize("backend", BACKENDS)
def test_recompute_compiles_in_one_graph(backend: str) -> None:
    model = blocks(torch.float64).double()
    set_memory(model, "recompute")
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    found = []
    with use_backend(backend):
        for run in (model, compiled):
            x = torch.ones(2, 32, 9, 9).double().cumsum(3).requires_grad_()
            run(x).square().mean().backward()
            found.append([x.grad, *(p.grad for p in run.parameters()), *run.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_what_is_computed_again_ends_a_branch() -> None:
    """conv3 and the projection of each block; the 3x3 in the middle is not worth it."""
    ends = {
        step.conv.rpartition(".")[2] if "downsample" not in step.conv else "downsample"
        for module in fuse(Small()).modules()
        if isinstance(module, FusedByProgram)
        for step in module.program().pairs()  # type: ignore[union-attr]
        if step.ends
    }
    assert ends == {"conv3", "downsample"}


def bytes_after_forward(model: nn.Module, images: Tensor, dtype: torch.dtype) -> int:
    live = Live()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), live:
        logits = model(images)
    held = live.bytes(model, images)
    assert logits.requires_grad  # until here it holds what backward needs
    return held


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recompute_keeps_half_of_what_eager_keeps(dtype: torch.dtype) -> None:
    """What is alive after forward, counted as for the four fifths of memory="exact"."""
    images = torch.randn(2, 3, 224, 224).contiguous(memory_format=CHANNELS_LAST)
    makers: list[Callable[[], nn.Module]] = [
        lambda: unfuse(FusedResNet50()),
        FusedResNet50,
        lambda: FusedResNet50(memory="recompute"),
    ]
    plain, exact, recompute = (
        bytes_after_forward(make().to(memory_format=CHANNELS_LAST), images, dtype)  # type: ignore[call-overload]
        for make in makers
    )
    assert recompute <= 0.5 * plain < 0.7 * exact
    assert recompute >= 0.4 * plain  # so it is counted


def test_recompute_gives_a_value_and_nothing_else() -> None:
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 1, 1)
    expected = conv_bn(x, w).value()
    assert torch.equal(conv_bn(x, w, recompute=True), expected)
    with pytest.raises(ValueError, match="conv_bn: recompute gives a Tensor"):
        conv_bn(x, w, recompute=True, emit=True)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="conv_bn: recompute must be a bool, got int"):
        conv_bn(x, w, recompute=1)  # type: ignore[call-overload]


def test_what_is_recomputed_from_may_not_change() -> None:
    x = torch.randn(2, 3, 5, 5)
    w = torch.randn(4, 3, 1, 1, requires_grad=True)
    out = conv_bn(x, w, recompute=True)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- activation checkpointing ---------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_moves_running_statistics_once(
    backend: str, momentum: float | None, reentrant: bool
) -> None:
    """The checkpoint's second forward gives the same gradients and moves nothing."""
    model = nn.Sequential(fusedres.ConvBNReLU(3, 8, 3), fusedres.ConvBlock(8, (4, 4, 16)))
    model = fuse(nn.Sequential(model, Small().layer2)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    other = copy.deepcopy(model)
    found = []
    for m, run in ((model, m_once), (other, m_checkpointed(reentrant))):
        x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()
        x.requires_grad_()
        with use_backend(backend):
            for _ in range(2):
                run(m, x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert int(other[0][0].bn.num_batches_tracked) == 2  # type: ignore[index]


def m_once(model: Any, x: Tensor) -> Tensor:
    return model(x)


def m_checkpointed(reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    def run(model: Any, x: Tensor) -> Tensor:
        h = checkpoint_sequential(model[0], 2, x, use_reentrant=reentrant)
        return checkpoint(model[1], h, use_reentrant=reentrant)

    return run


def test_functions_know_a_checkpoint_too() -> None:
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    w, mean, var = torch.randn(4, 3, 1, 1), torch.zeros(4), torch.ones(4)
    once = [mean.clone(), var.clone()]
    fusedres.conv_bn_relu(x, w, None, None, *once)
    out = checkpoint(
        lambda x: fusedres.conv_bn_relu(x, w, None, None, mean, var), x, use_reentrant=False
    )
    out.sum().backward()
    assert torch.equal(mean, once[0]) and torch.equal(var, once[1])
