"""fusedres bench: how fast, beside what else, how exact; pages, comparisons and profiles of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fusedres.bench import rows as results
from fusedres.bench.judging import suspect
from fusedres.bench.measure import Job, Measured, Setting, is_done, run_job
from fusedres.bench.profile import profile_step
from fusedres.bench.providers import Way, Workload
from fusedres.bench.report import readme_tables
from fusedres.bench.report import write as write_report
from fusedres.bench.rows import Row
from fusedres.bench.suites import SUITES, jobs_of, prepare, setting_for, with_ceilings
from fusedres.bench.verdict import BAD, VERDICTS, changes, exceeded, in_words, read_limits
from fusedres.cli._command import Command, UserError
from fusedres.cli._options import add_device, at_least, fraction
from fusedres.cli._options import device as device_of
from fusedres.training.files import require, write_atomically

OUT = Path("fusedres-bench.json")
BEGIN, END = "<!-- benchmarks/results -->", "<!-- end -->"  # around the tables in the README
RESULTS = Path("benchmarks/results")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options, and its own subcommands."""
    parser.set_defaults(action=None)
    parser.add_argument(
        "--suite",
        choices=("all", *SUITES),
        default="all",
        help="single ops, residual blocks, the whole model (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="few sizes and rounds, some minutes")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="rows are added to this file (default %(default)s)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out jobs whose rows of this commit are there",
    )
    _add_where(parser)
    parser.add_argument(
        "--batch",
        type=at_least(1),
        nargs="+",
        default=(),
        help="batch sizes instead of the suite's",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        default=(),
        metavar="NAME",
        help="these beside eager, fusedres-triton-graph say, instead of the suite's",
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="jobs whose title holds the text"
    )
    actions = parser.add_subparsers(metavar="ACTION")

    report = actions.add_parser("report", help="a page and Markdown tables from result files")
    report.add_argument(
        "files", type=Path, nargs="*", help=f"result files (default: all below {RESULTS})"
    )
    report.add_argument(
        "--out", type=Path, default=Path("fusedres-report"), help="folder (default %(default)s)"
    )
    report.add_argument(
        "--into",
        type=Path,
        metavar="FILE",
        help=f"instead: put the tables of the model between the markers {BEGIN} and {END} of a "
        "Markdown file",
    )
    report.set_defaults(action=_report)

    compare = actions.add_parser("compare", help="what got slower or wrong between two files")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    compare.add_argument(
        "--margin",
        type=fraction,
        help="change taken for noise, 0.1 for 10%% (default: 0.25 on a CPU, 0.1 on a GPU)",
    )
    compare.set_defaults(action=_compare)

    gate = actions.add_parser("gate", help="fail where a ratio of one run exceeds its limit")
    gate.add_argument("file", type=Path, help="result file")
    gate.add_argument("limits", type=Path, help="JSON list of limits, benchmarks/limits.json say")
    gate.set_defaults(action=_gate)

    profile = actions.add_parser("profile", help="one training step by layer")
    _add_where(profile)
    profile.add_argument("--batch", type=at_least(1), help="images (default: 256, CPU 4)")
    profile.add_argument(
        "--provider", default="fusedres", help="whose step (default: fusedres, by what is in force)"
    )
    profile.add_argument("--out", type=Path, help="add the rows to this file")
    profile.set_defaults(action=_profile)


def _add_where(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="of the computation (default: bf16, CPU fp32)"
    )
    parser.add_argument("--commit", help="for the rows, where no source tree says it")


def run(args: argparse.Namespace) -> int:
    """Measure, or do what the action says."""
    if args.action is not None:
        code: int = args.action(args)
        return code
    for name in args.providers:
        try:
            Way(name)
        except ValueError as error:
            if name != "convolution" or args.suite != "ops":
                raise UserError(f"--providers: {error}", exit_code=2) from None
    setting, dtype = _prepared(args, args.quick, args.providers)
    rows = _existing(args.out)
    setting, ceilings = with_ceilings(setting, dtype)
    measured = _add(args.out, rows, ceilings)
    suites = SUITES if args.suite == "all" else (args.suite,)
    jobs = [
        job
        for suite in suites
        for job in jobs_of(suite, setting, dtype, args.batch, args.quick, args.only)
    ]
    if not jobs:
        raise UserError(f"no job's title holds {args.only!r}; titles look like 'train, batch 16'")
    if args.resume:
        jobs = [job for job in jobs if not is_done(job, rows, setting.where)]
    for job in _progress(jobs):
        measured += _add(args.out, rows, run_job(job, setting))
    wrong = _say_in_short(measured)
    print(f"written        {args.out}; `fusedres bench report {args.out}` makes a page of it")
    return 1 if wrong else 0


def _prepared(
    args: argparse.Namespace, quick: bool, wanted: Sequence[str] = ()
) -> tuple[Setting, torch.dtype]:
    device = device_of(args.device)
    on_gpu = device.type == "cuda"
    prepare(device)
    dtype = DTYPES[args.dtype or ("bf16" if on_gpu else "fp32")]
    return setting_for(device, quick, wanted, args.commit), dtype


def _existing(path: Path) -> list[Row]:
    try:
        return results.read([path]) if path.exists() else []
    except ValueError as error:
        raise UserError(f"--out: {error}") from None


