"""Pictures in folders, one folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fusedres.training.data.pictures import (
    SMALLEST,
    ArrayPictures,
    Data,
    Failure,
    FilePictures,
    Paths,
    Pictures,
    hold_out,
    opened,
    upright_size,
)
from fusedres.training.files import DataError, require

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
TRAIN = ("train", "training")  # in any case
TEST = ("test", "testing", "val", "valid", "validation")
SIZE = 224  # pixels, where the pictures differ in size or are larger than LARGEST
LARGEST = 512
LOOKED_AT = 64  # so many pictures are asked for their size
IN_MEMORY = 2**30  # bytes; what decodes to more is read as it is needed


def from_folder(path: Path, size: tuple[int, int] | None, crop: float, hold: bool) -> Data:
    """Data out of a folder of classes, or one with `train` and `test` that are."""
    train_root = _part(path, TRAIN)
    test_root = _part(path, TEST)
    if train_root is not None and test_root is not None:
        classes = _classes(train_root)
        for name in _classes(test_root):
            if name not in classes:
                raise DataError(f"{test_root / name}: no class of that name in {train_root}")
        files = [_files(root, classes) for root in (train_root, test_root)]
        size = size or _common_size([path for paths, _ in files for path in _some(paths)])
        train, test = (FilePictures(paths, labels, size, crop) for paths, labels in files)
    else:
        root = train_root or path
        classes = _classes(root)
        paths, labels = _files(root, classes)
        size = size or _common_size(_some(paths))
        whole = FilePictures(paths, labels, size, crop)
        train, test = (
            FilePictures([paths[i] for i in index], labels[index], size, crop)
            for index in hold_out(whole, classes, str(path))
        )
    return Data(_held(train) if hold else train, _held(test), classes, str(path))


def find_pictures(folder: str | Path) -> tuple[list[Path], list[Failure]]:
    """Every picture at any depth below a folder, told by the suffixes of formats that Pillow reads.

    Hidden files and folders are left out. Links to files count as files; links to folders are not
    followed, as they may lead in a circle.

    Returns:
        The pictures, sorted; and the folders that could not be read, or `folder` where it holds no
        picture.

    Raises:
        TrainingError: Pillow is not installed; says how to install it.
    """
    suffixes = _suffixes_that_pillow_reads()
    found: list[Path] = []
    wrong: list[Failure] = []

    def failed(error: OSError) -> None:
        path = Path(error.filename)
        wrong.append(Failure(path, DataError(f"{path}: cannot read: {error.strerror}")))

    for root, folders, files in os.walk(folder, onerror=failed):
        folders[:] = (name for name in folders if not name.startswith("."))
        shown = (Path(root, name) for name in files if not name.startswith("."))
        found += (path for path in shown if path.suffix.lower() in suffixes)
    if not found and not wrong:
        wrong.append(Failure(Path(folder), DataError(f"{folder}: no pictures in it")))
    return sorted(found), sorted(wrong, key=lambda failure: failure.path)


def _suffixes_that_pillow_reads() -> set[str]:
    require("PIL", "pillow", "reading pictures")
    from PIL import Image, ImageFile

    Image.preinit()  # as in `opened`
    found = set()
    for suffix, name in Image.registered_extensions().items():
        factory = Image.OPEN.get(name, (None,))[0]  # None: Pillow only writes the format
        # a stub tells a format, HDF5 for one, that Pillow does not decode
        stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        if factory is not None and not stub:
            found.add(suffix)
    return found


def _part(path: Path, names: Sequence[str]) -> Path | None:
    """The folder of classes that is called so; a folder of pictures is a class, however called."""
    found = {p.name.lower(): p for p in path.iterdir() if p.is_dir() and _folders(p)}
    return next((found[name] for name in names if name in found), None)


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _classes(root: Path) -> tuple[str, ...]:
    found = _folders(root)
    if not found:
        raise DataError(f"{root}: no folders in it; a folder of pictures for every class is needed")
    within = [{p.name for p in _folders(folder)} for folder in found]
    if len(found) > 1 and len(within[0]) > 1 and all(names == within[0] for names in within):
        names = ", ".join(folder.name for folder in found)
        raise DataError(
            f"{root}: {names} hold the same folders: not classes, it seems, but parts; call them "
            "train and test"
        )
    return tuple(folder.name for folder in found)


def _files(root: Path, classes: tuple[str, ...]) -> tuple[Paths, Tensor]:
    """Every picture below the folder of its class, with its label."""
    paths: list[Path] = []
    counts: list[int] = []
    for name in classes:
        found = [
            Path(folder, file)
            for folder, _, files in os.walk(root / name)
            for file in files
            if os.path.splitext(file)[1].lower() in SUFFIXES
        ]
        if not found:
            raise DataError(f"{root / name}: no pictures in it (of {', '.join(SUFFIXES)})")
        paths += sorted(found)
        counts.append(len(found))
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return Paths(paths), labels


def _some(paths: Sequence[Path]) -> Sequence[Path]:
    """So many that all can be asked for their size."""
    return paths[:: max(1, len(paths) // LOOKED_AT)]


def _common_size(paths: Sequence[Path]) -> tuple[int, int]:
    """(H, W): that of pictures of one size up to LARGEST, or SIZE."""
    sizes = set()
    for path in paths:
        with opened(path) as image:
            sizes.add(upright_size(image))
    height, width = sizes.pop() if len(sizes) == 1 else (SIZE, SIZE)
    if max(width, height) > LARGEST:
        return SIZE, SIZE
    return (height, width) if min(height, width) >= SMALLEST else (SMALLEST, SMALLEST)


def _held(pictures: FilePictures) -> Pictures:
    """In memory if there is room, so that a damaged file shows before training starts."""
    height, width = pictures.size
    if len(pictures) * height * width * pictures.channels > IN_MEMORY:
        return pictures
    return ArrayPictures(pictures.read(range(len(pictures))), pictures.labels)
