"""The cuda backend under compute-sanitizer: memcheck, racecheck, initcheck and synccheck.

    python tests/cuda_sanitize.py [--tool TOOL ...] [--logs FOLDER]

Each tool watches a process of its own, in which every kernel runs once or twice at small odd sizes
(`--workload`), in every dtype and both layouts, without torch's caching allocator: each tensor is
an allocation, and an access beyond it shows. Only kernels of fusedres are watched; what they read
has come by copies from the host or from such a kernel, so that initcheck knows it as written.

Exits with 1 on findings, with 2 where compute-sanitizer or a GPU is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
KERNELS = "_ZN8fusedres"  # how their mangled names begin
FINDINGS = 86  # the exit code that compute-sanitizer is asked for
FINISHED = "workload finished: "
# the last lines of the tools
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) .*")
SECONDS = 1200  # of a tool


# --- the workload ---------------------------------------------------------------------------------

# [N, C, H, W]: one pixel, odd channels, one row, vectors of 16 bytes with a rest of rows and of
# lanes, more channels than a block takes, more pixels than fit on a block
SHAPES = [
    (1, 3, 1, 1),
    (3, 5, 7, 9),
    (1, 8, 1, 7),
    (2, 24, 13, 11),
    (1, 2056, 3, 2),
    (5, 64, 17, 15),
]


def workload(device: str) -> int:
    """Every kernel; returns how many ops ran."""
    import torch

    from fusedres.native import _pack

    ran = 0
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for turn, shape in enumerate(SHAPES):
            for layout in (torch.channels_last, torch.contiguous_format):
                # one pixel or one channel: both layouts are one
                ran += sum(1 for _ in ops(device, dtype, shape, layout, turn))
    for dtype in (torch.bfloat16, torch.float16):
        ran += sum(1 for _ in products(device, dtype))
        sizes = [(7, 3, 7, 7), (5, 3, 1, 1), (16, 24, 3, 3), (1, 1, 1, 1), (33, 8, 1, 1)] * 20
        weights = [torch.randn(s) for s in sizes]
        for i, w in enumerate(weights):
            order = (torch.channels_last, torch.contiguous_format)[i // 5 % 2]
            weights[i] = w.contiguous(memory_format=order).to(device)
        casts = _pack.pack(weights, dtype)
        for cast, w in zip(casts, weights, strict=True):
            assert torch.equal(cast.cpu(), w.cpu().to(dtype))
        ran += 1
    return ran


def ops(
    device: str,
    dtype: object,
    shape: tuple[int, int, int, int],
    layout: object,
    turn: int,
) -> Iterator[None]:
    """Runs op after op on one shape. torch's kernels must not write what they read."""
    import torch

    from fusedres._tensors import stat_dtype
    from fusedres.native import add_relu, batch_norm, bn_act, bn_relu_maxpool

    assert isinstance(dtype, torch.dtype) and isinstance(layout, torch.memory_format)
    c = shape[1]

    def full(size: tuple[int, ...] = shape) -> torch.Tensor:
        # made and laid out on the CPU: .to() is then one cudaMemcpy
        return torch.randn(size).to(dtype).contiguous(memory_format=layout).to(device)

    def vector(low: float = -0.5, high: float = 0.5) -> torch.Tensor:
        return (torch.rand(c) * (high - low) + low).to(stat_dtype(dtype)).to(device)

    def looked_at(*results: torch.Tensor | None) -> None:
        for r in results:
            assert r is None or not r.cpu().isnan().any()

    y, r = full(), full()
    mean, scale, bias = vector(), vector(0.5, 1.5), vector()
    joins: Any = ((None, None, None, None), (r, None, None, None), (r, mean, scale, bias))
    for joined in joins:
        looked_at(bn_act.bn_act_fwd(y, mean, scale, bias, *joined, turn % 2 == 0))
        yield
    a = bn_act.bn_act_fwd(y, mean, scale, bias, None, None, None, None, True)
    for mask, extra, res_y, out in (
        (a, None, None, None),
        (a, r, y, torch.empty_like(y)),
        (None, r, None, None),
        (None, None, y, None),
    ):
        res_mean = None if res_y is None else mean
        looked_at(*bn_act.bn_act_bwd(full(), extra, mask, y, mean, res_y, res_mean, out))
        yield
    grad = full()
    looked_at(*bn_act.bn_act_bwd(grad, None, a, y, mean, None, None, grad))
    yield
    looked_at(*bn_act.bn_act_bwd(full(), r, a, y, mean, None, None, affine=(scale, bias)))
    yield
    for residual, kinds in ((True, (None, None)), (False, (torch.float32, torch.float64))):
        vectors = (mean, scale, bias, vector(0.5, 1.5))
        looked_at(*batch_norm.batch_norm_act_bwd(r, a, y, *vectors, residual, True, *kinds))
        yield

    momentum = torch.tensor(0.25).to(device)
    training = y.numel() > c
    for trains, amount in ((training, 0.1), (training, momentum), (False, 0.1)):
        running = (vector(), vector(0.5, 1.5))
        norm = (scale, bias, *running, trains, amount, 1e-5)
        looked_at(*batch_norm.batch_norm_fwd(y, *norm), *running)
        yield
    if training:
        looked_at(*batch_norm.batch_norm_fwd(y, None, None, None, None, True, 0.1, 1e-5))
        yield
        for residual in (None, r):  # in one read where it fits
            running = (vector(), vector(0.5, 1.5))
            found = batch_norm.batch_norm_act_fwd(
                y, scale, bias, *running, True, 0.1, 1e-5, residual, True
            )
            looked_at(found[0], *found[1], *running)
            yield
    sums = torch.rand(2, c).to(stat_dtype(dtype)).to(device)
    for trains, kinds in ((True, (torch.float32, torch.bfloat16)), (False, (None, torch.float64))):
        looked_at(*batch_norm.batch_norm_bwd(r, y, mean, scale, scale, sums, trains, *kinds))
        yield

    for window in ((3, 2, 1), (2, 3, 1), (5, 1, 2)):
        p = bn_relu_maxpool.bn_relu_maxpool_fwd(y, mean, scale, bias, *window)
        back = (full(tuple(p.shape)), y, mean, scale, bias, *window)
        looked_at(p, *bn_relu_maxpool.bn_relu_maxpool_bwd(*back))
        yield

    out = add_relu.add_relu_fwd(y, r)
    looked_at(out, add_relu.add_relu_bwd(r, out))
    yield
    odd = [torch.randn(1000).to(dtype).to(device)[1:] for _ in range(2)]  # off 16 bytes
    out = add_relu.add_relu_fwd(*odd)
    looked_at(out, add_relu.add_relu_bwd(odd[0], out))
    yield