def _add(path: Path, rows: list[Row], found: Sequence[Measured]) -> list[Row]:
    """Write new rows into the file, in the place of older ones of the same: a run that is cut short
    keeps what it has.
    """
    new = [measured.row for measured in found]
    fresh = {(row["device"], results.key(row)) for row in new}
    rows[:] = [row for row in rows if (row["device"], results.key(row)) not in fresh] + new
    results.write(path, rows)
    return new


def _progress(jobs: Sequence[Job]) -> Iterator[Job]:
    bar = require("tqdm", "tqdm", "the progress bar", "bench").tqdm(
        jobs, unit="job", dynamic_ncols=True
    )
    for job in bar:
        bar.set_postfix_str(f"{job.about['section']}: {job.title}"[:60])
        yield job


def _say_in_short(rows: Sequence[Row]) -> bool:
    """How the networks did, what failed, what is wrong; whether something of ours is."""
    for row in rows:
        network = row["section"] in ("train", "infer", "blocks")
        if network and "ratio" in row and row["against"] != row["name"]:
            speed = 1 / row["ratio"]
            spread = f"{1 / row['ratio_p80']:.2f} to {1 / row['ratio_p20']:.2f}"
            print(f"{speed:6.2f}x as fast as {row['against']} ({spread})  {in_words(row)}")
    for row in rows:
        if "error" in row:
            print(f"failed         {in_words(row)}: {row['error']}")
    wrong = False
    for row in rows:
        reason = suspect(row, rows)
        if reason:
            print(f"WRONG          {in_words(row)}: {reason}")
            wrong |= row["name"].startswith("fusedres")
    return wrong


def _read(paths: Sequence[Path]) -> list[Row]:
    try:
        return results.read(paths)
    except ValueError as error:
        raise UserError(str(error)) from None


def _report(args: argparse.Namespace) -> int:
    files = args.files or _result_files(RESULTS)
    if not files:
        raise UserError(f"no result files below {RESULTS}; name some, `fusedres bench` writes them")
    if args.into is None:
        for path in write_report(_read(files), args.out):
            print(path)
        return 0
    before, begin, rest = args.into.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"--into: {args.into} has no {BEGIN} with {END} after it")
    text = f"{before}{BEGIN}\n{readme_tables(_read(files))}\n{END}{after}"
    write_atomically(args.into, text.encode())
    print(args.into)
    return 0


def _result_files(folder: Path) -> list[Path]:
    """Those that hold rows; signs.json, say, is another matter."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            results.read([path])
        except ValueError:
            continue
        found.append(path)
    return found


def _compare(args: argparse.Namespace) -> int:
    old, new = _read([args.old]), _read([args.new])
    try:
        found = changes(old, new, args.margin)
    except ValueError as error:
        raise UserError(str(error)) from None
    for change in found:
        if change.verdict != "same":
            print(f"{change.verdict:7} {change.by:6.2f}x the time  {change.what}: {change.detail}")
    counts = {verdict: sum(c.verdict == verdict for c in found) for verdict in VERDICTS}
    print(", ".join(f"{count} {verdict}" for verdict, count in reversed(counts.items())))
    return 1 if any(counts[verdict] for verdict in BAD) else 0


def _gate(args: argparse.Namespace) -> int:
    try:
        limits = read_limits(args.limits)
    except ValueError as error:
        raise UserError(str(error)) from None
    broken = exceeded(_read([args.file]), limits)
    for line in broken:
        print(f"exceeded       {line}")
    print(f"{len(limits) - len(broken)} of {len(limits)} limits hold")
    return 1 if broken else 0


def _profile(args: argparse.Namespace) -> int:
    setting, dtype = _prepared(args, quick=True)
    batch = args.batch or (256 if setting.on_gpu else 4)
    work = Workload(batch, 224, dtype, str(setting.device))
    setting, ceilings = with_ceilings(setting, dtype)
    try:
        found = profile_step(work, setting, args.provider)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--provider: {error}") from None
    header = (
        "layer",
        "part",
        "backend",
        "plan",
        "ms" if setting.on_gpu else "% of step",
        "MB",
        "% of roofline",
        "kernels",
    )
    table = [header] + [_profile_line(row, setting.on_gpu) for row in found]
    widths = [max(len(line[i]) for line in table) for i in range(len(header) - 1)]
    print(f"one training step, {work}, {args.provider}")
    for line in table:
        cells = (c.ljust(w) for c, w in zip(line, widths, strict=False))
        print("  ".join((*cells, line[-1])).rstrip())
    if args.out is not None:
        _add(args.out, _existing(args.out), [*ceilings, *map(Measured, found)])
    return 0


def _profile_line(row: Row, on_gpu: bool) -> tuple[str, ...]:
    share, bytes, kernels = row.get("of_roofline"), row["bytes"], row["kernels"]
    return (
        row["case"],
        row["name"],
        row["backend"] or "",
        row["plan"] or "",
        f"{row['ms']:.3f}" if on_gpu else f"{row['share']:.1%}",
        f"{bytes / 1e6:.1f}" if bytes else "",
        f"{share:.0%}" if share else "",
        ", ".join(name[:40] for name in kernels),
    )


COMMAND = Command(
    "bench", "measure speed beside other implementations, and make pages of it", add_arguments, run
)
