"""fusedres convert, from what Keras writes to a network in torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras_files as kf
import pytest
import torch
from keras_models import make, narrowed

import fusedres
from fusedres.cli import main

Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True, scope="module")
def _narrow() -> Iterator[None]:
    with narrowed():
        yield


def written(path: Path, naming: str, **options: Any) -> Any:
    model = make(**options)
    items = kf.network(model, naming)
    kf.write_keras(path, items, kf.arrays_of(model, items), kf.config_of(items))
    return model


def loaded(printed: str) -> Any:
    """What the lines that it prints make."""
    _, _, lines = printed.partition("in Python:\n")
    scope: dict[str, Any] = {"fusedres": fusedres, "torch": torch}
    if "safetensors.torch" in lines:
        import safetensors.torch  # noqa: F401

        scope["safetensors"] = sys.modules["safetensors"]
    exec("\n".join(line.strip() for line in lines.splitlines()), scope)
    return scope["model"]


CASES: list[tuple[str, str, dict[str, Any], list[str]]] = [
    ("coursera", "out.pt", {}, []),
    ("keras", "out.pth", {"depth": 101, "variant": "keras", "classes": 3}, []),
    ("automatic", "out.safetensors", {"eps": 0.25, "in_channels": 1}, []),
    ("keras", "out.pt", {"variant": "keras", "classes": 0}, []),
    ("keras", "out.safetensors", {"variant": "keras", "classes": 0}, []),
    ("coursera", "out", {}, ["--to", "torch"]),
    ("coursera", "out.bin", {}, ["--to", "safetensors"]),
    ("coursera", "a 'name' \\.pt", {}, []),
]


@pytest.mark.parametrize(("naming", "out", "network", "given"), CASES)
def test_the_lines_it_prints_load_it(
    naming: str, out: str, network: Any, given: Any, tmp_path: Path, capsys: Out
) -> None:
    model = written(tmp_path / "in.keras", naming, **network)
    assert main(["convert", str(tmp_path / "in.keras"), str(tmp_path / out), *given]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    depth, classes = network.get("depth", 50), network.get("classes", 6)
    assert f"read: ResNet-{depth}" in printed.out and "by its configuration" in printed.out
    assert (f"{classes} classes" if classes else "no classifier") in printed.out
    found = loaded(printed.out)
    assert type(found) is type(model) and found.variant == model.variant
    assert found.bn1.eps == model.bn1.eps and found.num_classes == model.num_classes
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.parametrize("preprocess", ["caffe", "scale"])
def test_preprocess_is_a_line_of_its_own(preprocess: str, tmp_path: Path, capsys: Out) -> None:
    path = tmp_path / "in.keras"
    written(path, "coursera")
    out = str(tmp_path / "out.pt")
    assert main(["convert", str(path), out, "--preprocess", preprocess, "--variant", "keras"]) == 0
    printed = capsys.readouterr().out
    assert "variant keras, eps 1.001e-05, as asked" in printed
    ours = loaded(printed).eval()
    truth = fusedres.FusedResNet50.from_keras(path, preprocess=preprocess, variant="keras").eval()
    frames = torch.randint(256, (1, 40, 40, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(ours(frames), truth(frames))


def test_errors_are_one_line(tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "in.keras", tmp_path / "out.pt"
    written(source, "coursera")
    (tmp_path / "text.h5").write_text("text")
    (tmp_path / "there.pt").write_text("mine")
    for arguments, code, message in (
        ([source, tmp_path / "out.npz"], 2, "must end in .pt, .pth, .safetensors, or give --to"),
        ([source, tmp_path / "there.pt"], 1, "exists; give --overwrite"),
        ([source, source, "--overwrite", "--to", "torch"], 1, "is the file that is read"),
        ([tmp_path / "none.h5", out], 1, "is not there"),
        ([tmp_path / "text.h5", out], 1, "neither HDF5 nor a .keras archive"),
        ([tmp_path, out], 1, "cannot be read"),
        ([source, tmp_path / "no folder" / "out.pt"], 1, "No such file or directory"),
        ([source, out, "--preprocess", "tf"], 2, "invalid choice: 'tf'"),
        ([source], 2, "OUT"),
    ):
        assert main(["convert", *map(str, arguments)]) == code
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1, printed.err
        assert printed.err.startswith("fusedres: ") and message in printed.err
    assert not out.exists() and (tmp_path / "there.pt").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert main(["convert", str(source), str(tmp_path / "x.safetensors")]) == 1
    assert "pip install safetensors" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "there.pt"), "--overwrite"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.keras", "text.h5", "there.pt"]
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert main(["convert", str(source), str(out)]) == 1
    assert "fusedres[keras]" in capsys.readouterr().err.splitlines()[-1]


def test_as_a_user_runs_it_at_full_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ResNet-50 of 25 million parameters, by the program, with nothing narrowed."""
    from fusedres.models import stages

    monkeypatch.setattr(stages, "_PLANES", (64, 128, 256, 512))
    model = written(tmp_path / "in.keras", "automatic")
    done = subprocess.run(
        [sys.executable, "-m", "fusedres", "convert", "in.keras", "out.pt"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    line = 'fusedres.FusedResNet50(6, variant="coursera", weights="out.pt")'
    assert line in done.stdout
    state = torch.load(tmp_path / "out.pt")
    assert sum(t.numel() for n, t in state.items() if "num_batches" not in n) == 23_573_446
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    for path in (tmp_path / "in.keras", tmp_path / "out.pt"):
        path.unlink()
