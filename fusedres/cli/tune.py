"""fusedres tune: measure plans, kernel configurations and backends here, and keep the fastest."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusedres import _plan_table
from fusedres.bench import roofline
from fusedres.bench import rows as results
from fusedres.bench.convolutions import Site, kernels_of, plans_of
from fusedres.bench.judging import by, suspect
from fusedres.bench.light import light_cases
from fusedres.bench.measure import Job, Setting, is_done, own_backends, run_job
from fusedres.bench.ops import GUESS, op_job
from fusedres.bench.plan_model import DEVICES, with_model
from fusedres.bench.rows import Row, group, label
from fusedres.bench.suites import prepare, setting_for
from fusedres.bench.sweep import Budget, DeviceLostError, tune_site
from fusedres.bench.tune import changes_of, decides, entries_from, light_changes, merged
from fusedres.cli._command import Command, UserError
from fusedres.cli._options import add_device, at_least
from fusedres.cli._options import device as device_of
from fusedres.cli.bench import DTYPES
from fusedres.training.files import require, write_atomically

Entry = dict[str, Any]
MINUTES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_device(parser)
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="of the computation (default: bf16, CPU fp32)"
    )
    parser.add_argument(
        "--batch",
        type=at_least(1),
        nargs="+",
        default=(),
        help="batch sizes, the most important first (default: 256, 32; with --quick 256)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument(
        "--budget",
        type=at_least(1),
        default=MINUTES,
        metavar="MINUTES",
        help="start no measurement that would end later (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out layers that a run of this commit has done, by the rows that it left",
    )
    parser.add_argument(
        "--from",
        dest="files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="take the rows of these result files instead of measuring",
    )
    parser.add_argument(
        "--model",
        action="store_true",
        help=f"instead: write what a model of bytes and rates says of {', '.join(DEVICES)} into "
        "the table --out, behind what was measured",
    )
    parser.add_argument(
        "--out", type=Path, help=f"the table (default: {_plan_table.PATH} in the user's cache)"
    )
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="for what was measured (default: beside the table)",
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
    if args.model:
        if args.out is None:
            raise UserError("--model: name the table with --out", exit_code=2)
        entries = with_model(_entries_in(path))
        _write(path, entries)
        _plan_table.reload()
        modelled = sum(map(_plan_table.is_modelled, entries))
        print(f"{modelled} entries by the model, {len(entries) - modelled} measured, in {path}")
        return 0
    table = _Table(path)
    lost = ""
    if args.files:
        rows = [row for file in args.files for row in _rows_in(file, "--from")]
        table.write(rows)
    else:
        rows, lost = _measured(args, table)
    wrong = _say_what_is_wrong(rows) + bool(lost)
    if lost:
        print(f"WRONG  {lost}: it broke the GPU's context, and the run ended there")
    _say_what_changed(rows)
    table.say()
    return 1 if wrong else 0


class _Table:
    """The file, and what was in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.old = path, _entries_in(path)
        self.new: list[Entry] = []
        self.kept: list[Entry] = self.old
        _plan_table.entries()  # read now: they are in force to the end, whatever is written

    def write(self, rows: Sequence[Row]) -> None:
        """The entries of these rows, and what they leave of the old ones."""
        found = entries_from(_right(rows))
        self.new, self.kept = merged(found, self.old)
        if self.new:
            _write(self.path, self.new + self.kept)

    def say(self) -> None:
        """How many, and have them count from now on."""
        if not self.new:
            print(f"nothing to choose in these measurements; {self.path} is as it was")
            return
        _plan_table.reload()
        print(f"{len(self.new)} entries measured, {len(self.kept)} kept, in {self.path}")


def _write(path: Path, table: Sequence[Entry]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _plan_table.text_of(table).encode())


def _rows_in(path: Path, option: str) -> list[Row]:
    try:
        return results.read([path])
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def _entries_in(path: Path) -> list[Entry]:
    if path == _plan_table.user_path():
        return _plan_table.user_entries()
    try:
        return _plan_table.entries_of(path.read_text()) if path.is_file() else []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out: {path} holds another thing: {error}") from None


# --- measuring ------------------------------------------------------------------------------------


def _measured(args: argparse.Namespace, table: _Table) -> tuple[list[Row], str]:
    """Measure; rows and table are written after every layer, for the run may be cut short.

    Returns:
        The rows of this run, with --resume all that there are, and what broke the device, if
        anything did. Rows that another run left make up the table too: it measured other sizes.
    """
    device = device_of(args.device)
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    found = own_backends("conv_bn", device, dtype)
    if len(found) < 2 and "triton" not in found:
        print(f"{device.type}: every convolution is run by {found or ['reference']}, split")
        return [], ""
    prepare(device)
    setting = setting_for(device, args.quick)
    budget = Budget(60.0 * args.budget)
    path = args.rows or table.path.with_suffix(".rows.json")
    rows = _rows_in(path, "--rows") if path.is_file() else []
    done, told = (rows, list(rows)) if args.resume else ([], [])
    print(f"rows go to {path}; with --resume a later run goes on from there")
    batches = args.batch or ((256,) if args.quick else (256, 32))
    not_reached, lost = [], ""
    for title, measure in _in_turn(device, dtype, batches, setting, budget, done, args.quick):
        new: list[Row] = []
        try:
            if not measure(new):
                not_reached.append(title)
        except DeviceLostError as error:
            lost = str(error)
        told += new
        fresh = {(row["device"], results.key(row)) for row in new}
        rows = [row for row in rows if (row["device"], results.key(row)) not in fresh] + new
        results.write(path, rows)
        table.write(rows)
        if lost:
            break
    if not_reached:
        print(f"not reached in {args.budget} minutes: {len(not_reached)}")
        for title in not_reached:
            print(f"  {title}")
    return told, lost


