"""Every light pass at ResNet-50's sizes: cuda, triton, torch's own, and a copy of as many bytes.

    python benchmarks/light_passes.py [--quick] [--out FILE]

All providers of a row take turns in one run, each as a CUDA graph of launches that walk over copies
of the inputs, so many that they exceed the L2 cache three times. Bytes are the op's contract: what
has to be read and written once. `copy` moves as many from device to device in the same rounds; it
is the ceiling. "torch" is what an eager network would run in the pass's place, named in the table;
where torch has no such pass, the nearest ones it has.

With `--device cpu` the harness itself runs, on tiny sizes with the cpp backend.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from passes import PASSES, SIZES, Inputs, Make, Pass, Results, pack_row, wide
from torch import Tensor

import fusedres
from fusedres import backends
from fusedres.bench import compare

ROOT = Path(__file__).resolve().parent.parent
BYTES_A_SECOND = 3e12  # a guess, for how many launches make up a measurement
LARGEST_GRAPH = 2000  # launches


# --- timing ---------------------------------------------------------------------------------------


class EventClock:
    """Seconds by CUDA events: what the device took, not how long the host waited for it."""

    def __init__(self) -> None:
        self.seconds, self.last = 0.0, self._now()

    @staticmethod
    def _now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event

    def __call__(self) -> float:
        event = self._now()
        self.seconds += self.last.elapsed_time(event) * 1e-3  # a short time: it is a float32
        self.last = event
        return self.seconds


def tensors_in(t: Inputs) -> list[Tensor]:
    listed = (v if isinstance(v, list) else [v] for v in t.values())
    return [v for values in listed for v in values if isinstance(v, Tensor)]


def size_in_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(v.numel() * v.element_size() for v in tensors)


def launches(run: Callable[[Any], object], sets: Sequence[Any], count: int) -> Callable[[], None]:
    def loop() -> None:
        for i in range(count):
            run(sets[i % len(sets)])

    return loop


def captured(loop: Callable[[], None]) -> Callable[[], None]:
    """The loop as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()
    return graph.replay


def largest_error(results: Results, truth: Results) -> float:
    """The largest distance from the truth, relative to the largest element of the truth."""
    worst = 0.0
    for ours, exact in zip(results, truth, strict=True):
        scale = float(exact.abs().max()) or 1.0
        off = float((ours.double() - exact).abs().max()) / scale
        worst = max(worst, off if math.isfinite(off) else math.inf)
    return worst


def kernels_of(backend: str) -> dict[str, Any]:
    room = backends.BACKENDS[backend].room
    ops = ("bn_act", "batch_norm", "bn_relu_maxpool", "add_relu")
    return {op: importlib.import_module(f"{room}.{op}") for op in ops}


