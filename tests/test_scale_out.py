"""fusedres train in several processes, as torchrun starts them: the same run as in one, whoever is
killed on the way.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist

from fusedres.training import Checkpoint, Classifier, Recipe, Trainer, TrainingError, load
from fusedres.training.data import FilePictures
from fusedres.training.processes import Agreement, Processes, launched

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
if not dist.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)

# 3 steps an epoch of 8 pictures, in fp64. The rate is low: at higher ones training doubles the
# rounding of its sums at every step
OPTIONS = ["--model", "resnet18", "--epochs", "3", "--dtype", "fp64", "--optimizer", "sgd"]
OPTIONS += ["--lr", "0.002", "--augment", "crop+flip"]
STEPS = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "tiny.npz", test=80)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of a run in one process, of batches of 8."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = start(1, "--data", str(data), *OPTIONS, "--batch-size", "8", "--out", str(out))
    said, wrong = done.communicate()
    assert done.returncode == 0, said + wrong
    return out


def start(count: int, *options: str, restarts: int = 0) -> subprocess.Popen[str]:
    """`fusedres train` in so many processes of one thread; alone without torchrun."""
    command = [sys.executable, "-P", "-m"]
    if count > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += [f"--max-restarts={restarts}", "-m"]
    return subprocess.Popen(
        [*command, "fusedres", "train", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(count: int, *options: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    process = start(count, *options)
    said, wrong = process.communicate(timeout=300)
    return process.returncode, said, wrong


def complaints(text: str) -> list[str]:
    """What fusedres says is wrong, in all processes."""
    return re.findall("fusedres: [^\n]*", text)  # behind a bar that was being drawn, perhaps


def assert_same_end(out: Path, whole: Path) -> None:
    ours, theirs = (Checkpoint.load(run).state for run in (out, whole))
    assert ours["step"] == theirs["step"] == STEPS
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in theirs["model"].items():
        off = (ours["model"][name] - value).abs().max()
        assert off <= 1e-9 * value.abs().max().clamp(min=1e-3), (name, off)
    for a, b in zip(ours["history"], theirs["history"], strict=True):
        for name in ("lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-9), name
    a, b = (json.loads((run / "result.json").read_text()) for run in (out, whole))
    assert (a["batch_size"], a["test_accuracy"]) == (b["batch_size"], b["test_accuracy"])


def test_two_processes_equal_one_with_the_double_batch(
    tmp_path: Path, data: Path, whole: Path
) -> None:
    out = tmp_path / "run"
    options = [*OPTIONS, "--batch-size", "4", "--sync-bn", "--out", str(out)]
    code, said, wrong = run(2, "--data", str(data), *options)
    assert code == 0, said + wrong
    assert said.count("epoch   3/3") == said.count("test accuracy") == 1  # by the first alone
    assert_same_end(out, whole)
    assert json.loads((out / "result.json").read_text())["processes"] == 2


def test_the_test_is_of_the_model_that_is_kept(tmp_path: Path, data: Path) -> None:
    """Where each process has statistics of its own: they are averaged before both."""
    out = tmp_path / "run"
    options = ["--model", "resnet18", "--epochs", "1", "--dtype", "fp64", "--batch-size", "4"]
    code, said, wrong = run(2, "--data", str(data), *options, "--out", str(out))
    assert code == 0, said + wrong
    result = json.loads((out / "result.json").read_text())
    found = Classifier(out).evaluate(load(data))
    assert found.loss == pytest.approx(result["test_loss"], rel=1e-9)
    assert found.accuracy == result["test_accuracy"]
    assert result["test_images"] == 80  # of which each process has tested some


# --- one of them is lost --------------------------------------------------------------------------


def ranks(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Rank: process, of those that a launcher has started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        rank = [v[5:] for v in environment if v.startswith(b"RANK=")]
        if parent == launcher.pid and rank:
            found[int(rank[0])] = int(path.name)
    return found


def stopped(
    out: Path, data: Path, signal_: int, rank: int | None, restarts: int = 0
) -> tuple[int, str, str]:
    """A run of two processes in its second epoch, when a signal comes to one of them, or for None
    to who started them.
    """
    options = [*OPTIONS, "--batch-size", "4", "--sync-bn", "--out", str(out)]
    process = start(2, "--data", str(data), *options, restarts=restarts)
    deadline = time.monotonic() + 120
    while not (out / "log.csv").exists():  # written after the checkpoint of an epoch
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    os.kill(process.pid if rank is None else ranks(process)[rank], signal_)
    said, wrong = process.communicate(timeout=120)
    return process.returncode, said, wrong


@pytest.mark.parametrize(("killed", "then"), [(1, 3), pytest.param(0, 1, marks=pytest.mark.slow)])
def test_one_process_killed(
    tmp_path: Path, data: Path, whole: Path, killed: int, then: int
) -> None:
    """The other ends and says so; any number of processes goes on, of unequal parts of a batch,
    too.
    """
    out = tmp_path / "run"
    code, said, wrong = stopped(out, data, signal.SIGKILL, killed)
    assert code != 0
    (line,) = complaints(wrong)
    assert f"process {1 - killed} of 2: another process has ended" in line, wrong
    assert f"to go on: fusedres train --resume --out {out}" in line
    saved = Checkpoint.load(out)  # whole
    assert 3 <= saved.state["step"] < STEPS
    code, said, wrong = run(then, "--resume", "--out", str(out))
    assert code == 0, said + wrong
    assert_same_end(out, whole)


@pytest.mark.slow
def test_torchrun_restarts_it(tmp_path: Path, data: Path, whole: Path) -> None:
    """By the command that began it, which goes on then."""
    out = tmp_path / "run"
    code, said, wrong = stopped(out, data, signal.SIGKILL, 1, restarts=1)
    assert code == 0, said + wrong
    assert said.count("epoch   1/3") == said.count("epoch   3/3") == 1
    assert_same_end(out, whole)


@pytest.mark.slow
def test_it_does_not_go_on_with_what_another_launch_began(
    tmp_path: Path, data: Path, whole: Path
) -> None:
    """Not even where it is started once more after an error."""
    before = (whole / "result.json").stat().st_mtime_ns
    process = start(2, "--data", str(data), "--out", str(whole), restarts=1)
    _, wrong = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(complaints(wrong)) == 2 and all("holds a run" in c for c in complaints(wrong))
    assert (whole / "result.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_sigterm_while_workers_read(tmp_path: Path) -> None:
    """torchrun sends it to the groups of its processes, of which workers are no part."""
    write_pictures(tmp_path / "data")
    out = tmp_path / "run"
    options = ["--batch-size", "4", "--sync-bn", "--out", str(out), "--workers", "2"]
    process = start(2, "--data", str(tmp_path / "data"), *OPTIONS, "--epochs", "40", *options)
    deadline = time.monotonic() + 120
    while not (out / "log.csv").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.terminate()
    _, wrong = process.communicate(timeout=120)
    (line,) = complaints(wrong)
    assert "stopped after step" in line
    assert f"stopped after step {Checkpoint.load(out).state['step']} " in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal_", "rank", "then"), [(signal.SIGINT, None, 1), (signal.SIGTERM, 1, 2)]
)
def test_an_interruption_ends_all_at_one_step(
    tmp_path: Path, data: Path, whole: Path, signal_: int, rank: int | None, then: int
) -> None:
    out = tmp_path / "run"
    code, said, wrong = stopped(out, data, signal_, rank)
    assert code != 0
    (line,) = complaints(wrong)
    assert "stopped after step" in line and "--resume" in line
    assert 3 < Checkpoint.load(out).state["step"] < STEPS
    code, said, wrong = run(then, "--resume", "--out", str(out))
    assert code == 0, said + wrong
    assert_same_end(out, whole)


# --- what is wrong is said once -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),  # found by both
        pytest.param(
            ["--data", "DATA", "--out", "WHOLE"], "holds a run already", marks=pytest.mark.slow
        ),
        (["--resume", "--out", "WHOLE", "--lr", "7"], "--lr 7.0: the run in"),  # by the first
        pytest.param(
            ["--resume", "--out", "WHOLE", "--data", "digits"],
            "not the data that the run",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_wrong_is_said_by_one(
    tmp_path: Path, data: Path, whole: Path, options: list[str], message: str
) -> None:
    options = [{"DATA": str(data), "WHOLE": str(whole)}.get(o, o) for o in options]
    if "--out" not in options:
        options += ["--out", str(tmp_path / "run")]
    code, _, wrong = run(2, *options)
    assert code != 0
    (line,) = complaints(wrong)
    assert message in line
    assert "fusedres/" not in wrong.replace(str(whole), "")  # no traceback of ours


def write_pictures(folder: Path) -> None:
    images, labels = tiny.pictures(40)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(int(label)) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path)


def test_a_picture_that_one_process_cannot_read(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data")
    train = load(tmp_path / "data", hold=False).train
    assert isinstance(train, FilePictures)
    damaged = train.paths[3]  # not one that stands for all of them
    options = [*OPTIONS, "--batch-size", "4", "--out", str(tmp_path / "run"), "--workers", "0"]
    process = start(2, "--data", str(tmp_path / "data"), *options)
    damaged.write_bytes(b"damaged")
    _, wrong = process.communicate(timeout=120)
    assert process.returncode != 0
    assert any(str(damaged) in line for line in complaints(wrong)), wrong


class Many(Processes):
    """Others that there are not."""

    def all_do(self, do: Callable[[], Any]) -> Any:
        return do()


@pytest.mark.parametrize(("count", "sync", "least"), [(27, True, 1), (14, False, 2)])
def test_fewer_pictures_than_processes_take(count: int, sync: bool, least: int) -> None:
    """Fewer than BatchNorm takes, if it takes them by itself."""
    message = f"26 pictures a step are too few for {count} processes, at least {least} for each"
    with pytest.raises(TrainingError, match=message):
        recipe = Recipe(batch_size=2, sync_bn=sync)
        Trainer(tiny.model(), tiny.data(), recipe, processes=Many(0, count))


def test_a_checkpoint_of_one_process_that_says_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those before there were several: its batch is that of the recipe, whoever shares it."""
    monkeypatch.setattr(Trainer, "_parallel", lambda self: self.model)
    recipe = Recipe(epochs=2, batch_size=4, sync_bn=True)
    state = Trainer(tiny.model(), tiny.data(), recipe).state_dict()
    del state["batch_size"]
    two = Trainer(tiny.model(), tiny.data(), recipe, processes=Many(0, 2))
    assert (two.batch_size, two.steps_per_epoch) == (8, 3)
    two.load_state_dict(state)
    assert (two.batch_size, two.steps_per_epoch) == (4, 6)


