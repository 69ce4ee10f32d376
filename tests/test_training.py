"""The loop, its recipe and its checkpoints, on data and networks of a second."""

from __future__ import annotations

import copy
import errno
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from fusedres.training import (
    Checkpoint,
    CheckpointError,
    DataError,
    Network,
    Preprocess,
    Recipe,
    Trainer,
    TrainingError,
    evaluate,
    load,
)
from fusedres.training import preprocess as preprocess_module
from fusedres.training.data import ArrayPictures
from fusedres.training.data import folder as folder_module
from fusedres.training.loader import seeded
from fusedres.training.preprocess import AUGMENTATIONS, augmented, draw, unit
from fusedres.training.recipe import AMP
from fusedres.training.run import log_csv

RECIPE = Recipe(epochs=3, batch_size=8, lr=0.01, amp="off")


class Stop(Exception):
    """Raised by a callback, where a user would press Ctrl-C."""


def stop_after(trainer: Trainer, step: int) -> Callable[[], None]:
    def on_step() -> None:
        if trainer.step == step:
            raise Stop

    return on_step


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# Recipe


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"epochs": 0}, "epochs must be an integer from 1 up, got 0"),
        ({"epochs": 2.5}, "epochs"),
        ({"batch_size": 1}, "batch_size must be an integer from 2 up, got 1"),
        ({"seed": 2**63}, "seed"),
        ({"batch_size": True}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"optimizer": "adam"}, "optimizer must be one of adamw, sgd"),
        ({"augment": "mixup"}, "augment"),
        ({"amp": "int8"}, "amp must be one of auto, bf16"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": math.nan}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"warmup": 1.5}, "warmup"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_recipe_names_what_makes_no_sense(wrong: dict[str, Any], part: str) -> None:
    with pytest.raises(TrainingError, match=part):
        Recipe(**wrong)


@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_learning_rate_rises_to_its_peak_and_falls_to_zero(warmup: float) -> None:
    recipe = replace(RECIPE, epochs=4, warmup=warmup)
    trainer = Trainer(tiny.model(), tiny.data(), recipe)
    rates: list[float] = []
    trainer.run(lambda: rates.append(trainer.lr))
    assert len(rates) == trainer.steps == 12
    assert max(rates) == pytest.approx(0.01, rel=0.05)
    assert rates.index(max(rates)) == pytest.approx(warmup * 11, abs=1)
    assert [epoch.lr for epoch in trainer.history] == [rates[i] for i in (2, 5, 8, 11)]
    if warmup < 1:
        assert rates[-1] < 1e-6


@pytest.mark.parametrize("warmup", [0, 0.05, 0.1, 0.2, 0.25, 0.5, 1])
def test_learning_rate_of_short_runs(warmup: float) -> None:
    for steps in range(1, 22):
        recipe = Recipe(warmup=warmup)
        optimizer = recipe.make_optimizer(nn.Linear(1, 1))
        schedule = recipe.make_schedule(optimizer, steps)
        rates = []
        for step in range(steps):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            if step + 1 < steps:
                schedule.step()
        assert 0.3 * recipe.peak_lr < max(rates) <= recipe.peak_lr, steps


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_learns(optimizer: str) -> None:
    recipe = Recipe(
        epochs=16, batch_size=8, optimizer=optimizer, lr=0.02, augment="shift", amp="off"
    )
    evaluation = Trainer(tiny.model(), tiny.data(), recipe).run()
    assert evaluation.accuracy == 1
    assert evaluation.confusion.tolist() == [[4, 0, 0], [0, 4, 0], [0, 0, 4]]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_types(amp: str) -> None:
    trainer = Trainer(tiny.model(), tiny.data(), replace(RECIPE, amp=amp))
    before = weights(trainer)
    dtypes = set()
    trainer.model.register_forward_hook(lambda module, inputs, out: dtypes.add(out.dtype))
    trainer.run()
    assert dtypes == {AMP[amp]}  # in training and in testing
    assert trainer.scaler.is_enabled() is (amp == "fp16")
    assert all(math.isfinite(epoch.train_loss) for epoch in trainer.history)
    assert not torch.equal(before["0.conv.weight"], weights(trainer)["0.conv.weight"])


def test_compiled_and_eager_agree() -> None:
    recipe = replace(RECIPE, epochs=1)
    eager, compiled = (
        Trainer(tiny.model()[:1].append(nn.Flatten()).append(nn.Linear(512, 3)), tiny.data(), r)
        for r in (recipe, replace(recipe, compile=True))
    )
    eager.run()
    compiled.run()
    assert compiled.model._compiled_call_impl is not None
    for name, value in weights(eager).items():
        assert torch.allclose(value, compiled.model.state_dict()[name], atol=1e-4), name


@pytest.mark.parametrize("step", [4, 6])  # within an epoch, and after the last loss of one
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_are_not_finite_end_the_run(step: int, value: float) -> None:
    model = tiny.model()
    trainer = Trainer(model, tiny.data(), RECIPE)

    def spoil() -> None:
        if trainer.step == step:
            nn.init.constant_(model[-1].weight, value)

    expected = r"no longer finite in epoch 2; try a lower learning rate than 0\.01$"
    with pytest.raises(TrainingError, match=expected):
        trainer.run(spoil)
    assert len(trainer.history) == 1


def test_a_step_is_what_the_recipe_says() -> None:
    recipe = Recipe(
        epochs=2,
        batch_size=26,
        lr=0.1,
        warmup=0,
        weight_decay=0.3,
        label_smoothing=0.2,
        augment="none",
        amp="off",
        optimizer="sgd",
    )
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    by_hand = copy.deepcopy(flat)
    trainer = Trainer(flat, tiny.data(), recipe)
    with pytest.raises(Stop):
        trainer.run(stop_after(trainer, 1))

    data = tiny.data()
    inputs = trainer.preprocess(unit(data.train.read(range(26))))
    log_p = by_hand(inputs).log_softmax(1)
    target = 0.8 * nn.functional.one_hot(data.train.labels, 3) + 0.2 / 3
    loss = -(target * log_p).sum(1).mean()
    loss.backward()
    assert trainer.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for ours, plain in zip(flat.parameters(), by_hand.parameters(), strict=True):
        gradient = plain.grad + 0.3 * plain
        expected = plain - trainer.lr * (gradient + 0.9 * gradient)  # Nesterov's first step
        assert torch.allclose(ours, expected, atol=1e-6)
    assert recipe.make_optimizer(flat).defaults["nesterov"]
    adamw = replace(recipe, optimizer="adamw").make_optimizer(flat)
    assert (type(adamw).__name__, adamw.defaults["weight_decay"]) == ("AdamW", 0.3)


def test_more_pictures_a_step_than_there_are() -> None:
    trainer = Trainer(tiny.model(), tiny.data(), replace(RECIPE, batch_size=100))
    assert (trainer.batch_size, trainer.steps_per_epoch) == (26, 1)


# Batches and augmentation


def test_an_epoch_takes_each_picture_once_and_each_epoch_another_order() -> None:
    trainer = Trainer(tiny.model(), tiny.data(), RECIPE)
    epochs = []
    for epoch in range(3):
        trainer.batches.seek(epoch, 0)
        epochs.append(list(trainer.batches))
        trainer.batches.seek(epoch, 2)
        assert list(trainer.batches) == epochs[-1][2:]
    for batches in epochs:
        assert [len(batch.index) for batch in batches] == [8, 8, 8]
        assert len({i for batch in batches for i in batch.index}) == 24
    assert epochs[0] != epochs[1] != epochs[2]


def test_each_step_moves_pictures_in_another_way() -> None:
    data = tiny.data()
    same = ArrayPictures(data.train.read([0]).expand(26, -1, -1, -1), data.train.labels)
    trainer = Trainer(tiny.model(), replace(data, train=same), RECIPE)
    seen: list[Tensor] = []
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if module.training else None
    )
    trainer.run()
    pictures = torch.cat(seen).flatten(1)
    assert len(pictures) == len(pictures.unique(dim=0)) == 72  # 9 steps of 8


