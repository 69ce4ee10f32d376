"""Blocks and whole networks: every provider of a workload built, judged, then timed in turns.

The truth is one run of the unfused network in fp64. max_error is of the output, grad_error of all
gradients taken as one vector, both by the Euclidean norm. In half types the gradients of a whole
network are mostly noise, in every implementation alike: compare them with eager's.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedres.bench import roofline
from fusedres.bench.harness import compare, profiler, without_search
from fusedres.bench.measure import (
    ANCHOR,
    Job,
    Measured,
    Setting,
    failed_row,
    name_of,
    reason_of,
    timed_rows,
)
from fusedres.bench.providers import Provider, Way, Workload, build
from fusedres.bench.rows import Row, label

BLOCKS = tuple(
    f"{kind} {stage}" for stage in (1, 2, 3, 4) for kind in ("ConvBlock", "IdentityBlock")
)
_SHARED = ("section", "case", "shape", "dtype", "batch")
IDEAL = {True: "ideal", False: "inference"}  # the dataflow whose bytes every provider is held to


def network_job(work: Workload, setting: Setting, names: Sequence[str], suffix: str = "") -> Job:
    """Eager and the providers of these names, or those that the setting wants, on a workload."""
    names = [ANCHOR, *(name for name in setting.wanted or names if name != ANCHOR)]
    labels = tuple(label(_about(work, Way(name))) for name in names)
    about = {field: _about(work, Way(ANCHOR))[field] for field in _SHARED}
    title = f"{work.block or about['section']}, {work}{suffix}"
    return Job(about, title, labels, lambda setting: measure_network(work, names, setting))


def measure_network(work: Workload, names: Sequence[str], setting: Setting) -> list[Measured]:
    """A row for each provider; one that fails costs the others nothing."""
    truth = _truth(work)
    pool = _new_pool(setting)
    about: dict[str, Row] = {}
    built: dict[str, Provider] = {}
    failed: list[Measured] = []
    with torch._dynamo.config.patch(recompile_limit=64):  # the compiled providers share their code
        for name in names:
            known = _about(work, Way(name))
            try:
                provider, found = _judged(name, work, pool, truth, setting)
            except Exception as error:
                failed.append(failed_row(known, reason_of(error), setting))
                pool = _new_pool(setting)  # the old one may have been spoiled
                continue
            built[label(known)] = provider
            about[label(known)] = known | found
        rows = []
        if built:
            comparison = compare(
                {name: provider.run for name, provider in built.items()},
                rounds=setting.rounds,
                warmup=1,
                budget=setting.budget,
                stopwatch=setting.stopwatch,
            )
            rows = timed_rows(
                comparison,
                dict.fromkeys(built, 1),
                about,
                setting,
                work=dict.fromkeys(built, _work_done(work)),
                ceilings=setting.ceilings.get(work.dtype),
            )
    built.clear()
    torch._dynamo.reset()
    _free(setting)
    return [*rows, *failed]


def _new_pool(setting: Setting) -> Any:
    return torch.cuda.graph_pool_handle() if setting.on_gpu else None


def _about(work: Workload, way: Way) -> Row:
    return {
        "section": "blocks" if work.block else "train" if work.training else "infer",
        "case": work.block or "resnet50",
        "shape": list(work.shape),
        "name": way.name,
        "batch": work.batch,
        "dtype": name_of(work.dtype),
        "backend": way.backend,
        "plan": way.plan,
        "how": "graph" if way.mode == "graph" else "calls",
    }


def _work_done(work: Workload) -> list[tuple[float, float]]:
    """Bytes and FLOP of the kernels of a run: of the dataflow that moves least."""
    if work.block is None:
        kernels = roofline.kernels(IDEAL[work.training], work.size, work.dtype.itemsize)
    else:
        kernels = _block_kernels(work)
    return [(work.batch * kernel.bytes, work.batch * kernel.flops) for kernel in kernels]


def _block_kernels(work: Workload) -> list[roofline.Kernel]:
    """What a block alone has to do, everything fused into its convolutions but the join at its end.

    Forward each convolution reads its input and writes its output; the join reads the last of them
    and the shortcut and writes the sum. Backward the join reads its gradient, its mask and the last
    output and writes g; dgrad reads g, y and x and writes the gradient of x; wgrad reads g, y, x.
    """
    assert work.block is not None
    kind, stage = work.block.split()
    path = f"layer{stage}.{0 if kind == 'ConvBlock' else 1}."
    layers = [layer for layer in roofline.layers() if layer.name.startswith(path)]
    scale = work.size / layers[0].size
    size = work.dtype.itemsize
    found = []
    for layer in (layer._replace(size=round(layer.size * scale)) for layer in layers):
        read, whole, output = layer.read(size), layer.input(size), layer.output(size)
        moved = {"fwd": read + output, "dgrad": 2 * output + read + whole}
        moved["wgrad"] = 2 * output + read
        found += [roofline.Kernel(layer.stage, k, layer.flops, b) for k, b in moved.items()]
        if layer.role == "conv3":
            found.append(roofline.Kernel(layer.stage, "join", 0.0, 3 * output))
            found.append(roofline.Kernel(layer.stage, "join backward", 0.0, 4 * output))
    return found


# --- truth and error ------------------------------------------------------------------------------


Truth = tuple[
    list[Tensor], list[Tensor], list[Tensor]
]  # parameters at the start, output, gradients


def _truth(work: Workload) -> Truth | None:
    """Of the unfused network in fp64; None where that does not fit the memory."""
    try:
        provider = build("eager", replace(work, dtype=torch.float64))
        start = [p.detach().clone() for p in provider.model.parameters()]
        with without_search():
            provider.run()
        return start, provider.output, [t.grad for t in provider.leaves if t.grad is not None]
    except torch.OutOfMemoryError:
        return None


def _judged(
    name: str, work: Workload, pool: Any, truth: Truth | None, setting: Setting
) -> tuple[Provider, Row]:
    """The provider, and its errors and memory."""
    before = _begin_peak(setting)
    provider = build(name, work, pool)
    found: Row = {"backend": None if provider.backend == "torch" else provider.backend}
    if setting.on_gpu and not provider.is_graph:
        provider.run()  # searches for algorithms, compiles, tunes: none of it is a step's memory
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        provider.run()  # torch.compile's own graphs are recorded here
    if truth is not None:
        start, output, gradients = truth
        with torch.no_grad():
            if work.training:
                for parameter, value in zip(provider.model.parameters(), start, strict=True):
                    parameter.copy_(value)
        provider.run()
        found["max_error"] = _distance(provider.output, output)
        if work.training:
            grads = [leaf.grad for leaf in provider.leaves]
            found["grad_error"] = _distance(grads, gradients)
    else:
        provider.run()
        found["note"] = "no error: fp64 does not fit the memory"
    if setting.on_gpu:
        torch.cuda.synchronize()
        found["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    else:
        found["peak_gib"] = _peak_of_cpu(provider)
    return provider, found


def _distance(results: Iterable[Tensor | None], truth: Iterable[Tensor]) -> float:
    """Of all tensors as one vector from the truth, relative to its norm; inf where a result is not
    finite or missing.
    """
    off = norm = 0.0
    for ours, exact in itertools.zip_longest(results, truth):
        if ours is None or exact is None or ours.shape != exact.shape:
            return float("inf")
        off += float((ours.double() - exact).square().sum())
        norm += float(exact.square().sum())
    error = (off / norm) ** 0.5 if norm else off**0.5
    return error if error < float("inf") else float("inf")


# --- memory ---------------------------------------------------------------------------------------


def _begin_peak(setting: Setting) -> int:
    _free(setting)
    if not setting.on_gpu:
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _free(setting: Setting) -> None:
    gc.collect()
    if setting.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _peak_of_cpu(provider: Provider) -> float | None:
    """GiB by the allocator's own events in a run, over what the model holds before it."""
    for leaf in provider.leaves:
        leaf.grad = None
    provider.output.clear()
    held = [*provider.model.parameters(), *provider.model.buffers()]
    resident = sum(t.numel() * t.element_size() for t in held)
    with profiler(on_gpu=False, profile_memory=True) as profiled:
        provider.run()
    inner = getattr(profiled.profiler, "kineto_results", None)
    if inner is None:
        return None
    events = [e for e in inner.events() if e.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return (resident + most) / 2**30
