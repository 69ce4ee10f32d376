"""The examples run as they stand, and say what they should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("torch_export", ".pt2"), pytest.param("onnx_runtime", ".onnx", marks=pytest.mark.peers)],
)
def test_an_example_runs(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"network{suffix}"
    run = subprocess.run(
        [sys.executable, "-P", str(EXAMPLES / f"{name}.py"), str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert path.stat().st_size > 90e6  # all weights, in fp32
    assert run.stdout.splitlines()[-1].endswith("as before")


def test_all_examples_are_run() -> None:
    assert {p.stem for p in EXAMPLES.glob("*.py")} == {"torch_export", "onnx_runtime"}