def test_seeds_of_different_parts_differ() -> None:
    draws = {
        torch.rand(1, generator=seeded(*parts)).item() for parts in ((0, 1), (1, 0), (1,), (0,))
    }
    assert len(draws) == 4
    assert torch.equal(torch.rand(3, generator=seeded(5, 7)), torch.rand(3, generator=seeded(5, 7)))


def picture() -> Tensor:
    """A bright square off the middle: [32, 1, 32, 32]."""
    images = torch.zeros(32, 1, 32, 32)
    images[:, :, 4:10, 18:24] = 1
    return images


def moved(images: Tensor, augmentation: str, seed: int) -> Tensor:
    return augmented(images, augmentation, draw(augmentation, len(images), seeded(seed)))


def test_augmentation_none_is_the_picture() -> None:
    assert torch.equal(moved(picture(), "none", 0), picture())


@pytest.mark.parametrize("augmentation", [name for name in AUGMENTATIONS if name != "none"])
def test_augmentation_depends_on_the_generator_alone(augmentation: str) -> None:
    same = torch.rand(1, 1, 32, 32, generator=seeded(2)).expand(32, -1, -1, -1)
    first, again, other = (moved(same, augmentation, s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.flatten(1).unique(dim=0)) == 32  # every picture by itself


def still(monkeypatch: pytest.MonkeyPatch, *but: str) -> None:
    """Turn every part of the augmentation off but some."""
    for name in {"ANGLE", "ZOOM", "SHIFT", "BRIGHTNESS"} - set(but):
        monkeypatch.setattr(preprocess_module, name, 0.0)


def test_flip_mirrors_about_half_of_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    still(monkeypatch)
    images = picture()
    out = moved(images, "affine+flip", 0)
    same = [torch.allclose(o, i, atol=1e-4) for o, i in zip(out, images, strict=True)]
    turned = [torch.allclose(o, i.flip(2), atol=1e-4) for o, i in zip(out, images, strict=True)]
    assert all(a != b for a, b in zip(same, turned, strict=True))
    assert 8 < sum(same) < 24


def centre(images: Tensor) -> Tensor:
    """(row, column) of the middle of the light: [N, 2]."""
    light = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True)
    at = torch.arange(32.0)
    return torch.stack(((light.sum(2) * at).sum(1), (light.sum(1) * at).sum(1)), 1)


