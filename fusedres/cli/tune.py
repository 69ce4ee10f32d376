"""fusedres tune: measure plans and backends here, and keep the fastest for this machine."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from fusedres import _plan_table
from fusedres.bench import rows as results
from fusedres.bench.judging import by, suspect
from fusedres.bench.measure import own_backends, run_job
from fusedres.bench.rows import Row, group
from fusedres.bench.suites import jobs_of, prepare, setting_for
from fusedres.bench.tune import decides, entries_from
from fusedres.cli._command import Command, UserError
from fusedres.cli._options import add_device, at_least
from fusedres.cli._options import device as device_of
from fusedres.cli.bench import DTYPES
from fusedres.training.files import require, write_atomically


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_device(parser)
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="of the computation (default: bf16, CPU fp32)"
    )
    parser.add_argument(
        "--batch", type=at_least(1), nargs="+", default=(), help="batch sizes (default: 32, 256)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument(
        "--from",
        dest="files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="take the rows of these result files instead of measuring",
    )
    parser.add_argument(
        "--out", type=Path, help=f"the table (default: {_plan_table.PATH} in the user's cache)"
    )
    parser.add_argument("--clear", action="store_true", help="remove the user's table")


def run(args: argparse.Namespace) -> int:
    """Measure, keep the fastest, say what changed."""
    path = args.out or _plan_table.user_path()
    if args.clear:
        existed = path.is_file()
        path.unlink(missing_ok=True)
        _plan_table.reload()
        print(f"{'removed' if existed else 'there is no'} {path}")
        return 0
    rows = _from_files(args.files) if args.files else _measured(args, path)
    by_group = by(rows, lambda row: (row["device"], group(row)))
    entries = entries_from(
        [row for job in by_group.values() for row in job if not suspect(row, job)]
    )
    old = _entries_in(path)
    for entry in entries:  # kernel configurations are another matter: they stay
        configs = [e["configs"] for e in old if _same(e, entry) and "configs" in e]
        entry |= {"configs": configs[0]} if configs else {}
    kept = [entry for entry in old if not any(_same(entry, new) for new in entries)]
    for entry in entries:
        if entry not in old:
            print(f"new  {_in_words(entry)}")
    if not entries:
        print(f"nothing to choose in these measurements; {path} is as it was")
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _plan_table.text_of(entries + kept).encode())
    _plan_table.reload()
    print(f"{len(entries)} entries measured, {len(kept)} kept, in {path}")
    return 0


def _from_files(files: list[Path]) -> list[Row]:
    try:
        return results.read(files)
    except ValueError as error:
        raise UserError(f"--from: {error}") from None


def _measured(args: argparse.Namespace, table: Path) -> list[Row]:
    """Measure; the rows are left beside the table, and after every job, for it may be cut short."""
    device = device_of(args.device)
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    found = own_backends("conv_bn", device, dtype)
    if len(found) < 2 and "triton" not in found:
        print(f"{device.type}: every convolution is run by {found or ['reference']}, split")
        return []
    prepare(device)
    setting = setting_for(device, args.quick)
    rows: list[Row] = []
    path = table.with_suffix(".rows.json")
    print(f"rows go to {path}; `fusedres tune --from {path}` goes on from there")
    jobs = jobs_of("ops", setting, dtype, args.batch or (256, 32), args.quick)
    jobs = [job for job in jobs if decides(job)]
    for job in require("tqdm", "tqdm", "the progress bar", "bench").tqdm(jobs, unit="job"):
        rows += [measured.row for measured in run_job(job, setting)]
        results.write(path, rows)
    return rows


def _entries_in(path: Path) -> list[dict[str, Any]]:
    if path == _plan_table.user_path():
        return _plan_table.user_entries()
    try:
        return _plan_table.entries_of(path.read_text()) if path.is_file() else []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out: {path} holds another thing: {error}") from None


def _same(entry: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two entries are about the same, whatever sizes they span."""
    free = {"rows", "bytes", "plan", "backend", "configs"}
    return {k: v for k, v in entry.items() if k not in free} == {
        k: v for k, v in other.items() if k not in free
    }


def _in_words(entry: dict[str, Any]) -> str:
    least, most = entry.get("rows") or entry["bytes"]
    span = f"from {least:,}" if least else ""
    span += f" to {most:,}" if most is not None and most < math.inf else ""
    where = f"{entry['device']}, {entry['dtype']}"
    if "op" in entry:
        size = f" ({span.strip()} bytes)" if span else ""
        return f"{where}, {entry['op']}{size}: {entry['backend']}"
    kernel, stride = entry["kernel"][0], entry["stride"][0]
    size = f" ({span.strip()} pixels)" if span else ""
    conv = f"{entry['in_channels']} -> {entry['out_channels']}, {kernel}x{kernel}/{stride}"
    return f"{where}, {conv}{size}: {entry['plan']}"


COMMAND = Command(
    "tune", "measure plans and backends here and keep the fastest", add_arguments, run
)
