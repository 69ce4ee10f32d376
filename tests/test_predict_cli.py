"""predict as a user runs it: on files of every kind, on folders, on what is no picture at all."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from fusedres.cli import main
from fusedres.training import (
    Checkpoint,
    Classifier,
    DataError,
    Failure,
    Network,
    Prediction,
    Preprocess,
    Recipe,
    find_pictures,
    load,
)
from fusedres.training import classifier as classifier_module
from fusedres.training.data import read_picture

Image = pytest.importorskip("PIL.Image")
from PIL import ImageFile  # noqa: E402

pytest.importorskip("tqdm")

BLUE, GREEN, RED = range(3)  # indices of pictures()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a network of random weights, which tells pictures apart."""
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    write_checkpoint(path)
    return path


def write_checkpoint(path: Path, classes: Sequence[str] = tiny.CLASSES, **changed: float) -> None:
    torch.manual_seed(0)
    network = Network("resnet18", "torchvision", len(classes), 3)
    state = network.build().state_dict()
    state["fc.weight"] *= 10
    for name, value in changed.items():
        state[name.replace("_", ".")].fill_(value)
    Checkpoint(
        network=network,
        recipe=Recipe(),
        preprocess=Preprocess((32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)),
        classes=tuple(classes),
        source="tiny",
        fingerprint="",
        wall=0.0,
        state={"model": state},
    ).save(path)


@pytest.fixture(scope="module")
def classifier(checkpoint: Path) -> Classifier:
    return Classifier(checkpoint)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """0.png, 1.png, 2.png."""
    for i, image in enumerate(pictures()):
        image.save(tmp_path / f"{i}.png")
    return tmp_path


def pictures(count: int = 3) -> list[Any]:
    return [Image.fromarray(image.numpy()) for image in tiny.pictures(count)[0]]


class Ran:
    """What a run of predict in this process left."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.complaints = err.splitlines()
        assert all(line.startswith("fusedres: ") for line in self.complaints), err

    @property
    def rows(self) -> dict[str, list[tuple[str, float]]]:
        """The table: (class, percentage) by picture."""
        return dict(self.lines())

    def lines(self) -> list[tuple[str, list[tuple[str, float]]]]:
        header, *lines = self.out.splitlines()
        columns = [header.index("class 1")]
        while f"class {len(columns) + 1}" in header:
            columns.append(header.index(f"class {len(columns) + 1}"))
        assert header.startswith("picture ")
        found = []
        for line in lines:
            assert len({len(line) for line in lines}) == 1  # aligned
            ends = [*columns[1:], len(line)]
            cells = [line[a:b].split() for a, b in zip(columns, ends, strict=True)]
            ranking = [(name, float(share.rstrip("%"))) for name, share in cells]
            found.append((line[: columns[0]].rstrip(), ranking))
        return found


@pytest.fixture
def predict(
    checkpoint: Path,
    classifier: Classifier,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Ran]:
    """What runs it, by default on `checkpoint`, which is read once for all tests."""

    def read(path: Path, device: torch.device) -> Classifier:
        return classifier if path == checkpoint else Classifier(path, device)

    def run(*arguments: object, checkpoint: Path = checkpoint) -> Ran:
        capfd.readouterr()
        options = ["--checkpoint", str(checkpoint), "--device", "cpu"]
        code = main(["predict", *map(str, arguments), *options])
        return Ran(code, *capfd.readouterr())  # of decoders in C, too

    monkeypatch.setattr("fusedres.cli.predict.Classifier", read)
    return run


def assert_ranking(found: Any, expected: Any, within: float = 1e-5) -> None:
    """The same shares by class, and in order."""
    assert dict(found) == pytest.approx(dict(expected), abs=within)
    shares = [share for _, share in found]
    assert shares == sorted(shares, reverse=True)


# The result


def test_a_ranking_is_that_of_the_network(classifier: Classifier, folder: Path) -> None:
    image = tiny.pictures(1)[0][0]
    values = (image.permute(2, 0, 1).double() / 255).sub(
        torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    ) / torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    with torch.no_grad():
        logits = classifier.checkpoint.model()(values.float().unsqueeze(0))[0]
    shares = logits.double().softmax(0).tolist()
    found = classifier.predict(folder / "0.png")
    assert found.path == folder / "0.png"
    assert_ranking(found.ranking, zip(tiny.CLASSES, shares, strict=True))


def test_pictures_are_told_apart(classifier: Classifier, folder: Path) -> None:
    """Or nothing below could tell that one stands in another's place."""
    shares = [dict(classifier.predict(folder / f"{i}.png").ranking)["red"] for i in range(3)]
    assert min(abs(a - b) for a, b in itertools.combinations(shares, 2)) > 0.01


