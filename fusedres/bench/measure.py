"""What all suites share: where and how long to measure, the ceilings, and from timings to rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres import backends
from fusedres._tensors import INTERPRETED, conv_allows_tf32
from fusedres.bench import roofline
from fusedres.bench.harness import Comparison, Stopwatch, compare, stopwatch_for
from fusedres.bench.rows import Row, label

ANCHOR = "eager"  # what every other one is held against


class Ceilings(NamedTuple):
    """What the device reaches where nothing is in the way: bytes/s of a large copy, read and
    written, and FLOP/s of a large matrix product or convolution.
    """

    bandwidth: float
    peak: float


@dataclass(frozen=True)
class Setting:
    """Where and how long.

    Attributes:
        device: "cpu" or a GPU.
        rounds: timed rounds, fewer where `budget` seconds are over (but three).
        seconds: that one measurement of a single op should take, by repeating it.
        cache: bytes of the last cache; inputs of single ops rotate through three times as many.
        where: fields of every row: device, versions, commit.
        ceilings: by dtype; those of other dtypes are unknown.
        wanted: names of providers; empty for a suite's own choice.
    """

    device: torch.device
    rounds: int
    budget: float
    seconds: float
    cache: int
    where: Row
    ceilings: dict[torch.dtype, Ceilings] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def stopwatch(self) -> Stopwatch:
        return stopwatch_for(self.device)

    def chosen(self, names: Sequence[str]) -> list[str]:
        """The names that are wanted; what all are held against always is."""
        return [n for n in names if not self.wanted or n in self.wanted or n == ANCHOR]


Work = Sequence[tuple[float, float]]  # (bytes, FLOP) of every kernel that a run needs


@dataclass(frozen=True)
class Measured:
    """A row, and the seconds of a run in each round it stands for; () where it failed."""

    row: Row
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Job:
    """Providers that are measured side by side, in one go.

    Attributes:
        title: for a progress bar.
        about: section, case, shape, dtype and batch of its rows.
        names: labels of the providers (see rows.label), as `run` will give them.
        run: does it.
    """

    about: Row
    title: str
    names: tuple[str, ...]
    run: Callable[[Setting], list[Measured]]


def own_backends(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Backends with kernels of their own that run an op here; Triton's interpreter is none."""
    return [
        name
        for name in ("cuda", "triton", "cpp")
        if backends.unavailable(name, op, device.type, dtype) is None
        and not (name == "triton" and INTERPRETED)
    ]


def run_job(job: Job, setting: Setting) -> list[Measured]:
    """What the job gives; where it fails as a whole, a row with the reason for each provider."""
    try:
        return job.run(setting)
    except Exception as error:
        if setting.on_gpu:
            torch.cuda.empty_cache()
        reason, failed = reason_of(error), []
        for name, _, plan in (who.partition(", ") for who in job.names):
            known = {**job.about, "name": name, "plan": plan or None, "backend": None}
            failed.append(failed_row(known, reason, setting))
        return failed


def is_done(job: Job, rows: Sequence[Row], where: Row) -> bool:
    """Whether rows hold all the job would give, of the same device and commit."""
    same = [
        label(row)
        for row in rows
        if row.get("commit") == where["commit"]
        and row["device"] == where["device"]
        and all(row.get(field) == value for field, value in job.about.items())
    ]
    return set(job.names) <= set(same)