def test_how_far_pictures_move(monkeypatch: pytest.MonkeyPatch) -> None:
    still(monkeypatch, "SHIFT")
    shift = (centre(moved(picture(), "shift", 0)) - centre(picture())).abs()
    assert 3 < shift.max() <= 0.15 * 32 + 0.1
    assert (shift.amax(0) > 3).all()  # both ways


def test_how_much_pictures_are_lit(monkeypatch: pytest.MonkeyPatch) -> None:
    still(monkeypatch, "BRIGHTNESS")
    change = moved(picture(), "affine", 0) - picture()
    spread = change.flatten(1)
    assert (spread.amax(1) - spread.amin(1)).max() < 1e-4  # the same all over
    assert 0.1 < change.abs().max() <= 0.2


def test_size_and_angle_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    square = torch.zeros(32, 1, 32, 32)
    square[:, :, 8:24, 8:24] = 1
    still(monkeypatch, "ZOOM")
    area = moved(square, "affine", 0).sum((1, 2, 3)) / 256
    assert area.min() > 0.85**2 * 0.8 and area.max() < 1.15**2 / 0.8 and area.std() > 0.1
    monkeypatch.undo()
    still(monkeypatch, "ANGLE")
    bar = torch.zeros(32, 1, 32, 32)
    bar[:, :, 2:8, 14:18] = 1  # above the middle: turning moves it sideways
    turned = centre(moved(bar, "affine", 0))
    angle = torch.atan2(turned[:, 1] - 15.5, 15.5 - turned[:, 0])
    assert 0.15 < angle.abs().max() < math.radians(15) + 0.03


