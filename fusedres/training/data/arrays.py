"""Pictures in HDF5 and .npz files. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fusedres.training.data.pictures import (
    MODES,
    SMALLEST,
    ArrayPictures,
    Data,
    hold_out,
    resized,
)
from fusedres.training.files import DataError, one_line, require

# training pictures, training labels, test pictures, test labels
NAMES = (
    ("train_set_x", "train_set_y", "test_set_x", "test_set_y"),  # the Residual Networks assignment
    ("x_train", "y_train", "x_test", "y_test"),  # Keras
    ("train_images", "train_labels", "test_images", "test_labels"),  # MedMNIST
)
OVERSHOOT = 0.01  # of the range
CLASS_NAMES = ("list_classes", "classes", "class_names")
KNOWN = {name for names in NAMES for name in names} | set(CLASS_NAMES)


def read_hdf5(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """The arrays we know by name, out of one or more files that complete each other."""
    h5py = require("h5py", "h5py", "reading .h5 files")
    arrays: dict[str, np.ndarray] = {}
    origin: dict[str, Path] = {}
    for path in paths:
        try:
            with h5py.File(path, "r") as file:
                found = {name: file[name][()] for name in file if name in KNOWN}
                others = [name for name in file if name not in KNOWN]
        except Exception as error:  # h5py raises several kinds, also for a file cut short
            raise DataError(f"{path}: not a readable HDF5 file: {one_line(error)}") from None
        for name, value in found.items():
            if not isinstance(value, np.ndarray):
                raise DataError(f"{path}: {name} is no array of numbers")
        if not found:
            raise DataError(
                f"{path}: needs {', '.join(NAMES[0])}; it has {', '.join(others) or 'nothing'}"
            )
        for name in found:
            if name in arrays and name not in CLASS_NAMES:
                raise DataError(
                    f"{path}: {name} is in {origin[name].name} as well; name one file instead of "
                    "the folder"
                )
            origin[name] = path
        arrays |= found
    return arrays


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays we know by name."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files if name in KNOWN}
            others = [name for name in file.files if name not in KNOWN]
    except Exception as error:  # of many kinds, from the zip and from the arrays in it
        raise DataError(f"{path}: not a readable .npz file: {one_line(error)}") from None
    if not found:
        raise DataError(
            f"{path}: needs {', '.join(NAMES[1])}; it has {', '.join(others) or 'nothing'}"
        )
    return found


def from_arrays(arrays: Mapping[str, np.ndarray], path: Path, size: tuple[int, int] | None) -> Data:
    """Data out of named arrays; `path` is for errors."""
    names = next((names for names in NAMES if any(name in arrays for name in names)), NAMES[0])
    tested = any(name in arrays for name in names[2:])
    for name in names if tested else names[:2]:
        if name not in arrays:
            raise DataError(f"{path}: {name} is missing; it has {', '.join(arrays)}")
    parts = list(zip(names[::2], names[1::2], strict=True))[: 2 if tested else 1]
    listed = next((arrays[name] for name in CLASS_NAMES if name in arrays), None)
    if listed is None:
        top = max(_top(arrays[y]) for _, y in parts)
        if top >= sum(arrays[y].size for _, y in parts):
            raise DataError(f"{path}: a label is {top}, more than there are pictures")
        listed = np.arange(1 + top)
    classes = _strings(listed)
    scale = 255.0 if _from_0_to_1(arrays[parts[0][0]]) else 1.0
    pictures = []
    for x, y in parts:
        _check_pictures(arrays[x], scale, f"{path}: {x}")
        _check_labels(arrays[y], f"{path}: {y}", len(arrays[x]), len(classes))
        pictures.append(_pictures(arrays[x], scale, arrays[y], size))
    if not tested:
        whole = pictures[0]
        pictures = [
            ArrayPictures(whole.read(index), whole.labels[index])
            for index in hold_out(whole, classes, str(path))
        ]
    return Data(pictures[0], pictures[1], classes, str(path))


def _top(labels: np.ndarray) -> int:
    return int(labels.max(initial=0)) if labels.dtype.kind in "ui" else 0


def _strings(names: np.ndarray) -> tuple[str, ...]:
    """Names that were stored as strings, bytes or numbers."""
    flat = names.reshape(-1).tolist()
    return tuple(n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in flat)


def _from_0_to_1(x: np.ndarray) -> bool:
    """Whether numbers are meant so; resampling may overshoot a little."""
    return x.dtype.kind == "f" and x.size > 0 and bool(x.max() <= 1 + OVERSHOOT)


def _check_pictures(x: np.ndarray, scale: float, name: str) -> None:
    grey = x.ndim == 3
    if (not grey and (x.ndim != 4 or x.shape[3] not in MODES)) or 0 in x.shape:
        raise DataError(
            f"{name} must be pictures [N, H, W, C] of 1, 3 or 4 channels, or [N, H, W], got shape "
            f"{list(x.shape)}"
        )
    number = x.dtype.kind in "uif"
    slack = OVERSHOOT * 255 / scale if x.dtype.kind == "f" else 0
    if not number or not (x.min() >= -slack and x.max() <= 255 / scale + slack):  # nor is NaN
        values = f"{x.dtype} from {x.min():g} to {x.max():g}" if number else str(x.dtype)
        raise DataError(
            f"{name} must be uint8, or other numbers from 0 to 255 or, in both parts, from 0 to 1, "
            f"got {values}"
        )
    if x.dtype.kind == "f" and scale == 1 and x.max() <= 2:
        raise DataError(f"{name}: is its range 0 to 1 or 0 to 255? its numbers end at {x.max():g}")


def _check_labels(y: np.ndarray, name: str, count: int, classes: int) -> None:
    if y.size != count or max(y.shape, default=1) != y.size:
        raise DataError(f"{name} must be {count} labels, one a picture, got shape {list(y.shape)}")
    if y.dtype.kind not in "ui":
        raise DataError(f"{name} must be integers, got {y.dtype}")
    if y.min() < 0 or y.max() >= classes:
        raise DataError(
            f"{name} must be from 0 to {classes - 1}, as there are {classes} classes, got "
            f"{y.min()} to {y.max()}"
        )


def _pictures(
    x: np.ndarray, scale: float, y: np.ndarray, size: tuple[int, int] | None
) -> ArrayPictures:
    if x.ndim == 3:
        x = x[..., None]
    if x.dtype != np.uint8:
        x = np.rint(x * scale).clip(0, 255).astype(np.uint8)
    height, width = x.shape[1:3]
    grow = max(1.0, SMALLEST / min(height, width))
    size = size or (round(height * grow), round(width * grow))
    images = resized(torch.from_numpy(np.ascontiguousarray(x)), size)
    return ArrayPictures(images, torch.from_numpy(y.reshape(-1).astype(np.int64)))