def products(device: str, dtype: object) -> Iterator[None]:
    """conv_bn forward and dgrad by every product that the device has: a Tensor, a Deferred, one
    with a residual; rows that fill no tile and several, one piece of columns and several.
    """
    import torch

    from fusedres import backends
    from fusedres._conv import Conv, Source, Upstream
    from fusedres._plans import PRODUCTS
    from fusedres.native import conv_bn

    assert isinstance(dtype, torch.dtype)
    conv = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)
    index = 0 if device == "cuda" else None

    def full(n: int, c: int, height: int, width: int) -> torch.Tensor:
        values = torch.randn(n, c, height, width).to(dtype)
        return values.contiguous(memory_format=torch.channels_last).to(device)

    def vector(c: int, low: float = -0.5) -> torch.Tensor:
        return (torch.rand(c) + low).to(device)

    for product in PRODUCTS:
        if backends.product_problem(product, index) is not None:
            continue
        for n, channels, filters in ((1, 64, 64), (3, 128, 192), (5, 64, 512)):
            x, w = full(n, channels, 11, 13), full(filters, channels, 1, 1)
            affine = (vector(channels), vector(channels, 0.5), vector(channels))
            up = Upstream(
                full(n, filters, 11, 13), torch.rand(2, filters).to(device),
                full(n, filters, 11, 13), vector(filters), vector(filters, 0.5),
                vector(filters, 0.5), vector(filters), True,
            )  # fmt: skip
            for kind in range(3):
                residual = (x, *affine) if kind == 2 else (None,) * 4
                source = Source(x, *affine, *residual, True) if kind else Source.plain(x)
                norm = (None, None, vector(filters), vector(filters, 0.5), True, 0.1, 1e-5)
                y, found, a, _ = conv_bn.conv_bn_fwd(
                    source, w, conv, kind > 0, False, *norm, product=product
                )
                back = conv_bn.conv_bn_dgrad(
                    source, w, conv, a, up, x, product, True, torch.float32, None
                )
                for result in (y, a, *found, *back):
                    assert result is None or not result.cpu().isnan().any()
                yield


