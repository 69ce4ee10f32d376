"""The rows that measurements leave behind: their fields, where they ran, and their files.

A file of results is a JSON list of rows, each complete in itself. Fields of every row:

- section: "ceilings", "light", "conv_bn", "blocks", "train", "infer" or "profile"
- case: what ran in this section, "bn_act_fwd, residual" say; "resnet50" for the whole network
- shape: of its input, [N, C, H, W]; in section "conv_bn" [N, H, C, K, kernel, stride]; [] for none
- name: who ran it: "eager", "graph", "compile", "fusedres-cuda", "fusedres-triton-graph", ..
- backend, plan: of fusedres' own rows: "cuda", "auto"; None in the others
- dtype, batch; device, threads, driver, cuda, cudnn, torch, triton, python, fusedres, commit, time

A row that was measured has also (None where it does not apply, or could not be had):

- ms, p20, p80: median and percentiles of milliseconds: of the GPU where there is one, else of a
  wall clock; wall_ms: the median of the host's clock; runs: how many
- against, ratio, ratio_p20, ratio_p80: time over that of the row of this name in the same run, by
  the median of the ratios within a round; below 1 is faster. It is "eager", where torch has no such
  op "copy"
- img_s: images a second
- bytes, gb_s: what the contract has to read and write, and how fast that went
- flops, tflops: its arithmetic
- of_roofline: the share of what the measured ceilings of this run would allow, at most about 1
- max_error: the largest distance from an fp64 truth, relative to it; grad_error: of the gradients
- peak_gib: most memory held, GiB, parameters and optimizer included; None for single ops
- how: "calls", "launches" in a loop, or "graph"; note: anything a reader must know; count: how many
  such layers the network has

A row that failed has `error`, the reason in one line, and no ms. Rows of section "profile" are one
training step by layer (case) and direction (name), with share, of the step, and kernels.

`fusedres tune` leaves two sections more. "configs" has a row for each configuration (`config`) of a
kernel (case), with its times in the direction in which it was run, against the one that was in
force ("now"), and `wrong`, the reason, where its result is: it was not timed then. "tuned" says
what came of a layer at a batch size: configs, those to take, by kernel; gains, their time over that
of the one before; was, the plan and the configurations before; missed, how many were not tried.
"""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import fusedres
from fusedres.training.files import write_atomically

Row = dict[str, Any]
SECTIONS = ("ceilings", "light", "conv_bn", "blocks", "train", "infer", "profile")
TUNING = ("configs", "tuned")  # sections of `fusedres tune`
_ALWAYS = ("section", "name", "dtype", "device")  # what no row can be read without
_IDENTITY = ("section", "case", "shape", "dtype", "batch", "name", "plan")


def key(row: Row) -> tuple[Any, ...]:
    """What tells rows of one device apart: section, case, shape, dtype, batch, name, plan."""
    values = (row.get(field) for field in _IDENTITY)
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)


def group(row: Row) -> tuple[Any, ...]:
    """What rows that were measured side by side share: all of `key` but who ran it."""
    return key(row)[:5]


def label(row: Row) -> str:
    """Who ran it, and by which plan where that was asked for."""
    plan = row.get("plan")
    return row["name"] if plan in (None, "auto") else f"{row['name']}, {plan}"


def environment(device: torch.device) -> Row:
    """The fields that say where and with what something ran."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "fusedres": fusedres.__version__,
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of result files.

    Raises:
        OSError: a file cannot be read.
        ValueError: it does not hold rows; the message names it.
    """
    rows: list[Row] = []
    for path in paths:
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise ValueError(f"{path}: expected a list of rows, as `fusedres bench` writes them")
        for row in found:
            missing = [field for field in _ALWAYS if not isinstance(row.get(field), str)]
            if missing:
                raise ValueError(f"{path}: a row has no {missing[0]}: {str(row)[:80]}")
        rows += found
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """One row a line, so that changes read well; whole or not at all."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"[\n{lines}\n]\n".encode())


def _driver() -> str | None:
    return _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _version(module: str) -> str | None:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return None


def _commit() -> str | None:
    """Of the source tree this package runs from or was called in; None outside of one."""
    here = Path.cwd()
    if not (here / "csrc").is_dir() or not (here / "fusedres").is_dir():
        return None
    commit = _said_by("git", "rev-parse", "HEAD")
    changed = _said_by("git", "status", "--porcelain", "--untracked-files=no")
    return commit and commit + (" and changes" if changed else "")


def _said_by(*command: str) -> str | None:
    """The first line a program prints; None where it cannot be run or says nothing."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = run.stdout.strip().splitlines()
    return lines[0] if run.returncode == 0 and lines else None