def test_preprocess_standardises_what_it_was_fit_to() -> None:
    images, labels = tiny.pictures(26)
    preprocess = Preprocess.fit(ArrayPictures(images, labels))
    out = preprocess(unit(images))
    assert out.is_contiguous(memory_format=torch.channels_last)
    std, mean = torch.std_mean(out.to(torch.float64), (0, 2, 3), correction=0)
    assert torch.allclose(mean, torch.zeros(3).double(), atol=1e-6)
    assert torch.allclose(std, torch.ones(3).double(), atol=1e-6)
    assert preprocess.channels == 3


def test_preprocess_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = ArrayPictures(*tiny.pictures(26))
    whole = Preprocess.fit(pictures)
    monkeypatch.setattr(preprocess_module, "AT_ONCE", 3 * 32 * 32 * 3)  # 3 pictures at a time
    parts = Preprocess.fit(pictures)
    assert parts.mean == pytest.approx(whole.mean, rel=1e-12)
    assert parts.std == pytest.approx(whole.std, rel=1e-12)
    monkeypatch.setattr(preprocess_module, "SAMPLE", 9)  # every third
    read: list[int] = []
    monkeypatch.setattr(
        ArrayPictures, "read", lambda self, i: read.extend(i) or self.images[list(i)]
    )
    Preprocess.fit(pictures)
    assert read == list(range(0, 26, 3))


def test_turning_keeps_the_shape_of_what_is_in_an_oblong_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    still(monkeypatch, "ANGLE")
    images = torch.zeros(64, 1, 32, 96)
    images[:, :, 14:18, 60:64] = 1  # 13.5 right of the middle
    light = moved(images, "affine", 0)[:, 0]
    light = light / light.sum((1, 2), keepdim=True)
    y = (light.sum(2) * torch.arange(32.0)).sum(1) - 15.5
    x = (light.sum(1) * torch.arange(96.0)).sum(1) - 47.5
    assert torch.allclose(torch.hypot(x, y), torch.tensor(14.0), atol=0.3)
    assert 0.2 < torch.atan2(y, x).abs().max() <= math.radians(15) + 0.01


def test_preprocess_of_pictures_without_contrast_stays_finite() -> None:
    images = torch.full((4, 32, 32, 1), 7, dtype=torch.uint8)
    preprocess = Preprocess.fit(ArrayPictures(images, torch.tensor([0, 1, 0, 1])))
    assert preprocess(unit(images)).isfinite().all()


# Testing


def test_evaluate_counts_what_is_taken_for_what() -> None:
    class Fixed(nn.Module):
        """Takes every picture for the class written into its first pixel."""

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(x[:, 0, 0, 0].round().long(), 3) * 5.0

    guesses = torch.tensor([0, 1, 2, 2, 1, 1, 0])
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    images = torch.zeros(7, 32, 32, 1, dtype=torch.uint8)
    images[:, 0, 0, 0] = guesses
    identity = Preprocess((32, 32), (0.0,), (1 / 255,))
    found = evaluate(Fixed(), ArrayPictures(images, labels), identity, 3, torch.device("cpu"))
    assert found.confusion.tolist() == [[2, 0, 1], [0, 2, 0], [0, 1, 1]]
    assert found.accuracy == 5 / 7
    right, wrong = math.log(math.exp(5) + 2) - 5, math.log(math.exp(5) + 2)
    assert found.loss == pytest.approx((5 * right + 2 * wrong) / 7, rel=1e-6)


def test_the_log_says_what_happened() -> None:
    trainer = Trainer(tiny.model(), tiny.data(), RECIPE)
    evaluation = trainer.run()
    assert [(e.epoch, e.step) for e in trainer.history] == [(1, 3), (2, 6), (3, 9)]
    last = trainer.history[-1]
    assert (last.test_loss, last.test_accuracy) == (evaluation.loss, evaluation.accuracy)
    assert 0 <= last.train_accuracy <= 1 and last.seconds > 0
    assert last.img_per_s == pytest.approx(24 / last.seconds)
    lines = log_csv(trainer.history).decode().splitlines()
    assert lines[0].split(",")[:4] == ["epoch", "step", "lr", "train_loss"]
    assert len(lines) == 4 and lines[3].startswith("3,9,")