def test_table(predict: Callable[..., Ran], classifier: Classifier, folder: Path) -> None:
    paths = [folder / f"{i}.png" for i in (2, 0, 1)]
    done = predict(*paths)
    assert (done.code, done.err) == (0, "")
    assert list(done.rows) == [str(path) for path in paths]
    for path in paths:
        expected = [(name, 100 * p) for name, p in classifier.predict(path).ranking]
        assert_ranking(done.rows[str(path)], expected, within=0.051)


def test_json_says_what_the_table_says(predict: Callable[..., Ran], folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"damaged")
    (folder / "empty").mkdir()
    arguments = [folder / "2.png", folder / "bad.png", folder / "0.png", folder / "empty"]
    table, found = predict(*arguments, "--top", 2), predict(*arguments, "--top", 2, "--json")
    assert (table.code, found.code) == (1, 1)
    assert table.err == found.err
    entries = json.loads(found.out)
    by_path = {entry["path"]: entry for entry in entries}
    assert list(by_path) == [str(arguments[i]) for i in (3, 0, 1, 2)]  # first the folders
    assert [f"fusedres: {entry['error']}" for entry in entries if "error" in entry] == (
        found.complaints
    )
    for path, ranking in table.rows.items():
        assert by_path[path].keys() == {"path", "ranking"}
        assert [
            (e["class"], round(100 * e["probability"], 1)) for e in by_path[path]["ranking"]
        ] == ([(name, pytest.approx(share)) for name, share in ranking])
    assert len(table.rows) == 2


def test_json_of_nothing_but_failures(predict: Callable[..., Ran], tmp_path: Path) -> None:
    done = predict(tmp_path, tmp_path / "absent.png", "--json")
    assert done.code == 1
    assert json.loads(done.out) == [
        {"path": str(tmp_path), "error": f"{tmp_path}: no pictures in it"},
        {"path": f"{tmp_path}/absent.png", "error": f"{tmp_path}/absent.png: no such file"},
    ]
    assert predict(tmp_path).out == ""  # no header without a table


@pytest.mark.parametrize(("top", "count"), [(1, 1), (2, 2), (3, 3), (1000, 3)])
def test_top(predict: Callable[..., Ran], folder: Path, top: int, count: int) -> None:
    (ranking,) = predict(folder / "0.png", "--top", top).rows.values()
    assert len(ranking) == len(dict(ranking)) == count
    (entry,) = json.loads(predict(folder / "0.png", "--top", top, "--json").out)
    assert [e["class"] for e in entry["ranking"]] == [name for name, _ in ranking]


def test_three_classes_are_named_unless_asked_otherwise(
    predict: Callable[..., Ran], folder: Path
) -> None:
    write_checkpoint(folder / "five.pt", "abcde")
    (ranking,) = predict(folder / "0.png", checkpoint=folder / "five.pt").rows.values()
    assert len(ranking) == 3


@pytest.mark.parametrize("option", ["--top", "--batch-size"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_numbers_that_make_no_sense(
    predict: Callable[..., Ran], folder: Path, option: str, value: str
) -> None:
    done = predict(folder, option, value)
    assert (done.code, done.out, len(done.complaints)) == (2, "", 1)
    assert f"{option}: must be an integer from 1 up, got '{value}'" in done.err


def test_the_same_picture_twice(predict: Callable[..., Ran], folder: Path) -> None:
    path = folder / "1.png"
    done = predict(path, folder / "0.png", path)
    assert done.code == 0
    first, other, again = done.lines()
    assert first == again != other
    assert len(json.loads(predict(path, path, "--json").out)) == 2


def test_class_names_of_any_kind(predict: Callable[..., Ran], folder: Path) -> None:
    names = ("line\nbreak", "größe", "a longer one")
    write_checkpoint(folder / "named.pt", names)
    done = predict(folder / "0.png", folder / "1.png", checkpoint=folder / "named.pt")
    lines = done.out.splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines[1:]}) == 1
    assert all(part in lines[1] for part in ("line\\nbreak", "größe", "a longer one"))
    (entry,) = json.loads(predict(folder / "0.png", "--json", checkpoint=folder / "named.pt").out)
    assert {e["class"] for e in entry["ranking"]} == set(names)


