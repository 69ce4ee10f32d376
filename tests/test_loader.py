"""What a step is fed with: which part of which picture, by whom it is read, and how fast a step is
without.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from fusedres.cli import main
from fusedres.training import DataError, Preprocess, Recipe, Trainer, TrainingError, load
from fusedres.training.data import ArrayPictures, FilePictures, Share, read_picture
from fusedres.training.data.crops import AREA, DRAWS, RATIO, Box, middle, random_box
from fusedres.training.data.pictures import Paths, read_part
from fusedres.training.loader import Batches, Loader, make_loader, seeded
from fusedres.training.preprocess import augmented, draw, unit
from fusedres.training.processes import Processes
from fusedres.training.synthetic import synthetic

Image = pytest.importorskip("PIL.Image")
CPU = torch.device("cpu")


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture [H, W, 3] in which every place looks different."""
    y, x = np.mgrid[:height, :width]
    planes = (255 * x / width, 255 * y / height, 127 + 120 * np.sin(x / 17 + seed) * np.cos(y / 13))
    return np.stack(planes, 2).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pictures of two classes, of different sizes, as JPEG."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(20):
        path = root / f"class {i % 2}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(texture(60 + i, 90 - i, i)).save(path, quality=95)
    return root


# --- parts of pictures ----------------------------------------------------------------------------


def boxes(size: tuple[int, int], count: int = 4000) -> list[Box]:
    return [random_box(size, row) for row in draw("crop+flip", count, seeded(1)).tolist()]


def test_parts_are_of_every_area_and_shape_at_every_place() -> None:
    height, width = 300, 400
    found = boxes((height, width))
    areas = np.array([(b.right - b.left) * (b.bottom - b.top) for b in found])
    ratios = np.array([(b.right - b.left) * width / ((b.bottom - b.top) * height) for b in found])
    assert areas.min() >= AREA[0] - 1e-9 and areas.max() <= 1
    assert ratios.min() >= RATIO[0] - 1e-9 and ratios.max() <= RATIO[1] + 1e-9
    assert areas.min() < 0.1 and areas.max() > 0.95 and 0.4 < areas.mean() < 0.55
    assert abs(np.log(ratios).mean()) < 0.05 and np.log(ratios).std() > 0.1
    for side in ("left", "top"):
        places = np.array([getattr(b, side) for b in found])
        assert 0 <= places.min() < 0.01 and places.max() > 0.6
    assert all(b.right <= 1 + 1e-9 and b.bottom <= 1 + 1e-9 for b in found)
    assert 0.45 < np.mean([b.mirrored for b in found]) < 0.55


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10)])
def test_no_part_fits_into_a_strip(size: tuple[int, int]) -> None:
    """Then it is the largest of an allowed shape, around the middle."""
    large = next(row for row in draw("crop+flip", 50, seeded(0)).tolist() if min(row[:20:2]) > 0.08)
    box = random_box(size, large)
    height, width = (box.bottom - box.top) * size[0], (box.right - box.left) * size[1]
    assert max(height, width) / min(height, width) == pytest.approx(4 / 3)
    assert min(height, width) == pytest.approx(10)
    assert (box.left + box.right, box.top + box.bottom) == pytest.approx((1, 1))


def test_the_middle() -> None:
    assert middle((40, 80), (40, 40)) == pytest.approx((0.25, 0, 0.75, 1, False))
    assert middle((80, 40), (32, 64)) == pytest.approx((0, 0.375, 1, 0.625, False))
    assert middle((256, 256), (224, 224), 0.875) == pytest.approx(
        (1 / 16,) * 2 + (15 / 16,) * 2 + (0,)
    )


def test_a_part_of_a_file_is_what_the_box_says(tmp_path: Path) -> None:
    whole = texture(120, 160)
    Image.fromarray(whole).save(tmp_path / "a.png")
    for row in draw("crop+flip", 20, seeded(3)).tolist():
        box = random_box((120, 160), row)
        part = read_part(tmp_path / "a.png", (32, 48), row).float()
        if box.mirrored:
            part = part.flip(1)
        # red grows from left to right, green from top to bottom
        left, right = part[:, 0, 0].mean() / 255, part[:, -1, 0].mean() / 255
        top, bottom = part[0, :, 1].mean() / 255, part[-1, :, 1].mean() / 255
        ours = torch.stack((left, top, right, bottom))
        margin = torch.tensor([(box.right - box.left) / 96, (box.bottom - box.top) / 64])
        expected = torch.tensor(box[:4]) + torch.cat((margin, -margin))
        assert (ours - expected).abs().max() < 0.012, box