def test_what_cannot_be_compiled() -> None:
    with pytest.raises(TrainingError, match="sync_bn cannot be compiled on a CPU"):
        recipe = Recipe(sync_bn=True, compile=True)
        Trainer(tiny.model(), tiny.data(), recipe, processes=Many(0, 2))


# --- parts of it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("things", [0, 1, 7, 8, 256])
def test_shares_are_all_there_is(count: int, things: int) -> None:
    shares = [list(range(things))[Processes(r, count).share(things)] for r in range(count)]
    assert list(itertools.chain(*shares)) == list(range(things))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_alone() -> None:
    alone = Processes.current()
    assert (alone.rank, alone.count, alone.main) == (0, 1, True)
    assert alone.main_does(lambda: 3) == alone.all_do(lambda: 3) == 3
    agreement = Agreement(alone)
    assert [agreement.reached(asked) for asked in (False, True)] == [False, True]
    assert not agreement.close()
    with pytest.raises(ZeroDivisionError), alone.noticing_loss(lambda: ""):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="gloo/transport"), alone.noticing_loss(lambda: ""):
        raise RuntimeError("gloo/transport/tcp")
    with launched("cpu") as device:
        assert device == torch.device("cpu") and not dist.is_initialized()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield monkeypatch
    assert not dist.is_initialized()


@pytest.mark.parametrize("wrong", ["two", "-1", ""])
def test_an_environment_that_makes_no_sense(environment: pytest.MonkeyPatch, wrong: str) -> None:
    environment.setenv("WORLD_SIZE", wrong)
    with pytest.raises(TrainingError, match="WORLD_SIZE must be a number, got"), launched("cpu"):
        pass
    environment.setenv("WORLD_SIZE", "2")
    environment.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(TrainingError, match="start it by torchrun"), launched("cuda"):
        pass


def test_a_group_that_is_there_already(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WORLD_SIZE", "1")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'm'}", rank=0, world_size=1)
    try:
        with launched("cpu") as device:
            assert device.type == "cpu" and Processes.current().count == 1
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_others_that_cannot_be_met(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.delenv(name, raising=False)
    with pytest.raises(TrainingError, match="cannot meet the other processes"), launched("cpu"):
        pass


def test_more_processes_than_gpus(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LOCAL_RANK", "3")
    environment.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(TrainingError, match="torch finds 3; start as many"), launched("cuda"):
        pass