def test_train_loss_is_the_mean_over_the_epoch() -> None:
    trainer = Trainer(tiny.model(), tiny.data(), RECIPE)
    losses: list[float] = []
    trainer.run(lambda: losses.append(trainer.loss.item()))
    means = np.array(losses, np.float32).reshape(3, 3).mean(1)
    assert [e.train_loss for e in trainer.history] == pytest.approx(means.tolist(), rel=1e-5)


# Going on from where a run stood


@pytest.mark.parametrize("step", [1, 3, 5, 6])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_run_taken_up_ends_in_the_same_bits(tmp_path: Path, step: int, amp: str) -> None:
    recipe = replace(RECIPE, amp=amp, optimizer="sgd" if step == 3 else "adamw")
    whole = Trainer(tiny.model(), tiny.data(), recipe)
    whole.run()

    stopped = Trainer(tiny.model(), tiny.data(), recipe)
    with pytest.raises(Stop):
        stopped.run(stop_after(stopped, step))
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    torch.rand(5)  # what else draws from torch's generator meanwhile does not matter

    taken_up = Trainer(tiny.model(seed=1), tiny.data(), recipe)
    taken_up.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    taken_up.run()
    assert_same_bits(weights(whole), weights(taken_up))
    ours, theirs = (
        [replace(epoch, seconds=0, img_per_s=0) for epoch in trainer.history]
        for trainer in (taken_up, whole)
    )
    assert ours == theirs


def test_the_seed_decides_the_weights() -> None:
    ends = []
    for seed in (0, 0, 1):
        trainer = Trainer(tiny.model(), tiny.data(), replace(RECIPE, seed=seed))
        trainer.run()
        ends.append(weights(trainer))
    assert_same_bits(ends[0], ends[1])
    assert not torch.equal(ends[0]["0.conv.weight"], ends[2]["0.conv.weight"])


def test_a_finished_run_taken_up_is_tested_again_only() -> None:
    whole = Trainer(tiny.model(), tiny.data(), RECIPE)
    evaluation = whole.run()
    again = Trainer(tiny.model(), tiny.data(), RECIPE)
    again.load_state_dict(whole.state_dict())
    found = again.run(lambda: pytest.fail("took a step"))
    assert found.loss == evaluation.loss


def test_workers_read_the_same_and_name_a_damaged_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(folder_module, "IN_MEMORY", 0)
    images, labels = tiny.pictures(30)
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / tiny.CLASSES[int(label)]).mkdir(exist_ok=True)
        image.fromarray(pixels.numpy()).save(tmp_path / tiny.CLASSES[int(label)] / f"{i:02}.png")
    ends = []
    for workers in (0, 2):
        trainer = Trainer(tiny.model(), load(tmp_path), RECIPE, workers=workers)
        trainer.run()
        ends.append(weights(trainer))
    assert_same_bits(*ends)
    trainer = Trainer(tiny.model(), load(tmp_path), RECIPE, workers=2)
    trained_on = trainer.data.train.paths[0]  # type: ignore[attr-defined]
    trained_on.write_bytes(trained_on.read_bytes()[:100])
    with pytest.raises(DataError, match=f"^{trained_on}: not a picture[^\n]*$"):
        trainer.run()


# Checkpoints