def test_parts_of_a_picture_on_its_side(tmp_path: Path) -> None:
    upright = Image.fromarray(texture(90, 130))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    (row,) = draw("crop+flip", 1, seeded(4)).tolist()
    assert torch.equal(
        read_part(tmp_path / "turned.png", (40, 40), row),
        read_part(tmp_path / "upright.png", (40, 40), row),
    )


def test_arrays_and_files_show_the_same_parts(tmp_path: Path) -> None:
    """Of arrays on the device, of files as they are read; scaled up, so that both interpolate."""
    images = np.stack([texture(48, 48, i) for i in range(6)])
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    draws = draw("crop+flip", 6, seeded(5))
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    files = FilePictures(paths, torch.zeros(6).long(), (48, 48)).read_share(
        Share(list(range(6)), draws)
    )
    arrays = augmented(unit(torch.from_numpy(images)), "crop+flip", draws) * 255
    off = (arrays.permute(0, 2, 3, 1) - files.float())[:, 2:-2, 2:-2].abs()
    assert off.mean() < 1 and off.max() < 8


def test_a_large_photograph_is_decoded_at_a_fraction(tmp_path: Path) -> None:
    Image.fromarray(texture(1600, 2000)).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        image.draft(None, (128, 128))
        assert image.size == (250, 200)  # as this picture would be for 64x64
    small = read_picture(tmp_path / "a.jpg", (64, 64)).float()
    whole = Image.fromarray(texture(1600, 2000)).crop((200, 0, 1800, 1600)).resize((64, 64), 3)
    assert (small - torch.from_numpy(np.array(whole)).float()).abs().mean() < 2
    with pytest.MonkeyPatch.context() as patch:
        decoded: list[tuple[int, int]] = []
        convert = Image.Image.convert
        patch.setattr(
            Image.Image,
            "convert",
            lambda self, mode: (decoded.append(self.size), convert(self, mode))[1],
        )
        read_picture(tmp_path / "a.jpg", (64, 64))
        read_part(tmp_path / "a.jpg", (64, 64), [0.9] * DRAWS)  # most of it
        read_part(tmp_path / "a.jpg", (64, 64), [0.0] * DRAWS)  # 8% of it
    assert [max(size) for size in decoded] == [250, 250, 1000]  # twice what is wanted, or more


def test_the_share_that_is_kept_around_the_middle(tmp_path: Path) -> None:
    Image.fromarray(texture(100, 100)).save(tmp_path / "a.png")
    whole, half = (read_picture(tmp_path / "a.png", (50, 50), crop=c).float() for c in (1.0, 0.5))
    assert (half[:, :, :2] - torch.from_numpy(texture(100, 100))[25:75, 25:75, :2]).abs().max() <= 1
    assert whole[:, 0, 0].mean() < 5 < 60 < half[:, 0, 0].mean()
    for wrong in (0.0, 1.5, math.nan):
        with pytest.raises(DataError, match="crop must be above 0 and at most 1"):
            load("digits", crop=wrong)


def test_many_paths_in_one_buffer() -> None:
    names = ["a", "ü/b c", "", "/" + "x" * 300]
    paths = Paths(map(Path, names))
    assert list(paths) == [Path(name) for name in names]
    assert (len(paths), paths[-1], paths[1:3]) == (4, Path(names[3]), [Path(n) for n in names[1:3]])
    with pytest.raises(IndexError):
        paths[4]
    odd = Path("/\udcff")  # a name that is no text
    assert Paths([odd])[0] == odd and len(Paths([])) == 0


# --- who reads what -------------------------------------------------------------------------------


def test_processes_share_the_batches_of_one() -> None:
    def epoch(rank: int, count: int) -> list[Share]:
        return list(Batches(26, 8, 7, Processes(rank, count).share(8), True))

    (alone,) = [epoch(0, 1)]
    for count in (2, 3):
        parts = [epoch(rank, count) for rank in range(count)]
        for step, whole in enumerate(alone):
            assert whole.draws is not None
            shares = [part[step] for part in parts]
            assert list(itertools.chain(*(s.index for s in shares))) == whole.index
            assert torch.equal(
                torch.cat([s.draws for s in shares if s.draws is not None]), whole.draws
            )
    assert not torch.equal(alone[0].draws, alone[1].draws)  # type: ignore[arg-type]


