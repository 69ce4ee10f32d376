"""The program as a user runs it: a process of its own, in a folder of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedres
from fusedres.cli import _digits, main
from fusedres.nn import unfuse

PNG = b"\x89PNG\r\n\x1a\n"
EXTRA = ("sklearn", "matplotlib", "tqdm")
needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in EXTRA),
    reason="needs scikit-learn, matplotlib and tqdm",
)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m fusedres`, on one thread: several would wait for each other on a busy machine."""
    return subprocess.run(
        [sys.executable, "-m", "fusedres", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def assert_one_line(stderr: str, *parts: str) -> None:
    assert stderr.startswith("fusedres: ") and stderr.count("\n") == 1, stderr
    for part in parts:
        assert part in stderr


def test_info(tmp_path: Path) -> None:
    done = run(tmp_path, "info")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"fusedres {fusedres.__version__}" in done.stdout
    for name in ("reference", "cpp", "triton", "cuda"):
        assert name in done.stdout


def test_info_as_json(tmp_path: Path) -> None:
    done = run(tmp_path, "info", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found.keys() == fusedres.info().keys()
    assert found["version"] == fusedres.__version__
    assert found["backends"]["reference"]["ready"] is True


def test_unknown_subcommand(tmp_path: Path) -> None:
    done = run(tmp_path, "frobnicate")
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, "'frobnicate'", "info", "demo", "--help")


@needs_extra
def test_demo_names_the_missing_extra(tmp_path: Path) -> None:
    (tmp_path / "tqdm.py").write_text("raise ImportError('not installed')\n")
    done = run(tmp_path, "demo", "--quick")  # `python -m` looks in the current folder first
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, "tqdm", 'pip install "fusedres[demo]"')
    assert "matplotlib" not in done.stderr
    assert not (tmp_path / "fusedres-demo").exists()


@needs_extra
def test_demo_end_to_end(tmp_path: Path) -> None:
    done = run(tmp_path, "demo", "--quick", "--device", "cpu", "--out", "new/folder")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("device", "backend", "test accuracy", "parity", "PASS", "step time", "loss.png"):
        assert part in done.stdout
    assert " ms" not in done.stdout  # on a CPU the ratio only
    assert "img/s" in done.stderr

    out = tmp_path / "new" / "folder"
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "loss.png"]
    assert (out / "loss.png").read_bytes().startswith(PNG)
    results = json.loads((out / "demo.json").read_text())
    assert results["passed"] is True
    assert results["config"]["quick"] is True
    fused, unfused = results["losses"]["fused"], results["losses"]["unfused"]
    assert len(fused) == len(unfused) == 2
    assert fused[0] == pytest.approx(unfused[0], rel=1e-3)  # same weights, same batch
    assert 0 <= results["parity"]["difference"] <= results["parity"]["limit"] == 1e-9
    assert results["step_time"]["fused_over_unfused"]["ratio_of_medians"] > 0
    assert results["versions"]["fusedres"] == fusedres.__version__
    assert {"training, fused", "training, unfused", "parity"} <= results["seconds"].keys()


# What needs no process of its own runs in this one.


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fusedres {fusedres.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["demo", "--epochs", "none"], ["demo", "--batch-size", "1"]]
)
def test_arguments_that_make_no_sense(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 2
    assert_one_line(capsys.readouterr().err, "--help")


def test_unknown_backend_in_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEDRES_BACKEND", "fastest")
    assert main(["info"]) == 2
    assert_one_line(capsys.readouterr().err, "FUSEDRES_BACKEND", "'fastest'", "'cpp'")


def test_output_that_nobody_reads(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["info"]) == 141
    assert capfd.readouterr().err == ""  # closing it wrote what was left, to nowhere


@needs_extra
def test_demo_without_a_place_to_write(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file, not a folder")
    assert main(["demo", "--quick", "--device", "cpu", "--out", str(taken)]) == 1
    assert_one_line(capsys.readouterr().err, str(taken))


@needs_extra
@pytest.mark.parametrize(("off_by", "passes"), [(0.0, True), (1e-6, False)])
def test_parity_sees_a_gradient_that_is_off(
    monkeypatch: pytest.MonkeyPatch, off_by: float, passes: bool
) -> None:
    def unfuse_with_fault(model: nn.Module) -> nn.Module:
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * (1 + off_by))
        return unfuse(model)

    monkeypatch.setattr(_digits, "unfuse", unfuse_with_fault)
    digits = _digits.load(train=128, test=16)
    assert _digits.parity(digits, seed=0, device=torch.device("cpu")).passed is passes