# Files of every kind


def write_turned(image: Any, path: Path) -> None:
    """Lying on its side, with the note to turn it by 90 degrees clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=100, subsampling=0)


FORMATS: dict[str, Callable[[Any, Path], object]] = {
    "a.png": lambda image, path: image.save(path),
    "a.bmp": lambda image, path: image.save(path),
    "a.ppm": lambda image, path: image.save(path),
    "a.tiff": lambda image, path: image.save(path),
    "deflated.tif": lambda image, path: image.save(path, compression="tiff_adobe_deflate"),
    "a.webp": lambda image, path: image.save(path, lossless=True),
    "a.jpg": lambda image, path: image.save(path, quality=100, subsampling=0),
    "a.JPEG": lambda image, path: image.save(path, quality=100, subsampling=0),
    "a.gif": lambda image, path: image.quantize(256).save(path),
    "frames.gif": lambda image, path: image.quantize(256).save(
        path, save_all=True, append_images=pictures()[:1]
    ),
    "palette.png": lambda image, path: image.quantize(256).save(path),
    "see-through palette.png": lambda image, path: image.quantize(256).save(
        path, transparency=bytes([0, 128, 255])
    ),
    "RGBA.png": lambda image, path: image.convert("RGBA").save(path),
    "turned.png": write_turned,
    "turned.jpg": write_turned,
    "turned.tif": write_turned,
}


def test_formats(
    predict: Callable[..., Ran], folder: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The same picture in each; those that lose a little are allowed to."""
    original = pictures()[RED]
    (folder / "formats").mkdir()
    for name, write in FORMATS.items():
        write(original, folder / "formats" / name)
    expected = predict(folder / f"{RED}.png").lines()[0][1]
    found = predict(folder / "formats")
    assert (found.code, found.err) == (0, "")
    assert not list(recwarn)
    assert list(found.rows) == [str(folder / "formats" / name) for name in sorted(FORMATS)]
    others = [predict(folder / f"{i}.png").lines()[0][1] for i in (BLUE, GREEN)]
    for name, ranking in found.rows.items():
        lossy = "palette" in name or Path(name).suffix.lower() in (".jpg", ".jpeg", ".gif")
        assert_ranking(ranking, expected, within=4 if lossy else 0.11)
        distance = [abs(dict(ranking)["red"] - dict(r)["red"]) for r in (expected, *others)]
        assert min(distance) == distance[0], name


@pytest.mark.parametrize("mode", ["L", "1", "LA", "CMYK", "P"])
def test_modes(
    classifier: Classifier, predict: Callable[..., Ran], tmp_path: Path, mode: str
) -> None:
    image = pictures()[0].convert(mode)
    image.save(tmp_path / "a.tif")
    image.convert("RGB").save(tmp_path / "plain.png")
    done = predict(tmp_path / "a.tif")
    assert (done.code, done.err) == (0, "")
    pair = [classifier.predict(tmp_path / name).ranking for name in ("a.tif", "plain.png")]
    assert_ranking(*pair, within=1e-3 if mode == "CMYK" else 1e-6)


def test_any_size_is_scaled_and_cropped(classifier: Classifier, tmp_path: Path) -> None:
    image = pictures()[0]
    image.resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    wide = Image.new("RGB", (96, 32))
    wide.paste(image, (32, 0))
    wide.save(tmp_path / "wide.png")
    image.save(tmp_path / "a.png")
    image.resize((1, 1)).save(tmp_path / "dot.png")
    expected = classifier.predict(tmp_path / "a.png").ranking
    assert_ranking(classifier.predict(tmp_path / "wide.png").ranking, expected)
    assert_ranking(classifier.predict(tmp_path / "large.png").ranking, expected, within=0.05)
    assert len(classifier.predict(tmp_path / "dot.png").ranking) == 3


NAMES = [
    "b c.png",
    "grün 日本 🐟.png",
    "new\nline.png",
    "\x1b[31mred\x07.png",
    "-.png",
    os.fsdecode(b"not \xff utf8.png"),
]