def read(loader: Loader) -> list[tuple[Tensor, Tensor]]:
    return list(loader)


@pytest.mark.parametrize("crops", [False, True])
def test_workers_read_what_one_process_reads(folder: Path, crops: bool) -> None:
    data = load(folder, 40, hold=False)
    batches = Batches(len(data.train), 4, 0, slice(0, 4), crops)
    alone, two = (
        read(make_loader(data.train, batches, CPU, batch_size=4, workers=workers))
        for workers in (0, 2)
    )
    assert len(alone) == len(two) == 4
    for (a, y), (b, z) in zip(alone, two, strict=True):
        assert a.shape == (4, 40, 40, 3) and a.dtype == torch.uint8
        assert torch.equal(a, b) and torch.equal(y, z)
    whole = torch.cat([data.train.read(share.index) for share in batches])
    assert torch.equal(torch.cat([images for images, _ in alone]), whole) != crops


def test_pictures_to_take_parts_of_are_not_held(folder: Path) -> None:
    assert isinstance(load(folder, 40).train, ArrayPictures)
    data = load(folder, 40, hold=False)
    assert isinstance(data.train, FilePictures) and isinstance(data.test, ArrayPictures)


def test_training_on_parts_takes_them_as_they_are_read(folder: Path) -> None:
    data = load(folder, 40, hold=False)
    recipe = Recipe(epochs=1, batch_size=4, augment="crop+flip", amp="off")
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 40, 2))
    trainer = Trainer(model, data, recipe, workers=0)
    model.register_forward_pre_hook(
        lambda m, inputs: seen.append(inputs[0]) if m.training else None
    )
    trainer.run()
    assert len(seen) == 4
    trainer.batches.seek(0, 0)
    expected = [trainer.preprocess.frames(images, torch.float32) for images, _ in trainer.loader]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_a_loader_that_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(folder, 40, hold=False)
    with pytest.raises(TrainingError, match="loader must be one of workers, dali, got 'ffcv'"):
        make_loader(data.train, [], CPU, batch_size=1, kind="ffcv")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(TrainingError, match=r"--loader dali needs NVIDIA DALI .*fusedres\[dali\]"):
        make_loader(data.train, [], CPU, batch_size=1, kind="dali")


