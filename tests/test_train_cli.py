"""train and evaluate as a user runs them: interrupted, killed, out of room, taken up."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from fusedres import use_backend
from fusedres.cli import main
from fusedres.cli.evaluate import by_class
from fusedres.training import Evaluation, Recipe, resume, train

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

FILES = ["checkpoint.pt", "confusion_matrix.png", "curves.png", "log.csv", "result.json"]
# 6 steps an epoch, of the smallest network
OPTIONS = ["--model", "resnet18", "--batch-size", "4", "--epochs", "3", "--amp", "off"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = start("train", "--data", str(data), *OPTIONS, "--out", str(out))
    stdout, stderr = done.communicate()
    assert done.returncode == 0, stdout + stderr
    assert "epoch   3/3" in stdout and "test accuracy" in stdout
    assert "img/s" in stderr and "ETA" in stderr and "accuracy" in stderr
    return out


def start(*arguments: str, largest_file: int | None = None) -> subprocess.Popen[str]:
    """`python -m fusedres` on one thread, in a process of its own."""

    def limit() -> None:
        if largest_file is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(
        [sys.executable, "-m", "fusedres", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def last_line(text: str) -> str:
    return text.splitlines()[-1] if text else ""


def content(out: Path) -> dict[str, object]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_end(out: Path, finished: Path) -> None:
    ours, theirs = content(out)["state"], content(finished)["state"]
    assert ours["step"] == theirs["step"] == 18  # type: ignore[index]
    for name, value in theirs["model"].items():  # type: ignore[index]
        assert torch.equal(ours["model"][name], value), name  # type: ignore[index]
    a, b = (json.loads((run / "result.json").read_text()) for run in (out, finished))
    for name in ("seconds", "img_per_s"):
        a.pop(name), b.pop(name)
    assert a == b


def test_a_run_leaves_its_files(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == FILES
    result = json.loads((finished / "result.json").read_text())
    assert all(not isinstance(value, dict | list) for value in result.values())
    assert 0 <= result["test_accuracy"] <= 1
    assert (result["epochs"], result["steps"], result["num_classes"]) == (3, 18, 3)
    assert result["seconds"] > 0 and result["img_per_s"] > 0
    assert (result["train_images"], result["test_images"], result["data"]) == (26, 12, "tiny.npz")
    with (finished / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["test_accuracy"]) == result["test_accuracy"]
    for name in ("curves.png", "confusion_matrix.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("epochs", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_and_resumed(tmp_path: Path, data: Path, finished: Path, epochs: int) -> None:
    run = start("train", "--data", str(data), *OPTIONS, "--out", str(tmp_path))
    wait_for((tmp_path / ("log.csv" if epochs else "checkpoint.pt")).exists, run)
    run.kill()
    run.communicate()
    assert not (tmp_path / "result.json").exists()
    assert len(content(tmp_path)["state"]["history"]) >= epochs  # type: ignore[index]
    done = start("train", "--resume", "--out", str(tmp_path))
    stdout, stderr = done.communicate()
    assert done.returncode == 0, stderr
    assert ("epoch   1/3" in stdout) is (epochs == 0)
    assert_same_end(tmp_path, finished)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES  # no half of a file is left


@pytest.mark.slow
def test_interrupted_and_resumed(tmp_path: Path, data: Path, finished: Path) -> None:
    run = start("train", "--data", str(data), *OPTIONS, "--out", str(tmp_path))
    wait_for((tmp_path / "log.csv").exists, run)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate()
    assert run.returncode == 130
    line = last_line(stderr)
    assert line.startswith("fusedres: stopped after step ") and "of 18" in line
    assert line.endswith(f"fusedres train --resume --out {tmp_path}")
    assert 6 < content(tmp_path)["state"]["step"] < 18  # type: ignore[index, operator]
    assert main(["evaluate", "--checkpoint", str(tmp_path), "--device", "cpu"]) == 0  # usable
    done = start("train", "--resume", "--out", str(tmp_path), "--epochs", "3")
    done.communicate()
    assert done.returncode == 0
    assert_same_end(tmp_path, finished)


def test_out_of_room(tmp_path: Path, data: Path, finished: Path) -> None:
    before = (finished / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(before)
    options = [*OPTIONS, "--seed", "1", "--overwrite", "--out", str(tmp_path)]
    full = start("train", "--data", str(data), *options, largest_file=2**20)
    _, stderr = full.communicate()
    assert full.returncode == 1
    line = last_line(stderr)
    assert line.startswith(f"fusedres: {tmp_path / 'checkpoint.pt'}: cannot write: File too large")
    assert line.endswith("the checkpoint there is the one of before")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]  # no half of a file


@pytest.mark.slow
def test_the_whole_group_stopped_while_workers_read(tmp_path: Path) -> None:
    """As `timeout` and batch systems stop a program."""
    images, labels = tiny.pictures(600)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "data" / tiny.CLASSES[int(label)]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(
            tmp_path / "data" / tiny.CLASSES[int(label)] / f"{i}.bmp"
        )
    program = (
        "import sys; from fusedres.training.data import folder; folder.IN_MEMORY = 0; "
        "from fusedres.cli import main; sys.exit(main())"
    )
    out = tmp_path / "out"
    options = [*OPTIONS, "--data", str(tmp_path / "data"), "--workers", "2", "--out", str(out)]
    run = subprocess.Popen(
        [sys.executable, "-c", program, "train", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for((out / "checkpoint.pt").exists, run)
    time.sleep(1)
    os.killpg(run.pid, signal.SIGTERM)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130, stderr
    assert last_line(stderr).startswith("fusedres: stopped after step "), stderr
    assert content(out)["state"]["step"] > 0  # type: ignore[index, operator]


def test_a_run_gone_wrong_leaves_the_checkpoint_of_before(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--lr", "1e38", "--warmup", "0", "--optimizer", "sgd", "--device", "cpu"]
    assert main(["train", "--data", str(data), *OPTIONS, *options, "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "no longer finite in epoch 1; try a lower learning rate than 1e+38" in last_line(err)
    assert content(tmp_path)["state"]["step"] == 0  # type: ignore[index]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt"]


def test_overwriting_leaves_nothing_of_the_old_run(tmp_path: Path, data: Path) -> None:
    options = [*OPTIONS, "--epochs", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["train", "--data", str(data), *options]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    again = ["--overwrite", "--lr", "1e38", "--warmup", "0", "--optimizer", "sgd"]
    assert main(["train", "--data", str(data), *options, *again]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_class_names_of_any_kind_and_no_progress(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    x, y = tiny.pictures(24)
    names = np.array(["a$_$b", "line\nbreak", "$5"])
    np.savez(tmp_path / "a.npz", x_train=x.numpy(), y_train=y.numpy(), classes=names)
    recipe = Recipe(epochs=2, batch_size=8, amp="off")
    result = train(tmp_path / "a.npz", tmp_path / "run", recipe, model="resnet18", progress=False)
    assert capfd.readouterr() == ("", "")
    assert (result.epochs, result.num_classes) == (2, 3)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
    (tmp_path / "run" / "log.csv").unlink()
    assert resume(tmp_path / "run", progress=False).test_loss == pytest.approx(result.test_loss)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES


def test_resume_of_a_checkpoint_without_its_optimizer(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    less = content(finished)
    del less["state"]["optimizer"]  # type: ignore[attr-defined]
    torch.save(less, tmp_path / "checkpoint.pt")
    assert main(["train", "--resume", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("checkpoint.pt: damaged: 'optimizer'\n")


def test_resume_wants_the_folder(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = finished / "checkpoint.pt"
    assert main(["train", "--resume", "--device", "cpu", "--out", str(file)]) == 1
    assert "cannot write there" in capsys.readouterr().err


def test_memory_and_compiler_errors_are_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error: Exception = RuntimeError("a fault of ours")

    def fails(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("fusedres.cli.train.train", fails)
    for given, part in (
        (MemoryError(), "try a smaller --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), "try a smaller --batch-size"),
        (torch._dynamo.exc.Unsupported("no compiler\nfound"), "torch.compile failed: no compiler"),
    ):
        error = given
        assert main(["train", "--data", str(data), "--out", str(tmp_path)]) == 1
        err = capsys.readouterr().err
        assert part in err and err.count("\n") == 1
    error = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["train", "--data", str(data), "--out", str(tmp_path)])


@pytest.mark.parametrize(("backend", "options"), [("cuda", []), ("cpp", ["--amp", "fp16"])])
def test_a_backend_that_cannot_serve(
    data: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    backend: str,
    options: list[str],
) -> None:
    with use_backend(backend):
        command = ["train", "--data", str(data), "--device", "cpu", "--out", str(tmp_path)]
        assert main([*command, *options]) == 1
        err = capsys.readouterr().err
        assert f"'{backend}'" in err and err.count("\n") == 1
        if backend == "cuda":
            assert main(["evaluate", "--checkpoint", str(finished), "--device", "cpu"]) == 1
            assert capsys.readouterr().err == err
    assert not list(tmp_path.iterdir())


def test_evaluate_finds_what_training_found(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((finished / "result.json").read_text())
    figure = tmp_path / "matrix.svg"
    arguments = ["evaluate", "--checkpoint", str(finished), "--device", "cpu"]
    assert main([*arguments, "--json", "--figure", str(figure)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == result["test_accuracy"]
    assert found["loss"] == pytest.approx(result["test_loss"], rel=1e-4)
    assert (found["images"], found["classes"]) == (12, list(tiny.CLASSES))
    assert "<svg" in figure.read_text()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"test accuracy {result['test_accuracy']:.1%} on 12 pictures" in out
    assert out.count("\n") == 5  # a line for each class
    assert main([*arguments, "--part", "train"]) == 0
    assert "on 26 pictures" in capsys.readouterr().out


def test_classes_of_one_name_are_told_apart() -> None:
    confusion = torch.tensor([[3, 1, 0], [0, 5, 0], [2, 2, 0]])
    lines = [line.split() for line in by_class(Evaluation(0.1, confusion), ("a", "a", "b"))][1:]
    assert lines == [
        ["a", "4", "75%", "a", "(1)"],
        ["a", "5", "100%"],
        ["b", "4", "0%", "a", "(2)"],
    ]


def test_evaluate_on_other_data(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--checkpoint", str(finished), "--device", "cpu", "--data"]
    larger = tiny.write_npz(tmp_path / "larger.npz", side=64)
    assert main([*arguments, str(larger)]) == 0  # scaled to what the network was trained on
    capsys.readouterr()
    assert main([*arguments, "digits"]) == 1
    assert "those of the checkpoint blue, green, red" in capsys.readouterr().err
    assert main([*arguments, str(larger), "--figure", "a.gif"]) == 2


def test_a_hostile_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"state": Hostile()}, tmp_path / "checkpoint.pt")
    for command in (
        ["evaluate", "--checkpoint", str(tmp_path)],
        ["train", "--resume", "--out", str(tmp_path)],
    ):
        assert main(command) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "refused" in err and "system" in err
    assert not (tmp_path / "executed").exists()


# What makes no sense ends before anything is written


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 2, "--data is needed"),
        (["--data", "absent"], 1, "absent: no such file"),
        (["--data", "{data}", "--epochs", "0"], 2, "--epochs"),
        (["--data", "{data}", "--batch-size", "1"], 2, "from 2 up"),
        (["--data", "{data}", "--seed", "9" * 30], 2, "--seed"),
        (["--data", "{data}", "--lr", "-1"], 1, "lr must be above 0"),
        (["--data", "{data}", "--warmup", "20"], 1, "warmup is a share"),
        (["--data", "{data}", "--variant", "caffe"], 2, "caffe"),
        (["--data", "{data}", "--image-size", "16"], 2, "from 32 up"),
        (["--resume", "--overwrite"], 2, "not allowed with"),
        (["--resume"], 1, "no such checkpoint"),
    ],
)
def test_options_that_make_no_sense(
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    part: str,
) -> None:
    filled = [argument.format(data=data) for argument in arguments]
    assert main(["train", *filled, "--device", "cpu", "--out", str(tmp_path / "new")]) == code
    err = capsys.readouterr().err
    assert err.startswith("fusedres: ") and part in err and err.count("\n") == 1
    assert not list(tmp_path.glob("new/*"))


def test_a_run_is_neither_overwritten_nor_changed_by_accident(
    data: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    for arguments, part in (
        (["--data", str(data)], "holds a run already"),
        (["--resume", "--lr", "0.5"], "--lr 0.5: the run in"),
        (["--resume", "--model", "resnet34"], "began with resnet18"),
        (["--resume", "--data", "digits"], "not the data that the run"),
    ):
        assert main(["train", *arguments, "--device", "cpu", "--out", str(finished)]) == 1
        err = capsys.readouterr().err
        assert part in err and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize("command", ["train", "gradients"])
def test_nowhere_to_write(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    out = tmp_path / "taken" / "run"
    assert main([command, "--data", str(data), "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert err == f"fusedres: {out}: cannot write there: Not a directory\n"


def test_what_is_not_installed_is_named(tmp_path: Path, data: Path) -> None:
    (tmp_path / "h5py.py").write_text("raise ImportError('not installed')\n")
    (tmp_path / "a.h5").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-m", "fusedres", "train", "--data", "a.h5"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == (
        'fusedres: reading .h5 files needs h5py; install with: pip install "fusedres[train]"\n'
    )


def test_figures_that_cannot_be_drawn_are_known_before_training(tmp_path: Path, data: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not installed')\n")
    done = subprocess.run(
        [sys.executable, "-m", "fusedres", "train", "--data", str(data), *OPTIONS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("fusedres: drawing figures needs matplotlib; install")
    assert not list((tmp_path / "fusedres-train").iterdir())


# The figures


def test_figures_name_what_they_show() -> None:
    from fusedres.training.figures import confusion_matrix, curves
    from fusedres.training.trainer import Epoch

    history = [Epoch(i, 10 * i, 0.1, 2 / i, 0.3, 3 / i, 0.2 * i, 1.0, 10.0) for i in (1, 2, 3)]
    loss, accuracy = curves(history, "resnet50 on tiny").axes
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("epoch", "cross-entropy")
    assert (accuracy.get_title(), accuracy.get_ylim()[0]) == ("accuracy", 0)
    training, test = loss.get_lines()
    assert training.get_ydata().tolist() == [2, 1, 2 / 3]
    assert test.get_ydata().tolist() == [3, 1.5, 1]
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["training (augmented pictures)", "test"]

    confusion = torch.tensor([[5, 1], [0, 7]])
    (axes,) = confusion_matrix(confusion, ("cat", "dog"), "12 pictures").axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert [text.get_text() for text in axes.texts] == ["5", "1", "0", "7"]
    assert axes.texts[1].get_position() == (1, 0)  # column 1 of row 0
    many = confusion_matrix(torch.eye(50, dtype=torch.int64), [f"class {i}" for i in range(50)], "")
    assert len(many.axes) == 2 and not many.axes[0].texts  # a scale instead of counts