def test_names_of_any_kind(predict: Callable[..., Ran], folder: Path) -> None:
    for name in NAMES:
        shutil.copy(folder / "0.png", folder / name)
        (folder / name).with_suffix(".bad").write_bytes(b"damaged")
    paths = [folder / name for name in NAMES]
    done = predict(*paths)
    assert (done.code, done.err) == (0, "")
    shown = [str(path) for path in paths]
    shown[2:4] = [f"{folder}/new\\nline.png", f"{folder}/\\x1b[31mred\\x07.png"]
    shown[-1] = f"{folder}/not \\udcff utf8.png"
    assert [name for name, _ in done.lines()] == shown
    assert [entry["path"] for entry in json.loads(predict(*paths, "--json").out)] == (
        [str(path) for path in paths]
    )
    wrong = predict(*(path.with_suffix(".bad") for path in paths))
    assert (wrong.code, wrong.out, len(wrong.complaints)) == (1, "", len(NAMES))
    for line, name in zip(wrong.complaints, shown, strict=True):
        assert line.startswith(f"fusedres: {name[:-4]}.bad: not a picture that can be read: ")


# Folders


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures()[0].save(path, "png")
    return path


def test_folders_are_searched_and_sorted(predict: Callable[..., Ran], tmp_path: Path) -> None:
    names = ["B.PNG", "a/10.png", "a/9.png", "a/b/c/d.jpeg", "a.png", "z.jfif"]
    expected = sorted(touch(tmp_path / "in" / name) for name in names)
    hidden = [".b.png", ".git/c.png", "a/.d.png", "a/.e/f/g.png"]
    other = ["notes.txt", "data.h5", "paper.pdf", "png", "a/checkpoint.pt", "a/x.png.part"]
    for name in hidden + other:
        touch(tmp_path / "in" / name)
    done = predict(tmp_path / "in")
    assert (done.code, done.err) == (0, "")
    assert [name for name, _ in done.lines()] == [str(path) for path in expected]
    assert find_pictures(str(tmp_path / "in")) == (expected, [])