@pytest.mark.peers
def test_dali_reads_what_workers_read(folder: Path, tmp_path: Path) -> None:
    """The same pictures and the same parts, twice over; and it names a picture that is damaged."""
    data = load(folder, 40, hold=False)
    assert isinstance(data.train, FilePictures)
    for crops in (False, True):
        batches = Batches(len(data.train), 4, 0, slice(0, 4), crops)
        ours, dali = (
            make_loader(data.train, batches, CPU, batch_size=4, kind=k, workers=2)
            for k in ("workers", "dali")
        )
        for epoch in range(2):
            batches.seek(epoch, epoch)
            pairs = list(zip(ours, dali, strict=True))
            assert len(pairs) == 4 - epoch
            for (a, y), (b, z) in pairs:
                assert b.dtype == torch.uint8 and a.shape == b.shape and torch.equal(y, z)
                off = (a.float() - b.float()).abs()
                assert off.mean() < 6, (epoch, off.mean())
    copies = [tmp_path / f"{i}.jpg" for i in range(4)]
    for copy, path in zip(copies, data.train.paths, strict=False):
        copy.write_bytes(path.read_bytes())
    content = copies[2].read_bytes()
    pictures = FilePictures(copies, torch.zeros(4).long(), (40, 40))
    shares = [Share([0, 1, 2, 3])]
    loader = make_loader(pictures, shares, CPU, batch_size=4, kind="dali", workers=2)
    for damage in (content[: len(content) // 2], b"damaged", b""):
        copies[2].write_bytes(damage)
        with pytest.raises(DataError, match=r"2\.jpg: not a picture that can be read"):
            read(loader)
    copies[2].unlink()
    with pytest.raises(DataError, match=r"2\.jpg: no such file"):
        read(loader)
    copies[2].write_bytes(content)
    assert len(read(loader)) == 1


@pytest.mark.peers
def test_dali_after_an_epoch_that_was_left(tmp_path: Path) -> None:
    """Every picture keeps its label; whatever the file is, too."""
    suffixes = ["jpg", "png", "gif", "bmp", "webp", "tif"]
    paths = [tmp_path / f"{i}.{suffixes[i % 6]}" for i in range(24)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((40, 40, 3), 10 * i, np.uint8)).save(path)
    pictures = FilePictures(paths, torch.arange(24), (32, 32))
    batches = Batches(24, 4, 0, slice(0, 4), True)
    loader = make_loader(pictures, batches, CPU, batch_size=4, kind="dali", workers=2)
    left = iter(loader)
    next(left)
    left.close()  # type: ignore[attr-defined]
    for epoch in range(2):
        batches.seek(epoch, 0)
        seen = read(loader)
        assert len(seen) == 6
        for images, labels in seen:
            off = images.float().mean((1, 2, 3)) - 10 * labels
            assert off.abs().max() < 3, (epoch, labels)


# --- on the device --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pictures_are_standardised_in_one_pass(dtype: torch.dtype) -> None:
    images, _ = tiny.pictures(4)
    preprocess = Preprocess((32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    found = preprocess.frames(images, dtype)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    truth = preprocess(unit(images, torch.float64))
    allowed = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    assert ((found.double() - truth).abs() <= allowed * truth.abs().clamp(min=1)).all()


@pytest.mark.parametrize("augment", ["affine", "none"])
def test_fp64_is_fp64_throughout(augment: str) -> None:
    seen: list[torch.dtype] = []
    trainer = Trainer(tiny.model(), tiny.data(), Recipe(epochs=1, dtype="fp64", augment=augment))
    trainer.model.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].dtype))
    trainer.run()
    assert set(seen) == {torch.float64} == {p.dtype for p in trainer.model.parameters()}


def test_the_rate_falls_by_steps() -> None:
    recipe = Recipe(optimizer="sgd", lr=0.1, schedule="step", warmup=0.0, nesterov=False)
    optimizer = recipe.make_optimizer(nn.Linear(1, 1))
    assert not optimizer.defaults["nesterov"]

    def rates(recipe: Recipe, steps: int) -> Iterator[float]:
        optimizer = recipe.make_optimizer(nn.Linear(1, 1))
        schedule = recipe.make_schedule(optimizer, steps)
        for _ in range(steps):
            yield schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()

    assert list(rates(recipe, 9)) == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 3)
    assert list(rates(recipe, 1)) == [0.1]
    rise = list(rates(replace(recipe, warmup=0.25), 12))
    assert rise[:4] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1])
    with pytest.raises(TrainingError, match="schedule must be one of cosine, step"):
        replace(recipe, schedule="linear")
    with pytest.raises(TrainingError, match="dtype fp64 needs amp off, got amp bf16"):
        Recipe(dtype="fp64", amp="bf16")


# --- the step alone -------------------------------------------------------------------------------


def test_synthetic_steps_are_those_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Tensor, Tensor]] = []
    step = Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda self, *batch: (taken.append(batch), step(self, *batch))[1]
    )
    speed = synthetic(Recipe(batch_size=4, augment="none"), model="resnet18", size=32, steps=2)
    assert len(taken) == 12 and all(batch[0] is taken[0][0] for batch in taken)  # nothing is copied
    assert taken[0][0].shape == (4, 32, 32, 3) and taken[0][0].dtype == torch.uint8
    assert (speed.batch_size, speed.size, speed.steps, speed.processes) == (4, 32, 2, 1)
    assert speed.img_per_s == pytest.approx(4 * 1e3 / speed.step_ms) and speed.memory_gib == 0


def test_the_command_says_how_fast(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "resnet18", "--image-size", "32", "--batch-size", "2", "--steps", "1"]
    assert main(["train", "--synthetic", *options, "--amp", "off"]) == 0
    said = capsys.readouterr().out
    assert "img/s" in said and "2 pictures of 32x32, 1000 classes, float32, in one process" in said


@pytest.mark.parametrize("other", [["--data", "digits"], ["--resume"]])
def test_synthetic_takes_no_data(other: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--synthetic", *other]) == 2
    assert f"--synthetic and {other[0]} exclude each other" in capsys.readouterr().err