def checkpoint() -> Checkpoint:
    data, network = tiny.data(), Network("resnet18", "torchvision", 3, 3)
    trainer = Trainer(network.build(), data, replace(RECIPE, epochs=1, batch_size=4))
    with pytest.raises(Stop):
        trainer.run(stop_after(trainer, 1))
    return Checkpoint(
        network=network,
        recipe=trainer.recipe,
        preprocess=trainer.preprocess,
        classes=data.classes,
        source=data.source,
        fingerprint=data.fingerprint,
        wall=1.5,
        state=trainer.state_dict(),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    path = tmp_path_factory.mktemp("saved") / "checkpoint.pt"
    made = checkpoint()
    made.save(path)
    return made, path


def test_a_checkpoint_comes_back_as_it_was(saved: tuple[Checkpoint, Path]) -> None:
    made, path = saved
    for read in (Checkpoint.load(path), Checkpoint.load(path.parent)):
        for name, value in vars(made).items():
            if name != "state":
                assert getattr(read, name) == value, name
        assert_same_bits(read.state["model"], made.state["model"])
        assert_same_bits(read.model().state_dict(), made.state["model"])
        assert not read.model().training
        trainer = Trainer(read.network.build(), tiny.data(), read.recipe)
        trainer.load_state_dict(read.state)
        optimized = {id(p) for p in trainer.optimizer.param_groups[0]["params"]}
        assert optimized == {id(p) for p in trainer.model.parameters()}


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "executed")


def test_a_hostile_pickle_is_refused(tmp_path: Path, saved: tuple[Checkpoint, Path]) -> None:
    trap = Hostile(tmp_path / "executed")
    content = torch.load(saved[1], weights_only=True) | {"classes": trap}
    torch.save(content, tmp_path / "new.pt")
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(trap))
    for name in ("new.pt", "old.pt", "bare.pt"):
        with pytest.raises(CheckpointError, match=f"^[^\n]*{name}: refused[^\n]*$"):
            Checkpoint.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(name)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (without("format"), "not a checkpoint of fusedres train"),
        (without("classes"), "damaged"),
        (lambda c: c["network"].update(model="resnet50"), "damaged"),
        (lambda c: c["network"].update(model="os.system"), "damaged"),
        (lambda c: c["network"].update(num_classes=4), "damaged"),
        (lambda c: c["recipe"].update(epochs=-1), "damaged: epochs"),
        (lambda c: c["state"]["model"].pop("fc.bias"), "damaged"),
        (lambda c: c.update(surprise=1), "damaged"),
        (lambda c: c.update(classes=c["classes"][1:]), "damaged: classes, mean and std"),
        (lambda c: c["preprocess"].update(mean=(0.5,)), "damaged: classes, mean and std"),
        (lambda c: c["preprocess"].update(size=("32", 32)), "damaged: size, mean, std"),
        (lambda c: c.update(source=3), "damaged: classes, source"),
    ],
)
def test_a_checkpoint_that_makes_no_sense_is_refused(
    tmp_path: Path, saved: tuple[Checkpoint, Path], change: Any, part: str
) -> None:
    content = torch.load(saved[1], weights_only=True)
    change(content)
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=f"^[^\n]*a.pt: {part}[^\n]*$"):
        Checkpoint.load(tmp_path / "a.pt")


def test_files_that_are_no_checkpoints(tmp_path: Path, saved: tuple[Checkpoint, Path]) -> None:
    whole = saved[1].read_bytes()
    for name, content in (
        ("half.pt", whole[: len(whole) // 2]),
        ("empty.pt", b""),
        ("text.pt", b"hello\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"^[^\n]*{name}: refused[^\n]*$"):
            Checkpoint.load(tmp_path / name)
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2] ^= 1  # of a weight
    (tmp_path / "spoilt.pt").write_bytes(spoilt)
    with pytest.raises(CheckpointError, match=r"spoilt\.pt: damaged: .* is not what was written"):
        Checkpoint.load(tmp_path / "spoilt.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Checkpoint.load(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: no such checkpoint"):
        Checkpoint.load(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of fusedres train"):
        Checkpoint.load(tmp_path / "list.pt")


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, saved: tuple[Checkpoint, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(saved[1].read_bytes())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    expected = "cannot write: No space left on device; the checkpoint there is the one of before"
    with pytest.raises(CheckpointError, match=expected):
        replace(saved[0], wall=2.0).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert Checkpoint.load(path).wall == 1.5
