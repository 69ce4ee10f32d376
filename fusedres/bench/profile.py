"""Where the time of one training step goes: by layer and direction, under torch's profiler.

The ops of fusedres are caught where they are dispatched, forward and in autograd's threads, and
labelled with the layer whose weight they were given; everything else, optimizer, head and loss, is
"other". Bytes are those of the tensors an op takes and gives, each once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.bench import roofline
from fusedres.bench.harness import profiler
from fusedres.bench.measure import Setting, name_of
from fusedres.bench.providers import Workload, build
from fusedres.bench.rows import Row

OTHER = "other"
KERNELS = 4  # named for each part, the longest first


@dataclass
class _Part:
    """What a layer did in one direction."""

    layer: str
    direction: str  # "fwd" or "bwd"
    backend: str | None
    plan: str | None
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    kernels: tuple[str, ...] = ()


def profile_step(work: Workload, setting: Setting, name: str = "fusedres") -> list[Row]:
    """One step of a provider, after two that warm up.

    Args:
        work: a training step.
        setting: where; its ceilings, if measured, give the share of the roofline.
        name: a provider that runs fusedres' ops, eagerly.

    Returns:
        Rows of section "profile", in the order of execution, "other" last: case (the layer), name
        ("fwd", "bwd"; "step" for what is left), backend, plan, ms, share of the step, bytes, flops,
        of_roofline, kernels.

    Raises:
        ValueError: no provider has such a name.
        RuntimeError: it cannot run the workload here.
    """
    provider = build(name, work)
    provider.run()
    provider.run()
    weights = {p.data_ptr(): n for n, p in provider.model.named_parameters() if p.dim() == 4}
    labels = _Labels(weights, work)
    if setting.on_gpu:
        torch.cuda.synchronize()
    with profiler(setting.on_gpu) as profiled:
        with record_function(labels.root), labels:
            provider.run()
        if setting.on_gpu:
            torch.cuda.synchronize()
    total = labels.read(list(profiled.events() or ()), setting.on_gpu)
    parts = list(labels.parts.values())
    parts.append(_Part(OTHER, "step", None, None))
    parts[-1].seconds = total - sum(part.seconds for part in parts)
    return [_row(part, total, work, setting) for part in parts]


class _Labels(TorchDispatchMode):
    """Wraps each op of fusedres in a record that names its layer."""

    root = "fusedres step"

    def __init__(self, weights: dict[int, str], work: Workload) -> None:
        super().__init__()
        self.weights, self.parts = weights, dict[str, _Part]()
        self.flops = {layer.name: layer.flops * work.batch for layer in roofline.layers(work.size)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        space, _, op = func._schema.name.partition("::")
        if space != "fusedres":
            return func(*args, **(kwargs or {}))
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        layer = op.removesuffix("_fwd").removesuffix("_bwd")
        weight = given.get("weight")
        if isinstance(weight, Tensor) and weight.data_ptr() in self.weights:
            layer = self.weights[weight.data_ptr()].removesuffix(".weight")
        direction = "bwd" if op.endswith("_bwd") else "fwd"
        label = f"fusedres {layer} {direction}"
        with record_function(label):
            out = func(*args, **(kwargs or {}))
        part = self.parts.setdefault(
            label, _Part(layer, direction, given.get("backend"), given.get("plan"))
        )
        part.bytes += _moved(given, out)
        if layer in self.flops:
            both = direction == "bwd" and bool(given.get("need_input", True))
            part.flops += self.flops[layer] * (2 if both else 1)
        return out

    def read(self, events: Sequence[FunctionEvent], on_gpu: bool) -> float:
        """Fill in the seconds of every part; those of the whole step."""
        total = 0.0
        for event in events:
            if event.device_type != torch.autograd.DeviceType.CPU:
                continue
            if on_gpu:
                total += event.self_device_time_total * 1e-6
            elif event.name == self.root:
                total = event.cpu_time_total * 1e-6
            part = self.parts.get(event.name)
            if part is not None:
                time = event.device_time_total if on_gpu else event.cpu_time_total
                part.seconds += time * 1e-6
                part.kernels = _kernels(event, on_gpu)
        return total


def _moved(given: dict[str, Any], out: Any) -> float:
    """Bytes of the activations and weights that go in and come out, each tensor once."""
    if given.get("packed") is not None:
        given = {name: value for name, value in given.items() if name != "weight"}
    outs = out if isinstance(out, tuple | list) else (out,)
    tensors = [t for t in (*given.values(), *outs) if isinstance(t, Tensor) and t.dim() == 4]
    return float(sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values()))


def _kernels(event: FunctionEvent, on_gpu: bool) -> tuple[str, ...]:
    """What ran below an event, by name, the longest first."""
    times: dict[str, float] = {}

    def visit(e: FunctionEvent) -> None:
        if on_gpu:
            for kernel in e.kernels:
                times[kernel.name] = times.get(kernel.name, 0.0) + kernel.duration
        elif e is not event:
            times[e.name] = times.get(e.name, 0.0) + e.self_cpu_time_total
        for child in e.cpu_children:
            visit(child)

    visit(event)
    return tuple(sorted(times, key=lambda name: -times[name])[:KERNELS])


def _row(part: _Part, total: float, work: Workload, setting: Setting) -> Row:
    row: Row = {
        "section": "profile",
        "case": part.layer,
        "shape": list(work.shape),
        "name": part.direction,
        "batch": work.batch,
        "dtype": name_of(work.dtype),
        "backend": part.backend,
        "plan": part.plan,
        "ms": part.seconds * 1e3,
        "share": part.seconds / total,
        "bytes": part.bytes or None,
        "flops": part.flops or None,
        "kernels": list(part.kernels),
    }
    ceilings = setting.ceilings.get(work.dtype)
    if ceilings is not None and part.bytes and part.seconds:
        row["of_roofline"] = roofline.seconds(part.flops, part.bytes, *ceilings) / part.seconds
    return row | setting.where
