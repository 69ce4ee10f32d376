"""Pictures from every source, and what a user reads when one of them is wrong."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CLASSES, pictures, write_npz

from fusedres.training import DataError, load
from fusedres.training.data import Share, read_picture
from fusedres.training.data import folder as folder_module

h5py = pytest.importorskip("h5py")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")

Arrays = dict[str, Any]


def arrays(names: tuple[str, str, str, str], train: int = 12, test: int = 6) -> Arrays:
    x, y = pictures(train)
    u, v = pictures(test, seed=1)
    return dict(zip(names, (x.numpy(), y.numpy(), u.numpy(), v.numpy()), strict=True))


SIGNS = ("train_set_x", "train_set_y", "test_set_x", "test_set_y")
KERAS = ("x_train", "y_train", "x_test", "y_test")
MEDMNIST = ("train_images", "train_labels", "test_images", "test_labels")


def write_hdf5(path: Path, content: Arrays) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in content.items():
            file[name] = value
    return path


def write_pair(folder: Path, classes: Any = (b"blue", b"green", b"red")) -> Path:
    content = arrays(SIGNS)
    for part in ("train", "test"):
        own = {name: value for name, value in content.items() if name.startswith(part)}
        write_hdf5(folder / f"{part}_hands.h5", own | {"list_classes": np.array(classes)})
    return folder / "train_hands.h5"


def write_pictures(root: Path, count: int = 6, side: int = 40, suffix: str = ".png") -> Path:
    images, labels = pictures(count, side=side)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        target = root / CLASSES[int(label)]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(target / f"{i}{suffix}")
    return root


def assert_tiny(data: Any, train: int = 12, test: int = 6) -> None:
    assert (len(data.train), len(data.test), data.classes) == (train, test, CLASSES)
    x, y = pictures(train)
    assert torch.equal(data.train.read(range(train)), x)
    assert torch.equal(data.train.labels, y)
    u, v = pictures(test, seed=1)
    assert torch.equal(data.test.read(range(test)), u)
    assert torch.equal(data.test.labels, v)


def test_hdf5_pair_by_file_and_by_folder(tmp_path: Path) -> None:
    train = write_pair(tmp_path)
    (tmp_path / "README.md").write_text("not data")
    assert_tiny(load(train))
    assert_tiny(load(str(tmp_path)))


def test_labels_may_be_a_row_and_class_names_numbers(tmp_path: Path) -> None:
    content = arrays(SIGNS) | {"list_classes": np.arange(3)}
    content["train_set_y"] = content["train_set_y"][None]
    content["test_set_y"] = content["test_set_y"][:, None]
    data = load(write_hdf5(tmp_path / "both.h5", content))
    assert data.classes == ("0", "1", "2")
    assert torch.equal(data.train.labels, pictures(12)[1])
    assert torch.equal(data.test.labels, pictures(6, seed=1)[1])


@pytest.mark.parametrize("names", [SIGNS, KERAS, MEDMNIST])
def test_npz_by_any_of_three_namings(tmp_path: Path, names: tuple[str, str, str, str]) -> None:
    np.savez(tmp_path / "a.npz", class_names=np.array(CLASSES), **arrays(names))
    assert_tiny(load(tmp_path / "a.npz"))


def test_floats_from_0_to_1_are_brought_to_bytes(tmp_path: Path) -> None:
    content = arrays(KERAS)
    for name in ("x_train", "x_test"):
        content[name] = content[name] / np.float32(255)
    np.savez(tmp_path / "a.npz", classes=np.array(CLASSES), **content)
    assert_tiny(load(tmp_path / "a.npz"))


def test_floats_that_overshoot_their_range_a_little_are_cut(tmp_path: Path) -> None:
    content = arrays(KERAS)
    for name in ("x_train", "x_test"):
        content[name] = content[name] / np.float32(255)
        content[name][0, 0, 0] = (1.002, -0.003, 0.5)
    np.savez(tmp_path / "a.npz", classes=np.array(CLASSES), **content)
    data = load(tmp_path / "a.npz")
    assert data.train.read([0])[0, 0, 0].tolist() == [255, 0, 128]
    assert torch.equal(data.train.read([1]), pictures(12)[0][1:2])


def test_small_grey_pictures_grow_to_what_the_network_takes(tmp_path: Path) -> None:
    content = arrays(KERAS)
    for name in ("x_train", "x_test"):
        content[name] = content[name][:, :28, :28, 0]
    np.savez(tmp_path / "a.npz", **content)
    data = load(tmp_path / "a.npz")
    assert (data.train.size, data.train.channels, data.classes) == ((32, 32), 1, ("0", "1", "2"))
    assert load(tmp_path / "a.npz", size=48).train.size == (48, 48)
    assert load(tmp_path / "a.npz", size=(48, 64)).train.size == (48, 64)


def test_without_a_test_part_a_fifth_of_each_class_is_held_out(tmp_path: Path) -> None:
    x, y = pictures(60)
    np.savez(tmp_path / "a.npz", x_train=x.numpy(), y_train=y.numpy())
    data, again = load(tmp_path / "a.npz"), load(tmp_path / "a.npz")
    assert data.test.labels.bincount().tolist() == [4, 4, 4]
    assert data.train.labels.bincount().tolist() == [16, 16, 16]
    everything = torch.cat([data.train.read(range(48)), data.test.read(range(12))])
    assert len(everything.flatten(1).unique(dim=0)) == 60  # no picture in both, none lost
    assert torch.equal(data.test.read(range(12)), again.test.read(range(12)))


def test_digits() -> None:
    data = load("digits")
    assert len(data.train) + len(data.test) == 1797
    assert data.classes == tuple("0123456789")
    picture = data.train.read([0])
    assert (picture.shape, picture.dtype) == ((1, 32, 32, 3), torch.uint8)
    assert 200 < picture.max() <= 255
    assert load("digits", size=40).test.size == (40, 40)


@pytest.mark.parametrize(
    ("train_name", "test_name"), [("train", "test"), ("train", "val"), ("Training", "Testing")]
)
def test_folder_of_train_and_test(tmp_path: Path, train_name: str, test_name: str) -> None:
    write_pictures(tmp_path / train_name)
    write_pictures(tmp_path / test_name, count=3)
    (tmp_path / train_name / "red" / "notes.txt").write_text("not a picture")
    (tmp_path / train_name / ".hidden").mkdir()
    data = load(tmp_path)
    assert (data.classes, data.train.size) == (CLASSES, (40, 40))
    images, labels = pictures(6, side=40)
    order = labels.argsort(stable=True)  # by class, then by name
    assert torch.equal(data.train.read(range(6)), images[order])
    assert torch.equal(data.train.labels, labels[order])
    assert len(data.test) == 3


@pytest.mark.parametrize("inside", ["", "train"])
def test_folder_without_a_test_part(tmp_path: Path, inside: str) -> None:
    write_pictures(tmp_path / inside, count=30)
    data = load(tmp_path)
    assert data.train.labels.bincount().tolist() == [8, 8, 8]
    assert data.test.labels.bincount().tolist() == [2, 2, 2]


def test_a_class_may_be_called_train_and_have_folders_in_it(tmp_path: Path) -> None:
    write_pictures(tmp_path, count=30)
    (tmp_path / "red").rename(tmp_path / "train")
    (tmp_path / "blue" / "more").mkdir()
    for path in list((tmp_path / "blue").glob("*.png"))[:5]:
        path.rename(tmp_path / "blue" / "more" / path.name)
    data = load(tmp_path)
    assert data.classes == ("blue", "green", "train")
    assert data.train.labels.bincount().tolist() == [8, 8, 8]


def test_the_size_of_pictures_is_that_of_upright_and_not_of_huge_ones(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size in (("tall", (80, 40)), ("huge", (600, 600))):
        for label in ("a", "b"):
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(3):
                path = tmp_path / name / label / f"{i}.png"
                Image.new("RGB", size, (i, 0, 0)).save(path, exif=exif)
    assert load(tmp_path / "tall").train.size == (80, 40)
    assert load(tmp_path / "huge").train.size == (224, 224)


def test_a_folder_called_digits_is_not_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "digits", count=30)
    monkeypatch.chdir(tmp_path)
    data = load("./digits")
    assert (data.classes, data.source) == (CLASSES, str(tmp_path / "digits"))
    assert load("digits").source == "digits"


def test_the_fingerprint_tells_other_pictures_and_other_labels(tmp_path: Path) -> None:
    content = arrays(KERAS)
    prints = set()
    for name, change in (("x_train", 1), ("y_test", 1), ("x_test", 2), ("x_test", 0)):
        values = (content[name].astype(int) + change) % (3 if name[0] == "y" else 256)
        np.savez(tmp_path / "a.npz", classes=np.array(CLASSES), **content | {name: values})
        prints.add(load(tmp_path / "a.npz").fingerprint)
    assert len(prints) == 4


def test_pictures_that_differ_in_size_become_224_or_what_is_asked_for(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    Image.new("RGB", (50, 60)).save(tmp_path / "red" / "other.png")
    assert load(tmp_path).train.size == (224, 224)
    assert load(tmp_path, size=36).train.size == (36, 36)


def test_large_folders_are_read_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, count=12)
    held = load(tmp_path)
    monkeypatch.setattr(folder_module, "IN_MEMORY", 0)
    lazy = load(tmp_path)
    assert (type(held.train).__name__, type(lazy.train).__name__) == (
        "ArrayPictures",
        "FilePictures",
    )
    assert lazy.fingerprint == held.fingerprint
    assert torch.equal(lazy.train.read(range(9)), held.train.read(range(9)))
    (tmp_path / "red" / "2.png").write_bytes(b"damaged")
    answers = [lazy.train.__getitems__(Share([i])) for i in range(len(lazy.train))] + [
        lazy.test.__getitems__(Share([i])) for i in range(len(lazy.test))
    ]
    assert sum(isinstance(answer, DataError) for answer in answers) == 1


def test_a_picture_is_turned_upright_scaled_and_cropped_around_its_middle(tmp_path: Path) -> None:
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = (255, 128, 0)
    picture = Image.fromarray(wide)
    picture.save(tmp_path / "wide.png")
    middle = read_picture(tmp_path / "wide.png", (40, 40))
    assert torch.equal(middle.unique(dim=0).unique(dim=1), torch.tensor([[[255, 128, 0]]]).byte())
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    wide[0, :] = 255
    Image.fromarray(wide).save(tmp_path / "turned.png", exif=exif)
    turned = read_picture(tmp_path / "turned.png", (80, 40))
    assert (turned[:, -1] == 255).all() and not (turned[:, 0] == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (40, 40), (255, 255, 255)).convert(mode).save(path)
    assert (read_picture(path, (32, 32)) == 255).all()
    assert read_picture(path, (32, 32), channels=1).shape == (32, 32, 1)


# Errors: one line, that names the file


def broken(change: Callable[[Arrays], object]) -> Callable[[Path], Path]:
    """An .npz with something wrong in it."""

    def write(folder: Path) -> Path:
        content = arrays(KERAS) | {"classes": np.array(CLASSES)}
        change(content)
        np.savez(folder / "a.npz", **content)
        return folder / "a.npz"

    return write


def set_to(name: str, value: Any) -> Callable[[Path], Path]:
    return broken(lambda content: content.update({name: value}))


def truncated_hdf5(folder: Path) -> Path:
    path = write_pair(folder)
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def truncated_npz(folder: Path) -> Path:
    path = write_npz(folder / "a.npz")
    path.write_bytes(path.read_bytes()[:-500])
    return path


def damaged_npz(folder: Path) -> Path:
    path = write_npz(folder / "a.npz")
    content = bytearray(path.read_bytes())
    content[5000:5100] = bytes(100)
    path.write_bytes(content)
    return path


def bare_array(folder: Path) -> Path:
    np.save(folder / "a.npy", np.zeros(3))
    return (folder / "a.npy").rename(folder / "a.npz")


def empty_hdf5_array(folder: Path) -> Path:
    content = arrays(SIGNS) | {"train_set_y": h5py.Empty("int64")}
    return write_hdf5(folder / "a.h5", content)


def parts_by_other_names(folder: Path) -> Path:
    write_pictures(folder / "first")
    write_pictures(folder / "second")
    return folder


def two_sets_in_a_folder(folder: Path) -> Path:
    train = write_pair(folder)
    (folder / "train_cats.h5").write_bytes(train.read_bytes())
    return folder


def damaged_picture(folder: Path) -> Path:
    write_pictures(folder, count=30)
    path = folder / "red" / "2.png"
    path.write_bytes(path.read_bytes()[:300])
    return folder


def sixteen_bits(folder: Path) -> Path:
    write_pictures(folder, count=30)
    deep = Image.fromarray(np.full((40, 40), 40000, np.uint16))
    deep.save(folder / "red" / "deep.png")
    return folder


def class_without_pictures(folder: Path) -> Path:
    write_pictures(folder)
    (folder / "violet").mkdir()
    return folder


def strange_test_class(folder: Path) -> Path:
    write_pictures(folder / "train")
    write_pictures(folder / "test")
    (folder / "test" / "red").rename(folder / "test" / "violet")
    return folder


def one_class_folder(folder: Path) -> Path:
    write_pictures(folder, count=30)
    for name in ("blue", "green"):
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()
    return folder


def single_picture(folder: Path) -> Path:
    write_pictures(folder, count=4)
    return folder


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no such path": (lambda folder: folder / "absent", "no such file"),
    "unknown suffix": (lambda folder: (folder / "a.csv").touch() or folder / "a.csv", "accepted"),
    "empty folder": (lambda folder: folder, "no folders in it"),
    "truncated h5": (truncated_hdf5, "not a readable HDF5 file"),
    "h5 that is none": (
        lambda folder: (folder / "a.h5").write_text("text") and folder / "a.h5",
        "not a readable HDF5 file",
    ),
    "h5 with other keys": (
        lambda folder: write_hdf5(folder / "a.h5", {"X": np.zeros(3)}),
        "needs train_set_x, train_set_y",
    ),
    "h5 group for an array": (
        lambda folder: write_hdf5(folder / "a.h5", {"train_set_x/inner": np.zeros(3)}),
        "not a readable HDF5 file",
    ),
    "two sets in a folder": (two_sets_in_a_folder, "is in train_cats.h5 as well"),
    "h5 array without values": (empty_hdf5_array, "train_set_y is no array"),
    "h5 array that is a number": (
        lambda folder: write_hdf5(folder / "a.h5", arrays(SIGNS) | {"train_set_x": 3}),
        "train_set_x is no array",
    ),
    "npy called npz": (bare_array, "not a readable .npz file"),
    "truncated npz": (truncated_npz, "not a readable .npz file"),
    "damaged npz": (damaged_npz, "not a readable .npz file"),
    "pickled npz": (set_to("y_train", np.array([{}] * 12)), "not a readable .npz file"),
    "npz with other keys": (
        lambda folder: np.savez(folder / "a.npz", x=np.zeros(3)) or folder / "a.npz",
        "needs x_train, y_train",
    ),
    "no labels": (broken(lambda content: content.pop("y_train")), "y_train is missing"),
    "no test labels": (broken(lambda content: content.pop("y_test")), "y_test is missing"),
    "channels first": (set_to("x_train", np.zeros((12, 3, 32, 32), np.uint8)), "[N, H, W, C]"),
    "no pictures": (set_to("x_train", np.zeros((0, 32, 32, 3), np.uint8)), "[0, 32, 32, 3]"),
    "negative pixels": (set_to("x_train", np.full((12, 32, 32, 3), -1)), "from -1 to -1"),
    "NaN pixels": (set_to("x_train", np.full((12, 32, 32, 3), np.nan)), "from nan"),
    "floats of no known range": (
        set_to("x_train", np.full((12, 32, 32, 3), 1.5)),
        "is its range 0 to 1 or 0 to 255?",
    ),
    "text for pictures": (set_to("x_train", np.full((12, 32, 32, 3), "a")), "got <U1"),
    "fewer labels": (set_to("y_train", np.zeros(11, int)), "12 labels"),
    "one-hot labels": (set_to("y_train", np.eye(12, dtype=int)), "12 labels"),
    "float labels": (set_to("y_train", np.zeros(12)), "must be integers, got float64"),
    "label too large": (set_to("y_train", np.arange(12)), "must be from 0 to 2"),
    "labels beyond counting": (
        broken(lambda c: c.pop("classes") is not None and c.update(y_train=np.arange(12) + 2**40)),
        "more than there are pictures",
    ),
    "negative label": (set_to("y_train", np.arange(12) - 11), "got -11 to 0"),
    "one class": (set_to("y_train", np.ones(12, int)), "of one class, 'green'"),
    "test pictures of another size": (
        set_to("x_test", np.zeros((6, 40, 40, 3), np.uint8)),
        "test pictures [40, 40, 3]",
    ),
    "damaged picture": (damaged_picture, "not a picture that can be read"),
    "16 bits": (sixteen_bits, "more than 8 bits a channel"),
    "class without pictures": (class_without_pictures, "violet: no pictures in it"),
    "test class that was not trained": (strange_test_class, "violet: no class of that name"),
    "parts by other names": (parts_by_other_names, "first, second hold the same folders"),
    "folder of one class": (one_class_folder, "of one class, 'red'"),
    "class with a single picture": (single_picture, "has a single picture"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    write, part = WRONG[name]
    path = write(tmp_path)
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert part in message and str(tmp_path) in message and "\n" not in message, message


def test_too_small_a_size() -> None:
    with pytest.raises(DataError, match=r"at least 32 pixels, got \[16, 16\]"):
        load("digits", size=16)


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="not a picture that can be read"):
        read_picture(tmp_path / "a.jpg", (32, 32))
    with pytest.raises(DataError, match="no such file"):
        read_picture(tmp_path / "b.jpg", (32, 32))


def test_a_bomb_of_a_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("L", (200, 200)).save(buffer, "png")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="decompression bomb"):
        read_picture(tmp_path / "a.png", (32, 32))