def test_paths_keep_their_order(
    predict: Callable[..., Ran], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/2.png", "b/1.png", "a/3.png", "a/.hidden.png", "plain", ".folder/4.png"):
        touch(folder / name)
    monkeypatch.chdir(folder)
    given = ["plain", "b", "2.png", "./a/", "a/.hidden.png", ".folder", "b/2.png"]
    done = predict(*given, "--batch-size", 2)
    assert [name for name, _ in done.lines()] == [
        *("plain", "b/1.png", "b/2.png", "2.png"),
        *("a/3.png", "a/.hidden.png", ".folder/4.png", "b/2.png"),
    ]
    (folder / "plain").unlink()
    done = predict(".")
    assert [name for name, _ in done.lines()] == (
        ["0.png", "1.png", "2.png", "a/3.png", "b/1.png", "b/2.png"]
    )


def test_every_format_that_pillow_reads_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in Image.registered_extensions():
        (tmp_path / f"a{suffix}").touch()
    found = {path.suffix for path in find_pictures(tmp_path)[0]}
    assert {".png", ".jpg", ".webp", ".tif", ".pgm", ".tga", ".ico", ".jp2", ".qoi"} <= found
    assert not found & {".pdf", ".h5", ".grib"}  # written only; told but not decoded
    monkeypatch.setitem(Image.EXTENSION, ".mine", "PNG")  # as a plugin of one's own does it
    touch(tmp_path / "b.mine")
    assert tmp_path / "b.mine" in find_pictures(tmp_path)[0]


def test_links(predict: Callable[..., Ran], folder: Path) -> None:
    inside = folder / "inside"
    touch(inside / "deep" / "a.png")
    (inside / "deep" / "up").symlink_to("..")
    (inside / "self.png").symlink_to("self.png")
    (inside / "gone.png").symlink_to("nowhere.png")
    (inside / "one.png").symlink_to(folder / "1.png")
    (folder / "link").symlink_to("inside")
    done = predict(folder / "link")
    assert done.code == 1
    assert list(done.rows) == [f"{folder}/link/deep/a.png", f"{folder}/link/one.png"]
    assert done.complaints == [
        f"fusedres: {folder}/link/gone.png: no such file",
        f"fusedres: {folder}/link/self.png: cannot read: Too many levels of symbolic links",
    ]


def test_a_folder_without_pictures(predict: Callable[..., Ran], folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "other" / "deep").mkdir(parents=True)
    (folder / "other" / "notes.txt").write_text("not a picture")
    done = predict(folder / "empty", folder / "0.png", folder / "other")
    assert done.code == 1
    assert done.complaints == [
        f"fusedres: {folder}/empty: no pictures in it",
        f"fusedres: {folder}/other: no pictures in it",
    ]
    assert list(done.rows) == [f"{folder}/0.png"]


@contextmanager
def nobody() -> Iterator[None]:
    """As a user whom permissions bind, which root is not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_permissions(
    predict: Callable[..., Ran], folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)  # the folders above are closed to others
    shutil.copy(checkpoint, "checkpoint.pt")
    shutil.copy(checkpoint, "closed.pt")
    touch(folder / "part" / "a.png")
    touch(folder / "part" / "closed" / "b.png")
    folder.chmod(0o755)
    closed = [folder / "1.png", folder / "closed.pt", folder / "part" / "closed"]
    for path in closed:
        path.chmod(0)
    try:
        with nobody():
            done = predict("0.png", "1.png", "part", checkpoint=Path("checkpoint.pt"))
            only = predict("part/closed", "part/closed/b.png", checkpoint=Path("checkpoint.pt"))
            weights = predict("0.png", checkpoint=Path("closed.pt"))
    finally:
        for path in closed:
            path.chmod(0o755)
    assert (done.code, only.code, weights.code) == (1, 1, 1)
    assert list(done.rows) == ["0.png", "part/a.png"]
    assert done.complaints == [
        "fusedres: part/closed: cannot read: Permission denied",
        "fusedres: 1.png: cannot read: Permission denied",
    ]
    assert only.complaints == [
        "fusedres: part/closed: cannot read: Permission denied",
        "fusedres: part/closed/b.png: cannot read: Permission denied",
    ]
    assert weights.complaints == ["fusedres: closed.pt: cannot read: Permission denied"]


# What is wrong is named and skipped


def truncated(suffix: str, **options: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        buffer = io.BytesIO()
        pictures()[0].save(buffer, suffix, **options)
        content = buffer.getvalue()
        path.write_bytes(content[: len(content) * 2 // 3])

    return write


def damaged_png(path: Path) -> None:
    """One byte of the compressed values is another."""
    pictures()[0].save(path, "png")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)


UNREADABLE = "not a picture that can be read: "
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "no folder": (lambda path: path.with_name("a").touch(), "no such file"),
    "empty": (lambda path: path.touch(), UNREADABLE),
    "text": (lambda path: path.write_text("a picture of a hand"), UNREADABLE),
    "pipe": (os.mkfifo, "not a regular file"),
    "truncated png": (truncated("png"), UNREADABLE),
    "truncated jpeg": (truncated("jpeg"), UNREADABLE),
    "truncated gif": (truncated("gif"), UNREADABLE),
    "truncated bmp": (truncated("bmp"), UNREADABLE),
    "truncated webp": (truncated("webp"), UNREADABLE),
    "truncated tiff": (truncated("tiff"), UNREADABLE),
    "truncated lzw": (truncated("tiff", compression="tiff_lzw"), UNREADABLE),
    "damaged": (damaged_png, UNREADABLE),
    "16 bits": (
        lambda path: Image.new("I;16", (40, 40)).save(path, "png"),
        "has more than 8 bits a channel (mode I;16)",
    ),
    "32 bits": (
        lambda path: Image.new("F", (40, 40)).save(path, "tiff"),
        "has more than 8 bits a channel (mode F)",
    ),
    "name too long": (lambda path: None, "cannot read: File name too long"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(predict: Callable[..., Ran], folder: Path, name: str) -> None:
    write, part = WRONG[name]
    path = folder / "wrong.png"
    path = folder / ("x" * 300) if name == "name too long" else path
    write(path)
    done = predict(folder / "0.png", path, folder / "2.png")
    assert done.code == 1
    assert list(done.rows) == [f"{folder}/0.png", f"{folder}/2.png"]
    (line,) = done.complaints
    assert line.startswith(f"fusedres: {path}: {part}"), line
    assert not part.endswith(": ") or len(line) > len(f"fusedres: {path}: {part}") + 5


@pytest.mark.parametrize(
    ("pixels", "refused"), [(1000, False), (1001, True), (1500, True), (2500, True)]
)
def test_bombs(
    predict: Callable[..., Ran],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    pixels: int,
    refused: bool,
) -> None:
    """Pillow itself warns from its limit on, and refuses from twice the limit on."""
    touch(folder / "red" / "a.png")
    Image.new("RGB", (1, pixels), (9, 9, 9)).save(folder / "red" / "large.png")
    shutil.copytree(folder / "red", folder / "green")
    decoded = []
    whole = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: decoded.append(self.size) or whole(self)
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for image in (folder / "0.png", folder / "red" / "a.png"):
        Image.new("RGB", (10, 10)).save(image)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = predict(*[folder / "0.png", folder / "red"] * 3, "--batch-size", 4)
        assert not caught
        monkeypatch.setattr(classifier_module, "READERS", 1)
        assert predict(folder / "red").complaints == done.complaints[:1]
        assert not caught
        if refused:
            with pytest.raises(DataError, match="refused as a decompression bomb"):
                load(folder, size=32)  # training reads no bomb either
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert ((1, pixels) in decoded) is not refused
    assert (done.code, len(done.lines())) == ((1, 6) if refused else (0, 9))
    limit = f"1x{pixels} pixels" if pixels < 2000 else f"Image size ({pixels} pixels)"
    start = f"fusedres: {folder}/red/large.png: refused as a decompression bomb: {limit}"
    assert [line.startswith(start) for line in done.complaints] == [True] * 3 * refused


def test_bombs_are_none_where_the_limit_is_lifted(
    predict: Callable[..., Ran], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert predict(folder).code == 0


# From Python


def outcome(result: Prediction | Failure) -> tuple[Path, object]:
    return result.path, str(result.error) if isinstance(result, Failure) else result.ranking


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 32])
def test_batches(classifier: Classifier, tmp_path: Path, batch_size: int) -> None:
    """What else is in the batch changes nothing but the last digits, a failure included."""
    paths: list[Path] = []
    for i, image in enumerate(pictures(7)):
        paths.append(tmp_path / f"{i}.png")
        image.save(paths[-1])
    paths[2:2] = [tmp_path / "absent.png"]
    paths[5:5] = [tmp_path] * 3  # a batch of failures only
    sizes: list[int] = []
    hook = classifier._frozen.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0])) or check(inputs[0])
    )

    def check(images: Tensor) -> None:
        assert images.dtype == torch.uint8

    found = list(classifier.predict_many(map(str, paths), batch_size=batch_size))
    hook.remove()
    assert sum(sizes) == 7 and max(sizes) <= batch_size and 0 not in sizes
    assert [result.path for result in found] == paths
    for result in found:
        if isinstance(result, Failure):
            assert isinstance(result.error, DataError)
            assert str(result.error).startswith(f"{result.path}: no")
        else:
            assert_ranking(result.ranking, classifier.predict(result.path).ranking)
    assert sum(isinstance(result, Failure) for result in found) == 4


def test_batch_size(classifier: Classifier, predict: Callable[..., Ran], folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        classifier.predict_many([folder / "0.png"], batch_size=0)
    assert list(classifier.predict_many([])) == []
    assert predict(folder, "--batch-size", 1).rows == predict(folder).rows


def test_no_more_is_read_than_a_batch_ahead(classifier: Classifier, folder: Path) -> None:
    taken = []
    endless = itertools.cycle([folder / "0.png", folder / "1.png"])
    results = classifier.predict_many(
        (taken.append(path) or path for path in endless), batch_size=3
    )
    threads = threading.active_count()
    assert [next(results).path.name for _ in range(4)] == ["0.png", "1.png", "0.png", "1.png"]
    assert len(taken) == 9
    results.close()
    assert threading.active_count() == threads


def test_the_next_batch_is_read_meanwhile(
    classifier: Classifier, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = threading.Event()

    def read(path: Path, size: tuple[int, int], channels: int, *, crop: float) -> Tensor:
        if path.name == "1.png":
            second.set()
        return read_picture(path, size, channels, crop=crop)

    monkeypatch.setattr(classifier_module, "read_picture", read)
    seen = []
    hook = classifier._frozen.register_forward_pre_hook(
        lambda module, inputs: seen.append(second.wait(60))
    )
    paths = [folder / "0.png", folder / "1.png"]
    assert [r.path for r in classifier.predict_many(paths, batch_size=1)] == paths
    hook.remove()
    assert seen == [True, True]


def test_predict_raises_for_a_single_picture(classifier: Classifier, folder: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.png: no such file"):
        classifier.predict(folder / "absent.png")
    with pytest.raises(DataError, match="not a regular file"):
        classifier.predict(folder)


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only(
    predict: Callable[..., Ran], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "3.png").write_bytes(b"damaged")
    plain = predict(folder)
    assert (plain.code, len(plain.complaints), len(plain.lines())) == (1, 1, 3)  # no bar in a file
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    done = predict(folder)
    assert done.out == plain.out  # and none in stdout
    shown = terminal.getvalue()
    assert "/4 [" in shown and "img/s" in shown
    # the line stands alone: what was there is cleared before, and the bar comes back below
    before, line, after = shown.partition(plain.err)
    assert line and before.split("\r")[-1].strip() == "" and after.startswith("\r")
    assert shown.split("\r")[-1].strip() == ""  # nothing of the bar is left
    for single in ([folder / "0.png"], [folder / "0.png", "--json"]):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        assert predict(*single).code == 0
        assert terminal.getvalue() == ""


@pytest.mark.parametrize("option", [["--top", "2"], ["--json"]])
def test_a_bar_leaves_output_whole_on_the_same_terminal(
    predict: Callable[..., Ran], folder: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    expected = predict(folder, *option).out
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    predict(folder, *option)
    shown = terminal.getvalue()
    assert "img/s" in shown
    # what is left to see when a carriage return has let something else begin on the same line
    assert "\n".join(line.split("\r")[-1] for line in shown.split("\n")) == expected


# Checkpoints


def hostile(path: Path, checkpoint: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {path.parent / 'executed'}",)

    torch.save({**torch.load(checkpoint, weights_only=True), "extra": Hostile()}, path)


def cut(path: Path, checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flipped(path: Path, checkpoint: Path) -> None:
    """One bit of the weights."""
    content = bytearray(checkpoint.read_bytes())
    with zipfile.ZipFile(checkpoint) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 0x10
    path.write_bytes(content)


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "hostile": (hostile, "refused: not a whole file of tensors and plain data (it wants "),
    "cut": (cut, ""),
    "flipped": (flipped, ""),
    "empty": (lambda path, checkpoint: path.touch(), ""),
    "text": (lambda path, checkpoint: path.write_text("weights"), ""),
    "picture": (lambda path, checkpoint: touch(path), ""),
    "other tensors": (
        lambda path, checkpoint: torch.save({"weight": torch.ones(3)}, path),
        "not a checkpoint of fusedres train",
    ),
    "missing": (lambda path, checkpoint: None, "no such checkpoint"),
    "folder": (lambda path, checkpoint: path.mkdir(), "no such checkpoint"),
    "not finite": (
        lambda path, checkpoint: write_checkpoint(path, fc_bias=float("nan")),
        "the network's outputs are not finite",
    ),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoints(
    predict: Callable[..., Ran], folder: Path, checkpoint: Path, name: str
) -> None:
    write, part = BAD_CHECKPOINTS[name]
    path = folder / "new\nline" / "checkpoint.pt"
    path.parent.mkdir()
    write(path, checkpoint)
    done = predict(folder / "0.png", checkpoint=path)
    assert (done.code, done.out, len(done.complaints)) == (1, "", 1)
    assert part in done.err, done.err
    assert name == "not finite" or f"{folder}/new\\nline/checkpoint.pt" in done.err
    assert not (path.parent / "executed").exists()


# Ended early


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Where Ctrl-C is heard, also if these tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "fusedres", "predict", *arguments, "--device", "cpu"],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", ["closed pipe", "interruption"])
def test_ended_early(checkpoint: Path, folder: Path, how: str) -> None:
    """After the first line, of a run that would go on for long."""
    many = ["0.png"] * 20_000
    run = start(folder, *many, "--checkpoint", str(checkpoint), "--batch-size", "4")
    assert run.stdout is not None and run.stderr is not None
    header, line = run.stdout.readline(), run.stdout.readline()
    assert header.startswith("picture") and line.startswith("0.png")
    if how == "closed pipe":
        run.stdout.close()
        assert run.wait(60) == 141
        assert run.stderr.read() == ""
    else:
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
        assert (run.returncode, err) == (130, "fusedres: interrupted\n")
    run.stderr.close()
