"""Labelled pictures from wherever a user has them: HDF5, .npz, folders, scikit-learn's digits.

Pictures are uint8 [N, H, W, C] until they reach the device.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fusedres.training.data.arrays import from_arrays, read_hdf5, read_npz
from fusedres.training.data.folder import find_pictures, from_folder
from fusedres.training.data.pictures import (
    SMALLEST,
    ArrayPictures,
    Data,
    Failure,
    FilePictures,
    Pictures,
    Share,
    hold_out,
    read_picture,
    resized,
)
from fusedres.training.files import DataError, require

__all__ = [
    "ArrayPictures",
    "Data",
    "Failure",
    "FilePictures",
    "Pictures",
    "Share",
    "find_pictures",
    "load",
    "read_picture",
]


def load(
    source: str | Path,
    size: int | tuple[int, int] | None = None,
    *,
    crop: float = 1.0,
    hold: bool = True,
) -> Data:
    """Read labelled pictures.

    Args:
        source: "digits", scikit-learn's handwritten digits; or a path:
            - an HDF5 pair as the Residual Networks assignment has it, train_*.h5 with train_set_x
              [N, H, W, C], train_set_y and list_classes, and test_*.h5 with test_set_x and
              test_set_y: the training file, or the folder of both;
            - an .npz, by Keras's names (x_train, y_train, x_test, y_test), MedMNIST's
              (train_images, ...) or those above;
            - a folder with one folder of pictures a class, or with `train` and `test` (or `val`)
              that are such folders.
            Where there is no test part, a fifth of every class is held out, the same at every call.
        size: (H, W) or the side of a square, in pixels, that pictures are scaled to, from 32 up. By
            default arrays keep theirs (brought up to 32), pictures in files too if they share one
            up to 512; others become 224.
        crop: share of their sides that is kept of pictures in files, around their middle, above 0
            up to 1.
        hold: decode training pictures in files once, into memory, if they take no more than 1 GiB
            there. False: read them as they are needed, which random crops are cut out of.

    Returns:
        The data; labels run from 0 to len(classes) - 1.

    Raises:
        DataError: names the file, what is wrong with it and what is accepted, in one line.
        TrainingError: a library that reads it is not installed; says how to install it.
    """
    if isinstance(size, int):
        size = size, size
    if size is not None and min(size) < SMALLEST:
        raise DataError(f"size must be at least {SMALLEST} pixels, got {list(size)}")
    if not 0 < crop <= 1:
        raise DataError(f"crop must be above 0 and at most 1, got {crop}")
    if str(source) == "digits":
        return _digits(size or (SMALLEST, SMALLEST))
    data = _from_path(Path(source), size, crop, hold)
    return replace(data, source=str(Path(source).resolve()))


def _from_path(path: Path, size: tuple[int, int] | None, crop: float, hold: bool) -> Data:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; accepted is also the word digits")
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".h5", ".hdf5"))
        if files:
            return from_arrays(read_hdf5(files), path, size)
        return from_folder(path, size, crop, hold)
    if path.suffix in (".h5", ".hdf5"):
        twin = path.with_name(path.name.replace("train", "test", 1))
        pair = [path, twin] if twin != path and twin.exists() else [path]
        return from_arrays(read_hdf5(pair), path, size)
    if path.suffix == ".npz":
        return from_arrays(read_npz(path), path, size)
    raise DataError(
        f"{path}: accepted are a folder of pictures, .h5 or .npz files and the word digits"
    )


def _digits(size: tuple[int, int]) -> Data:
    """8x8 grey, brought to the size and RGB."""
    require("sklearn", "scikit-learn", "the digits data set")
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images).unsqueeze(3) * (255 / 16)  # [1797, 8, 8, 1]
    images = resized(grey, size).expand(-1, -1, -1, 3).contiguous()
    whole = ArrayPictures(images, torch.from_numpy(digits.target).to(torch.int64))
    classes = tuple(map(str, digits.target_names))
    train, test = (
        ArrayPictures(whole.read(index), whole.labels[index])
        for index in hold_out(whole, classes, "digits")
    )
    return Data(train, test, classes, "digits")