def copy_sets(moved: int, count: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Pairs of which half the bytes are read and half written."""
    half = max(1, moved // 2)
    return [
        (
            torch.empty(half, dtype=torch.uint8, device=device),
            torch.randint(256, (half,), dtype=torch.uint8, device=device),
        )
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Plan:
    """How much is measured, and where."""

    device: str
    rounds: int
    seconds: float  # of a measurement
    cache: int  # bytes of L2

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


def measure(
    row: Pass,
    shape: Sequence[int],
    dtype: torch.dtype,
    moved: int,
    ours: Mapping[str, Mapping[str, Any]],
    plan: Plan,
) -> list[dict[str, Any]]:
    """Every provider of one pass at one size."""
    first = row.inputs(Make(shape, dtype, plan.device, 0))
    copies = max(1, math.ceil(3 * plan.cache / size_in_bytes(tensors_in(first))))
    sets = [first] + [row.inputs(Make(shape, dtype, plan.device, i)) for i in range(1, copies)]
    pairs = copy_sets(moved, max(1, math.ceil(3 * plan.cache / moved)), plan.device)
    providers: dict[str, tuple[Callable[[Any], Any], Sequence[Any]]] = {}
    for name, kernels in ours.items():
        # the native `pack` is the only one
        if "pack" in row.name and name == "triton":
            continue
        providers[name] = (partial(row.ours, kernels), sets)
    if plan.on_gpu or row.torch_on_cpu:
        providers["torch"] = (row.torch, sets)
    truth = row.truth({"weights": first["weights"]} if "weights" in first else wide(first))
    errors: dict[str, float] = {}
    for name, (run, _) in list(providers.items()):
        try:
            errors[name] = largest_error(run(first), truth)
        except RuntimeError as error:
            if name != "torch":  # of another version, say: the others are measured
                raise
            reason = str(error).partition("\n")[0][:200]
            print(f"light_passes: torch has no {row.torch_name}: {reason}", file=sys.stderr)
            del providers[name]
    del truth
    providers["copy"] = (lambda pair: pair[0].copy_(pair[1]), pairs)

    least = max(moved / BYTES_A_SECOND, 2e-6)
    timed, counts, how = {}, {}, {}
    for name, (run, of) in providers.items():
        count = min(LARGEST_GRAPH, math.ceil(plan.seconds / least)) if plan.on_gpu else 2
        counts[name] = math.ceil(count / len(of)) * len(of)
        timed[name] = launches(run, of, counts[name])
        how[name] = "launches"
        if plan.on_gpu:
            timed[name] = captured(timed[name])
            how[name] = "graph"
    timer = EventClock() if plan.on_gpu else time.perf_counter
    found = compare(timed, rounds=plan.rounds, warmup=2, timer=timer)

    rows = []
    for name in timed:
        spread = found.spread(name)
        median, p20, p80 = (s / counts[name] for s in (spread.median, spread.p20, spread.p80))
        copied = found.spread("copy").median / counts["copy"]
        rows.append(
            {
                "op": row.name,
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "provider": name,
                "runs": row.torch_name if name == "torch" else "",
                "us": median * 1e6,
                "us_p20": p20 * 1e6,
                "us_p80": p80 * 1e6,
                "bytes": moved,
                "gb_per_s": moved / median / 1e9,
                "of_copy": copied / median if plan.on_gpu else None,
                "max_error": errors.get(name),
                "input_copies": len(providers[name][1]),
                "launches": counts[name],
                "timed_as": how[name],
            }
        )
    return rows


def line_of(row: Mapping[str, Any]) -> str:
    shape = "x".join(map(str, row["shape"]))
    share = "" if row["of_copy"] is None else f"{row['of_copy']:.0%}"
    error = "" if row["max_error"] is None else f"{row['max_error']:.1e}"
    who = f"{row['provider']} ({row['runs']})" if row["runs"] else row["provider"]
    times = f"{row['us']:.1f} ({row['us_p20']:.1f}-{row['us_p80']:.1f})"
    cells = [row["op"], shape, row["dtype"], who, times, f"{row['gb_per_s']:.0f}", share, error]
    return f"| {' | '.join(cells)} |"


HEADER = """| op | shape | dtype | provider | us (p20-p80) | GB/s | % of copy | max error |
|---|---|---|---|---|---|---|---|"""


# --- where it ran ---------------------------------------------------------------------------------


def said_by(*command: str) -> str | None:
    """The first line a program prints; None where it cannot be run."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    lines = run.stdout.strip().splitlines()
    return lines[0] if run.returncode == 0 and lines else None


def environment(device: str, cache: int) -> dict[str, Any]:
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = None
    changed = said_by("git", "status", "--porcelain", "--untracked-files=no")
    commit = said_by("git", "rev-parse", "HEAD")
    driver = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    on_gpu = device == "cuda"
    extension = fusedres.info()["extension"]
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()}",
        "l2_bytes": cache,
        "driver": driver if on_gpu else None,
        "cuda": torch.version.cuda,
        "extension_cuda": None if extension is None else extension["cuda_version"],
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "fusedres": fusedres.__version__,
        "commit": commit and commit + (" and changes" if changed else ""),
    }


def providers_on(device: str) -> dict[str, dict[str, Any]]:
    """Kernels by backend; SystemExit where the one that is measured cannot run."""
    measured = "cuda" if device == "cuda" else "cpp"
    reason = backends.not_ready(measured)
    if device == "cuda" and not torch.cuda.is_available():
        reason = "torch sees no GPU; `--device cpu` tries the harness on tiny sizes"
    if reason:
        print(f"light_passes: {reason}", file=sys.stderr)
        raise SystemExit(2)
    names = [measured]
    if device == "cuda" and backends.not_ready("triton") is None:
        names.append("triton")
    return {name: kernels_of(name) for name in names}


def shapes_of(row: Pass, plan: Plan, quick: bool) -> list[tuple[int, int, int, int]]:
    if not plan.on_gpu:
        return [(2, 16, 9, 9)]
    sizes = [s for s in row.sizes if not quick or s in (SIZES[0], SIZES[2], SIZES[4])]
    return [(batch, c, s, s) for batch in ((256,) if quick else (256, 32)) for c, s in sizes]


def main() -> None:
    """Measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--out", type=Path, help="where the rows go, as JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args()
    ours = providers_on(args.device)
    on_gpu = args.device == "cuda"
    cache = torch.cuda.get_device_properties(0).L2_cache_size if on_gpu else 0
    rounds = 10 if args.quick else 30
    plan = Plan(args.device, rounds if on_gpu else 2, 1e-3 if args.quick else 4e-3, cache)
    dtype = getattr(torch, args.dtype)
    where = environment(args.device, cache)
    print(", ".join(f"{name} {value}" for name, value in where.items()), HEADER, sep="\n\n")
    rows = []

    def report(found: list[dict[str, Any]]) -> None:
        for row in found:
            print(line_of(row), flush=True)
        rows.extend(found)
        if args.out is not None:  # at every step: a later one may fail
            args.out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"environment": where, "rows": rows}, indent=1)
            args.out.write_text(text + "\n")
        if on_gpu:
            torch.cuda.empty_cache()

    with torch.no_grad():
        for row in PASSES:
            for shape in shapes_of(row, plan, args.quick):
                moved = row.bytes(shape, dtype.itemsize)
                report(measure(row, shape, dtype, moved, ours, plan))
        if on_gpu and dtype != torch.float32:  # the cpp backend has no such kernel
            row, weights = pack_row(dtype, args.device)
            numel = sum(w.numel() for w in weights)
            moved = numel * (4 + dtype.itemsize)
            report(measure(row, (numel,), dtype, moved, {"cuda": ours["cuda"]}, plan))


if __name__ == "__main__":
    main()