# --- the tools ------------------------------------------------------------------------------------


class Missing(Exception):
    """What this machine lacks."""


def sanitizer() -> str:
    """compute-sanitizer, on PATH, in CUDA_HOME, beside nvcc, or of a wheel."""
    folders = [Path(home, "bin") for home in (os.environ.get("CUDA_HOME"),) if home]
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parent)
    folders += [Path(entry or ".", "nvidia", "cu13", "bin") for entry in sys.path]
    found = shutil.which("compute-sanitizer")
    for folder in folders:
        found = found or shutil.which("compute-sanitizer", path=str(folder))
    if found is None:
        raise Missing(
            "there is no compute-sanitizer on PATH, in CUDA_HOME/bin or beside nvcc; it comes with "
            "the CUDA toolkit, or with `pip install nvidia-cuda-sanitizer-api`"
        )
    return found


def check_gpu() -> None:
    import torch

    from fusedres import backends

    if not torch.cuda.is_available():
        raise Missing("torch sees no GPU")
    if reason := backends.not_ready("cuda"):
        raise Missing(reason)


def kernel_filter(program: str) -> list[str]:
    """Only fusedres' kernels; the option's name is another in CUDA 12 and 13."""
    run = subprocess.run([program, "--help"], capture_output=True, text=True)
    for option in ("--kernel-name", "--kernel-regex"):
        if re.search(rf"^\s*{option}\s", run.stdout, re.MULTILINE):
            return [option, f"kns={KERNELS}"]
    raise Missing(f"{program} --help names no option that selects kernels:\n{run.stdout[-2000:]}")


def command(program: str, tool: str, select: list[str]) -> list[str]:
    options = ["--tool", tool, "--error-exitcode", str(FINDINGS), "--print-limit", "20", *select]
    if tool == "memcheck":
        # torch asks the driver for more than it has, and goes on without
        options += ["--report-api-errors", "no"]
    if tool == "racecheck":
        options += ["--racecheck-report", "all"]
    return [program, *options, sys.executable, "-P", str(Path(__file__).resolve()), "--workload"]


def judged(code: int, output: str) -> tuple[bool, str]:
    """Whether a tool is content, and its verdict in a line."""
    summaries = SUMMARY.findall(output)
    line = next((m.group(0) for m in SUMMARY.finditer(output)), "no summary")
    finished = FINISHED in output
    good = code == 0 and finished and len(summaries) > 0 and set(summaries) == {"0"}
    if good or (code == FINDINGS and finished):
        return good, line
    return False, f"exit code {code}, {'' if finished else 'the workload did not finish, '}{line}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tool", action="append", choices=TOOLS, help="all of them unless given")
    parser.add_argument("--logs", type=Path, help="where what the tools print is kept")
    parser.add_argument("--workload", action="store_true", help="only run the kernels")
    parser.add_argument("--device", default="cuda", help="of the workload")
    args = parser.parse_args()
    if args.workload:
        print(f"{FINISHED}{workload(args.device)} calls", flush=True)
        return 0
    try:
        program = sanitizer()
        check_gpu()
        select = kernel_filter(program)
    except Missing as missing:
        print(f"cuda_sanitize: {missing}", file=sys.stderr)
        return 2
    logs = args.logs or Path(tempfile.mkdtemp(prefix="cuda-sanitize-"))
    logs.mkdir(parents=True, exist_ok=True)
    # every tensor an allocation, every launch where it was called
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    print("| tool | | verdict | log |\n|---|---|---|---|")
    clean = True
    for tool in args.tool or TOOLS:
        log = logs / f"{tool}.txt"
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    command(program, tool, select),
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=SECONDS,
                ).returncode
            except subprocess.TimeoutExpired:
                code = -1
        good, verdict = judged(code, log.read_text(errors="replace"))
        clean = clean and good
        print(f"| {tool} | {'clean' if good else 'FINDINGS'} | {verdict} | {log} |", flush=True)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
