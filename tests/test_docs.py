"""Figures in the docs come from committed results, code in the docs runs."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from fusedres.cli import main

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "docs").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = r"fusedres ((?:train|evaluate|predict|summary|gradients)\b[^`#\n]*)"
    for line in re.findall(commands, page.read_text()):
        command, *words = line.split()
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = capsys.readouterr().out
        for word in words:
            if word.startswith("--"):
                assert word.rstrip(".,;:") in known, line
