"""Figures in the docs come from committed results, code in the docs runs."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

from fusedres._plans import DATAFLOWS
from fusedres.bench import roofline
from fusedres.bench import rows as results
from fusedres.bench.report import readme_tables
from fusedres.bench.rows import Row
from fusedres.bench.verdict import read_limits
from fusedres.cli import main
from fusedres.cli.bench import BEGIN, END

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "docs").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.append(ROOT / "benchmarks" / "README.md")
COMMANDS = "train|evaluate|predict|convert|summary|gradients|bench|tune"


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_signs_is_that_of_the_results() -> None:
    signs = script("benchmarks/signs.py")
    results = json.loads(signs.RESULTS.read_text())
    page = (ROOT / "docs" / "training.md").read_text()
    assert f"{signs.BEGIN}\n{signs.table(results)}\n{signs.END}" in page
    by_path = {
        path: [run["test_accuracy"] for run in results["runs"] if run["path"] == path]
        for path in signs.BACKENDS
    }
    assert {len(found) for found in by_path.values()} == {3}
    means = {path: sum(found) / 3 for path, found in by_path.items()}
    assert min(by_path["fused"]) >= 0.97
    assert abs(means["fused"] - means["unfused"]) <= 0.02


def test_the_table_of_the_loader_is_that_of_the_results() -> None:
    loader = script("benchmarks/loader.py")
    results = json.loads(loader.RESULTS.read_text())
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert f"{loader.BEGIN}\n{loader.table(results)}\n{loader.END}" in page
    one = next(row["img_per_s"] for row in results["rows"] if row["workers"] == 1)
    assert f" | 1 | {one:,.0f} | {one:,.0f} | {math.ceil(9500 / one)} |" in page
    assert {row["way"] for row in results["rows"]} and "cores for 9,500 img/s" in page


def rows_of_results() -> list[Row]:
    found = []
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*.json")):
        if path.name not in ("signs.json", "loader.json"):
            found += results.read([path])
    return found


def tables_of_the_readme() -> str:
    _, begin, rest = (ROOT / "README.md").read_text().partition(BEGIN)
    table, end, _ = rest.partition(END)
    assert begin and end
    return table


def test_the_readmes_tables_are_those_of_the_results() -> None:
    assert tables_of_the_readme().strip() == readme_tables(rows_of_results()).strip()


def test_every_speed_in_the_readme_is_a_rows(  # not by the code that wrote it
) -> None:
    rows = [row for row in rows_of_results() if row["section"] in ("train", "infer")]
    work = {"training": "train", "inference": "infer"}
    cpu, _, gpu = tables_of_the_readme().partition("### GPU")
    lines = [line.strip("| ").split(" | ") for line in cpu.splitlines() if line.startswith("|")]
    header, _, *body = lines
    checked = 0
    for what, *cells in body:
        kind, batch, dtype, size = what.split(", ")
        for name, cell in zip(header, cells, strict=False):
            asked = (work[kind], int(batch.removeprefix("batch ")), dtype, "cpu", name)
            found = [
                f"{1 / row['ratio']:.2f}x"
                for row in rows
                if (row["section"], row["batch"], row["dtype"], row["device"], row["name"]) == asked
                and f"{row['shape'][-1]}x{row['shape'][-1]}" == size
            ]
            assert found == ([] if cell == "not measured" else [cell]), (what, name)
            checked += len(found)
    assert checked >= 8
    if all(row["device"] == "cpu" for row in rows):
        body = [line.split(" | ")[1:] for line in gpu.splitlines() if line.startswith("| t")]
        assert {cell.strip("| ") for line in body for cell in line} == {"not measured"}
    prose = (ROOT / "README.md").read_text().replace(tables_of_the_readme(), "")
    assert not re.search(r"\d\.\d+ ?x\b|\d+ img/s|\d+(\.\d+)? ms\b", prose)


def test_the_table_of_plans_is_that_of_the_byte_model() -> None:
    names = [name for name in ("compiler", "library", *DATAFLOWS) if name in roofline.DATAFLOWS]
    page = (ROOT / "docs" / "plans.md").read_text()
    begin, end = "<!-- byte model -->", "<!-- end of byte model -->"
    assert f"{begin}\n{roofline.markdown(names)}\n{end}" in page


def test_limits_are_of_what_was_measured() -> None:
    rows = [row for row in rows_of_results() if row["device"] == "cpu"]
    for limit in read_limits(ROOT / "benchmarks" / "limits.json"):
        asked = {f: v for f, v in limit.items() if f not in ("ratio", "margin")}
        (row,) = (row for row in rows if asked.items() <= row.items())
        assert limit["ratio"] == round(row["ratio"], 2), limit


def test_files_of_results_say_where_they_come_from() -> None:
    for row in rows_of_results():
        assert row["commit"] and row["torch"] and row["time"], row


def test_the_comparison_links_to_the_tests_that_show_it() -> None:
    page = (ROOT / "docs" / "comparison.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[-1] != "fusedres"]
    assert len(rows) > 40 and {len(row) for row in rows} == {9}
    note = r"(\[\^\w+\])?"
    missing = []
    for what, *theirs, ours in rows:
        for cell in theirs:
            assert re.fullmatch(rf"(yes|no|partly|-|\?){note}", cell), (what, cell)
        link = re.fullmatch(rf'\[(yes|no|partly)\]\(\.\./(tests/\w+\.py) "(\w+)"\){note}', ours)
        if link is None:
            assert re.fullmatch(rf"no{note}", ours), (what, ours)
            continue
        file, name = ROOT / link[2], link[3]
        if not (file.exists() and f"def {name}(" in file.read_text()):
            missing.append(f"{what}: {link[2]} {name}")
    notes = re.findall(r"^\[\^(\w+)\]: ", page, re.MULTILINE)
    assert sorted(notes) == sorted(set(re.findall(r"\[\^(\w+)\](?!:)", page)))
    assert not missing, "\n".join(["no such test:", *missing])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in re.findall(rf"fusedres ((?:{COMMANDS})\b[^`#|&\n]*)", page.read_text()):
        command, *words = line.split()
        action = [word for word in words[:1] if command == "bench" and word.isalpha()]
        with pytest.raises(SystemExit):
            main([command, *action, "--help"])
        known = capsys.readouterr().out
        for word in words:
            if word.startswith("--"):
                assert word.rstrip(".,;:") in known, line