def name_of(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def reason_of(error: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:300]


def timed_rows(
    comparison: Comparison,
    counts: Mapping[str, int],
    about: Mapping[str, Row],
    setting: Setting,
    *,
    work: Mapping[str, Work],
    ceilings: Ceilings | None,
    anchor: str = ANCHOR,
) -> list[Measured]:
    """A row for each provider that was timed.

    Args:
        comparison: by provider; a round ran it `counts` times.
        about: the fields of its row that are known already, batch among them where it counts
            images.
        work: what one run needs by contract.
        ceilings: for the share of the roofline.
        anchor: the provider whose times the others' are divided by; "copy" where it is not there.
    """
    found = []
    for name in comparison.seconds:
        spread, known, count = comparison.spread(name), about[name], counts[name]
        bytes, flops = (sum(part) or None for part in zip(*work[name], strict=True))
        seconds = spread.median / count
        row = {
            **known,
            "ms": seconds * 1e3,
            "p20": spread.p20 / count * 1e3,
            "p80": spread.p80 / count * 1e3,
            "wall_ms": _median(comparison.wall[name]) / count * 1e3,
            "runs": len(comparison.seconds[name]) * count,
            "bytes": bytes,
            "gb_s": bytes and bytes / seconds / 1e9,
            "flops": flops,
            "tflops": flops and flops / seconds / 1e12,
        }
        if known["section"] in ("train", "infer", "blocks"):
            row["img_s"] = known["batch"] / seconds
        if ceilings:
            least = sum(roofline.seconds(f, b, *ceilings) for b, f in work[name])
            row["of_roofline"] = least / seconds
        if anchor not in comparison.seconds:
            anchor = "copy"  # of as many bytes
        if anchor in comparison.seconds and len(comparison.seconds) > 1:
            paired = comparison.paired_ratio(name, anchor)
            scale = counts[anchor] / count
            row |= {
                "against": anchor,
                "ratio": paired.median * scale,
                "ratio_p20": paired.p20 * scale,
                "ratio_p80": paired.p80 * scale,
            }
        each = tuple(seconds / count for seconds in comparison.seconds[name])
        found.append(Measured({**row, **setting.where}, each))
    return found


def failed_row(known: Row, reason: str, setting: Setting) -> Measured:
    """A provider that could not be measured."""
    return Measured({**known, "error": reason, **setting.where})


def measure_ceilings(setting: Setting, dtype: torch.dtype) -> tuple[Ceilings, list[Measured]]:
    """A copy, a matrix product and a 3x3 convolution of the library's, large enough that no cache
    and no launch counts; the product in float32 with TF32 where convolutions may use it.
    """
    device = setting.device
    numel = 2**29 if setting.on_gpu else 2**24  # float32: 2 GiB, 64 MiB
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    side = 8192 if setting.on_gpu else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    batch, channels = (256, 512) if setting.on_gpu else (16, 256)
    image = torch.randn(batch, channels, 28, 28, device=device).to(dtype)
    image = image.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    taps = 9.0 * channels * image.numel()
    work = {
        "copy": (lambda: target.copy_(source), 2.0 * numel * 4, 0.0),
        "matmul": (lambda: torch.mm(left, right, out=out), 0.0, 2.0 * side**3),
        "convolution": (lambda: torch.conv2d(image, weight, padding=1), 0.0, 2.0 * taps),
    }
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = setting.on_gpu and conv_allows_tf32()
    try:
        found = compare(
            {name: run for name, (run, _, _) in work.items()},
            rounds=max(setting.rounds, 7),
            stopwatch=setting.stopwatch,
        )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    rows = []
    for name, (_, bytes, flops) in work.items():
        known: Row = {"section": "ceilings", "case": "", "shape": [], "name": name, "batch": None}
        known |= {"backend": None, "plan": None, "dtype": name_of(dtype)}
        one = Comparison({name: found.seconds[name]}, {name: found.wall[name]})
        what = {name: [(bytes, flops)]}
        rows += timed_rows(one, {name: 1}, {name: known}, setting, work=what, ceilings=None)
    best = {name: min(seconds) for name, seconds in found.seconds.items()}  # what can be reached
    bandwidth = max(moved / best[name] for name, (_, moved, _) in work.items())
    peak = max(flops / best[name] for name, (_, _, flops) in work.items())
    return Ceilings(bandwidth, peak), rows


def largest_error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest distance from the truth, relative to the largest element of the truth; inf for
    what is not finite. Where results are fewer, the first of the truth count.
    """
    worst = 0.0
    for ours, exact in zip(results, truth, strict=False):
        scale = float(exact.abs().max()) or 1.0
        off = float((ours.double() - exact).abs().max()) / scale
        worst = max(worst, off if math.isfinite(off) else math.inf)
    return worst


def tensors_in(inputs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors among a set of inputs."""
    listed = (v if isinstance(v, list) else [v] for v in inputs.values())
    return [v for values in listed for v in values if isinstance(v, Tensor)]


def size_in_bytes(tensors: Sequence[Tensor]) -> int:
    """What they hold together."""
    return sum(v.numel() * v.element_size() for v in tensors)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
