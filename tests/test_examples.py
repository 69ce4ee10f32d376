"""The examples run as they stand, and say what they should."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

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


def test_the_recipe_for_imagenet_runs(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    images, labels = tiny.pictures(24, side=40)
    for part, count in (("train", 18), ("val", 6)):
        for i in range(count):
            path = tmp_path / "data" / part / str(int(labels[i])) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i].numpy()).save(path)
    options = ["--model", "resnet18", "--epochs", "3", "--batch-size", "6", "--image-size", "32"]
    run = subprocess.run(
        [sys.executable, "-P", str(EXAMPLES / "train_imagenet.py"), "data", "run", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1].endswith("after 3 epochs")
    with (tmp_path / "run" / "log.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([0.1 * 6 / 256 * share for share in (1, 0.1, 0.01)])


def test_all_examples_are_run() -> None:
    assert {p.stem for p in EXAMPLES.glob("*.py")} == {
        "torch_export",
        "onnx_runtime",
        "train_imagenet",
    }
