"""Frozen networks on a GPU: every backend and plan against fp64, NaN, frames, CUDA graphs that
several threads replay, each on a stream of its own.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from test_freeze import Small, moved
from test_triton_gpu import _no_tf32  # noqa: F401  (a fixture here, too)
from torch import Tensor, nn

import fusedres
from fusedres import backends, freeze, report, use_backend, use_plan
from fusedres.testing import CHANNELS_LAST, assert_three_way

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
WAYS = [("auto", "auto"), ("cuda", "split"), ("triton", "fused"), ("triton", "split")]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network() -> nn.Module:
    torch.manual_seed(0)
    return moved(fusedres.FusedResNet50(10)).cuda()


def images(batch: int, size: int = 96, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator)
    return x.cuda().contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_against_fp64(way: tuple[str, str], dtype: torch.dtype) -> None:
    if way[0] != "auto":
        assert backends.unavailable(way[0], "conv_act", "cuda", dtype) is None
    model = network()
    frozen, plain = freeze(model, dtype=dtype), fusedres.unfuse(copy.deepcopy(model)).to(dtype)
    wide = copy.deepcopy(fusedres.unfuse(model)).double()
    ours, peer, truth = [], [], []
    with torch.inference_mode(), use_backend(way[0]), use_plan(way[1]):
        for batch in (1, 2, 8, 8):
            x = images(batch, seed=batch + len(ours)).to(dtype)
            ours.append(frozen(x))
            peer.append(plain(x))
            truth.append(wide(x.double()))
        rows = report(frozen)
    assert_three_way(str(way), ours, peer, truth, dtype)
    if way[1] == "fused":
        assert {(row.backend, row.plan) for row in rows} == {("triton", "fused")}


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_nan_goes_through(way: tuple[str, str]) -> None:
    model = moved(Small()).cuda()
    frozen, x = freeze(model), images(2, 64)
    x[1, 1, 30, 30] = float("nan")
    with torch.inference_mode(), use_backend(way[0]), use_plan(way[1]):
        assert torch.equal(frozen(x).isnan(), fusedres.unfuse(model)(x).isnan())


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_frames(way: tuple[str, str]) -> None:
    model = network()
    frozen = freeze(model, dtype=torch.bfloat16, mean=MEAN, std=STD)
    frames = torch.randint(256, (4, 75, 90, 3), dtype=torch.uint8, device="cuda")
    mean, std = (torch.tensor(v, device="cuda").double().view(-1, 1, 1) for v in (MEAN, STD))
    x = (frames.permute(0, 3, 1, 2).double() / 255 - mean) / std
    plain = fusedres.unfuse(copy.deepcopy(model)).bfloat16()
    with torch.inference_mode(), use_backend(way[0]), use_plan(way[1]):
        truth = fusedres.unfuse(copy.deepcopy(model)).double()(x)
        peer = plain(x.bfloat16().contiguous(memory_format=CHANNELS_LAST))
        assert_three_way("frames", [frozen(frames)], [peer], [truth], torch.bfloat16)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_graphs_give_the_bits_of_calls_on_many_threads(way: tuple[str, str]) -> None:
    """Eight threads, each on its stream, more shapes than are kept; weights that change."""
    model = network()
    called = freeze(model, dtype=torch.bfloat16)
    graphed = freeze(model, dtype=torch.bfloat16, cuda_graph=True, mean=MEAN, std=STD)
    inputs = [images(1 + i % 10, seed=i).bfloat16() for i in range(30)]
    with use_backend(way[0]), use_plan(way[1]), torch.inference_mode():
        truth = [called(x) for x in inputs]
        torch.cuda.synchronize()

    def work(thread: int) -> list[tuple[int, Tensor]]:
        stream, found = torch.cuda.Stream(), []
        with (
            torch.cuda.stream(stream), torch.inference_mode(),
            use_backend(way[0]), use_plan(way[1]),
        ):  # fmt: skip
            for i in range(len(inputs)):
                index = (i * 7 + thread) % len(inputs)
                found.append((index, graphed(inputs[index])))
        stream.synchronize()
        return found

    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(work, range(8)):
                for i, y in found:
                    assert torch.equal(y, truth[i]), i
    engine: Any = graphed._frozen
    assert len(engine._graphs._recorded) == 8
    with use_backend(way[0]), use_plan(way[1]), torch.inference_mode():
        first, kept = graphed(inputs[0]), graphed(inputs[1])
        again = kept.clone()
        graphed(inputs[11])  # of the same shape: what a caller has stays
        assert torch.equal(kept, again)
        graphed.fc.bias.add_(1)
        graphed.conv1.weight.mul_(2)
        changed = graphed(inputs[0])
        assert not torch.equal(changed, first)
        graphed.fc.weight = nn.Parameter(graphed.fc.weight * 3, requires_grad=False)
        tripled = graphed(inputs[0])
        plain = graphed.forward_plainly(inputs[0])
        torch.testing.assert_close(tripled, plain, rtol=0.1, atol=0.1)
        assert not torch.equal(tripled, changed)
        frames = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, device="cuda")
        assert torch.equal(graphed(frames), graphed(frames))