# adds its rows to a list, and says whether the budget left room for all that it is for
Measurement = Callable[[list[Row]], bool]


def _in_turn(
    device: torch.device,
    dtype: torch.dtype,
    batches: Sequence[int],
    setting: Setting,
    budget: Budget,
    done: Sequence[Row],
    quick: bool,
) -> Iterator[tuple[str, Measurement]]:
    """Layers as `in_order` has them, then light passes; without what is done."""
    measurements: list[tuple[str, Measurement]] = []

    def light_pass(job: Job, new: list[Row]) -> bool:
        if not budget.allows("light pass"):
            return False
        with budget.measuring("light pass"):
            new += [measured.row for measured in run_job(job, setting)]
        return True

    for site, count in in_order(sites_of(device, dtype, batches)):
        if not _is_done(site, done, setting.where):
            layer = partial(tune_site, site, count, setting, budget)
            measurements.append((_title(site), layer))
    for case in light_cases(device, dtype, batches, quick):
        job = op_job(case, setting)
        if decides(job) and not is_done(job, done, setting.where):
            measurements.append((job.title, partial(light_pass, job)))
    bar = require("tqdm", "tqdm", "the progress bar", "bench").tqdm(
        measurements, unit="layer", dynamic_ncols=True
    )
    for title, measure in bar:
        bar.set_postfix_str(title[:60])
        yield title, measure


def sites_of(
    device: torch.device, dtype: torch.dtype, batches: Sequence[int]
) -> list[tuple[Site, int]]:
    """The layers of a ResNet-50 that leave anything to choose, and how many there are of each."""
    found = []
    names = own_backends("conv_bn", device, dtype)
    for batch in batches:
        for layer, count in roofline.distinct(roofline.layers()):
            plans = {plan for name in names for plan in plans_of(layer, name, dtype, device)}
            if len(plans) > 1 or any(kernels_of(layer, name) for name in names):
                found.append((Site(layer, batch, dtype, device), count))
    return found


def in_order(sites: Sequence[tuple[Site, int]]) -> list[tuple[Site, int]]:
    """Batch by batch, in the order in which batches come up; there the largest predicted share of a
    training step first.
    """
    batches = list(dict.fromkeys(site.batch for site, _ in sites))

    def share(site: Site, count: int) -> float:
        name = _plan_table.device_name(site.device)
        rates = DEVICES[name][:2] if name in DEVICES else GUESS
        cases = (site.case(direction, count) for direction in site.training)
        return count * sum(roofline.seconds(c.flops, c.bytes, *rates) for c in cases)

    return sorted(sites, key=lambda pair: (batches.index(pair[0].batch), -share(*pair)))


def _is_done(site: Site, rows: Sequence[Row], where: Row) -> bool:
    shape, dtype = site.case("fwd", 1).fields["shape"], str(site.dtype).removeprefix("torch.")
    return any(
        row["section"] == "tuned"
        and (row["shape"], row["dtype"]) == (shape, dtype)
        and all(row.get(k) == where.get(k) for k in ("device", "commit", "torch", "triton"))
        for row in rows
    )


def _title(site: Site) -> str:
    layer = site.layer
    shape = f"{layer.in_channels} -> {layer.out_channels}, {layer.kernel}x{layer.kernel}"
    return f"{layer.name} ({shape}/{layer.stride}), batch {site.batch}"


# --- saying ---------------------------------------------------------------------------------------


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    return list(by(rows, lambda row: (row["device"], group(row))).values())


def _right(rows: Sequence[Row]) -> list[Row]:
    """Without those whose result must be wrong."""
    return [row for job in _groups(rows) for row in job if not suspect(row, job)]


def _say_what_is_wrong(rows: Sequence[Row]) -> int:
    """Name every wrong result of ours, and say how many configurations did not run."""
    tried = [row for row in rows if row["section"] == "configs"]
    found = [(row, row["wrong"]) for row in tried if "wrong" in row]
    measured = [row for row in rows if row["section"] in ("conv_bn", "light")]
    for job in _groups(measured):
        found += [(row, suspect(row, job)) for row in job if row["name"].startswith("fusedres")]
    found = [(row, reason) for row, reason in found if reason]
    for row, reason in found:
        shape = "x".join(map(str, row["shape"]))
        print(f"WRONG  {row['case']}, {shape}, {row['dtype']}, {label(row)}: {reason}")
    once = {(row["device"], results.key(row)): row for row in tried}.values()
    failed = [row["error"].partition(":")[0] for row in once if "error" in row]
    reasons = Counter(reason for reason in failed if reason != "wrong result")
    if reasons:
        said = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        print(f"{len(once)} configurations tried, of which some do not run here: {said}")
    missed = sum(row["missed"] for row in rows if row["section"] == "tuned")
    if missed:
        print(f"{missed} configurations were not reached")
    return len(found)


def _say_what_changed(rows: Sequence[Row]) -> None:
    """Old and new, one line each, and what a training step gains by it."""
    right = _right(rows)
    found = changes_of(right, _plan_table.lookup)
    changed, unchanged = light_changes(entries_from(right), _plan_table.entries())
    for change in [*found.changed, *changed]:
        print(f"new  {change}")
    if found.unchanged + unchanged:
        print(f"{found.unchanged + unchanged} as before")
    for (device, dtype, batch), ms in found.saved.items():
        if math.isfinite(ms):
            print(f"a training step of batch {batch} saves {ms:.3f} ms by it ({device}, {dtype})")


COMMAND = Command(
    "tune", "measure plans and configurations here and keep the fastest", add_arguments, run
)
