"""Public functions called by several threads at once, forward and backward, give the bits that one
thread gives: nothing of a call is shared with another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres import ops
from fusedres.testing import CHANNELS_LAST, CONTIGUOUS, Maker, serving_backends

CALLS, THREADS, ROUNDS = 24, 6, 2
SHAPES = [(2, 8, 9, 7), (1, 16, 14, 14), (3, 5, 8, 8), (4, 24, 28, 28)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def block(make: Maker, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A convolution, a second one that joins, a pool: outputs and leaves."""
    c = x.size(1)
    leaves = [x, make.weight(8, c, 3, 3), make.weight(c, 8, 1, 1), make.activation(c, grad=True)]
    running = [torch.zeros(c), torch.ones(c)]
    h = ops.conv_bn(x, leaves[1], padding=1)
    joined = ops.conv_bn(h, leaves[2], leaves[3].abs(), None, *running, residual=x)
    pooled = ops.bn_relu_maxpool(ops.batch_norm(joined.value()))
    return [joined.value(), pooled, *running], leaves


def functions(make: Maker, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The functions on plain tensors."""
    c = x.size(1)
    weight, stem, r = make.weight(c, c, 3, 3), make.weight(6, c, 3, 3), make.activation(*x.shape)
    running = [torch.zeros(c), torch.ones(c)]
    out = fusedres.conv_bn_relu(x, weight, None, None, *running, padding=1, residual=r)
    out = fusedres.bn_add_relu(fusedres.add_relu(out, r), None, None, residual=x)
    p = ops.conv_bn_relu_maxpool(out, stem, padding=1)
    return [out, p, *running], [x, weight, stem, r]


def results(number: int, backend: str) -> list[Tensor]:
    """Outputs, running statistics and gradients of one call."""
    dtype = DTYPES[number % 3] if backend != "triton" else DTYPES[number % 2]
    make = Maker(dtype, (CHANNELS_LAST, CONTIGUOUS)[number % 2], seed=number)
    x = make.activation(*SHAPES[number % 4])
    function: Callable[[Maker, Tensor], tuple[list[Tensor], list[Tensor]]]
    function = (block, functions)[number // 2 % 2]
    with fusedres.use_backend(backend):
        outputs, leaves = function(make, x)
        differentiable = [t for t in outputs if t.requires_grad]
        upstream = [torch.ones_like(t) for t in differentiable]
        return outputs + list(torch.autograd.grad(differentiable, leaves, upstream))


@pytest.mark.parametrize("backend", serving_backends())
def test_calls_of_several_threads_at_once_are_those_of_one(backend: str) -> None:
    few = backend in ("triton", "cuda")  # the interpreter, the emulator
    numbers = list(range(CALLS // 6 if few else CALLS))
    alone = [results(n, backend) for n in numbers]
    barrier = threading.Barrier(THREADS)

    def work(thread: int) -> list[tuple[int, list[Tensor]]]:
        barrier.wait()  # so that they do meet
        mine = numbers[thread % len(numbers) :] + numbers[: thread % len(numbers)]
        return [(n, results(n, backend)) for n in mine * (1 if few else ROUNDS)]

    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(work, range(THREADS)):
            for n, tensors in found:
                for ours, expected in zip(tensors, alone[n], strict=True):
                    assert torch.equal(ours, expected), n


def test_a_backend_is_chosen_for_the_thread_that_chooses_it() -> None:
    seen = []

    def other() -> None:
        with fusedres.use_backend("reference"):
            seen.append(fusedres.add_relu(x, x).grad_fn.name())  # type: ignore[union-attr]

    x = torch.ones(3, requires_grad=True)
    with fusedres.use_backend(serving_backends()[-1]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        mine = fusedres.add_relu(x, x).grad_fn.name()  # type: ignore[union-attr]
    assert seen[0].startswith("Relu")
    assert serving_backends()[-1] == "reference" or mine.startswith("AddRelu")
