"""What every source of data ends in: labelled pictures for training and for testing."""

from __future__ import annotations

import math
import os
import stat
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fusedres.training.data.crops import Box, middle, random_box
from fusedres.training.files import DataError, one_line, require

SMALLEST = 32  # pixels: what a ResNet's five halvings leave one of
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name for so many channels
FINGERPRINTED = 16  # pictures of each part, evenly spread, that stand for all
HELD_OUT = 0.2  # of every class, where a source has no test part
ORIENTATION = 0x0112  # in EXIF
ON_ITS_SIDE = (5, 6, 7, 8)  # values of it
DRAFT = 2  # a JPEG is decoded at this many times the wanted size at least, where it is larger


@dataclass(frozen=True)
class Share:
    """Pictures to read for a step: those of a batch that this process takes."""

    index: list[int]
    draws: Tensor | None = None  # [B, crops.DRAWS], of the parts that are cut out of them


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Pictures with labels.

    Attributes:
        labels: [N] int64.
        size: (H, W) of every picture.
        channels: of every picture.
    """

    labels: Tensor
    size: tuple[int, int]
    channels: int
    whole = False  # whether more of a picture is there than what `read` gives

    @abstractmethod
    def read(self, index: Sequence[int]) -> Tensor:
        """Some of the pictures: uint8 [B, H, W, C]."""

    def read_share(self, share: Share) -> Tensor:
        """As `read`; of pictures that are there as a whole the parts that are drawn."""
        return self.read(share.index)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.read([index])[0], self.labels[index]

    def __getitems__(self, share: Share) -> tuple[Tensor, Tensor] | DataError:
        """A batch, as torch's DataLoader asks for one. An error is returned, not raised: from a
        worker process it would arrive wrapped in a traceback.
        """
        try:
            return self.read_share(share), self.labels[torch.as_tensor(share.index)]
        except DataError as error:
            return error


class ArrayPictures(Pictures):
    """Pictures held in memory.

    Args:
        images: uint8 [N, H, W, C].
        labels: int64 [N].
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.size = images.shape[1], images.shape[2]
        self.channels = images.shape[3]

    def read(self, index: Sequence[int]) -> Tensor:
        return self.images[torch.as_tensor(index)]


class FilePictures(Pictures):
    """Pictures in files of any format that Pillow reads.

    Args:
        paths: N files.
        labels: int64 [N].
        size: (H, W), what they are scaled and cropped to.
        crop: share of the sides that is kept of the largest part of that shape, above 0 up to 1.
    """

    whole = True

    def __init__(
        self, paths: Sequence[Path], labels: Tensor, size: tuple[int, int], crop: float = 1.0
    ) -> None:
        self.paths = paths if isinstance(paths, Paths) else Paths(paths)
        self.labels, self.size, self.channels, self.crop = labels, size, 3, crop

    def read(self, index: Sequence[int]) -> Tensor:
        return torch.stack(
            [read_picture(self.paths[i], self.size, self.channels, crop=self.crop) for i in index]
        )

    def read_share(self, share: Share) -> Tensor:
        if share.draws is None:
            return self.read(share.index)
        rows = zip(share.index, share.draws.tolist(), strict=True)
        return torch.stack([read_part(self.paths[i], self.size, row) for i, row in rows])


class Paths(Sequence[Path]):
    """Many paths in one buffer: a million objects would be copied into every worker process, page
    by page, as their reference counts are touched.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        names = [os.fsencode(path) for path in paths]
        self._names = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> Path: ...
    @overload
    def __getitem__(self, i: slice) -> list[Path]: ...
    def __getitem__(self, i: int | slice) -> Path | list[Path]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        start, end = self._ends[range(len(self))[i] :][:2]
        return Path(os.fsdecode(self._names[start:end]))


@dataclass(frozen=True)
class Failure:
    """What could not be read, where others can.

    Attributes:
        path: a picture, or a folder.
        error: why; names the path.
    """

    path: Path
    error: DataError


@dataclass(frozen=True)
class Data:
    """What a classifier learns from and is tested on.

    Args:
        train, test: the two parts; no picture is in both.
        classes: names, by label.
        source: where it came from: "digits", or the whole path.

    Raises:
        DataError: a part is empty, the training part is of one class only, or the parts differ in
            size or channels.
    """

    train: Pictures
    test: Pictures
    classes: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        for name, part in (("train", self.train), ("test", self.test)):
            if not len(part):
                raise DataError(f"{self.source}: no picture to {name} on")
        present = self.train.labels.unique().tolist()
        if len(present) < 2:
            raise DataError(
                f"{self.source}: all {len(self.train)} training pictures are of one class, "
                f"{self.classes[present[0]]!r}; a classifier needs two"
            )
        shapes = [(*part.size, part.channels) for part in (self.train, self.test)]
        if shapes[0] != shapes[1]:
            raise DataError(
                f"{self.source}: training pictures are {list(shapes[0])}, test pictures "
                f"{list(shapes[1])} [H, W, C]"
            )

    @property
    def name(self) -> str:
        """Of the source, without the way to it."""
        return Path(self.source).name

    @property
    def fingerprint(self) -> str:
        """Tells whether a run can go on with this data: sizes, classes, labels, some pictures."""
        parts = []
        for part in (self.train, self.test):
            some = part.read(range(0, len(part), -(-len(part) // FINGERPRINTED)))
            crcs = [zlib.crc32(t.numpy().tobytes()) for t in (part.labels, some)]
            parts.append((len(part), *crcs))
        return repr((parts, self.classes, self.train.size, self.train.channels))


def hold_out(pictures: Pictures, classes: tuple[str, ...], source: str) -> tuple[list[int], ...]:
    """(training, test) indices: the same at every call, every class in the same proportion.

    Raises:
        DataError: a class is too small to be divided.
    """
    counts = Counter(pictures.labels.tolist())
    for label, count in counts.items():
        if count < 2:
            raise DataError(
                f"{source}: class {classes[label]!r} has a single picture, and there is no test "
                "part: give it another picture, or the data a test part"
            )
    generator = torch.Generator().manual_seed(0)
    train: list[int] = []
    test: list[int] = []
    for label in sorted(counts):
        index = (pictures.labels == label).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=generator)]
        held = max(1, round(HELD_OUT * len(index)))
        test += index[:held].tolist()
        train += index[held:].tolist()
    return sorted(train), sorted(test)


def read_picture(
    path: Path, size: tuple[int, int], channels: int = 3, *, crop: float = 1.0
) -> Tensor:
    """A picture file as uint8 [H, W, C]: turned upright, cropped around its middle, scaled.

    Args:
        path: of any format that Pillow reads.
        size: (H, W).
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        crop: share of the sides that is kept of the largest part of the shape of `size`; 0.875 is
            usual for ImageNet.

    Raises:
        DataError: as `opened`; or it has more than 8 bits a channel.
    """
    with opened(path) as image:
        from PIL import Image

        box = middle(upright_size(image), size, crop)
        return _pixels(path, image, box, size, channels, Image.Resampling.BICUBIC)


def read_part(path: Path, size: tuple[int, int], draws: Sequence[float]) -> Tensor:
    """A random part of a picture file, turned upright, as uint8 RGB [H, W, 3], scaled bilinearly.

    Args:
        path: of any format that Pillow reads.
        size: (H, W).
        draws: as crops.random_box takes them.

    Raises:
        DataError: as read_picture.
    """
    with opened(path) as image:
        from PIL import Image

        box = random_box(upright_size(image), draws)
        return _pixels(path, image, box, size, 3, Image.Resampling.BILINEAR)


def upright_size(image: Any) -> tuple[int, int]:
    """(H, W) of Pillow's image, of which the header has been read, once it is turned upright."""
    width, height = image.size
    on_its_side = image.getexif().get(ORIENTATION) in ON_ITS_SIDE
    return (width, height) if on_its_side else (height, width)


def _pixels(
    path: Path, image: Any, box: Box, size: tuple[int, int], channels: int, resampling: Any
) -> Tensor:
    """What is in the box, uint8 [H, W, C]."""
    from PIL import Image, ImageOps

    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise DataError(f"{path}: has more than 8 bits a channel (mode {image.mode})")
    least = DRAFT * max(size[0] / (box.bottom - box.top), size[1] / (box.right - box.left))
    image.draft(None, (math.ceil(least), math.ceil(least)))  # of both sides: it may lie on one
    ImageOps.exif_transpose(image, in_place=True)
    width, height = image.size
    within = (box.left * width, box.top * height, box.right * width, box.bottom * height)
    # rounding may not lead out of the picture
    within = (max(within[0], 0), max(within[1], 0), min(within[2], width), min(within[3], height))
    fitted = image.convert(MODES[channels]).resize(size[::-1], resampling, box=within)
    if box.mirrored:
        fitted = fitted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(fitted)).view(*size, channels)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A picture file as Pillow's image, of which the header has been read.

    Raises:
        DataError: no such file, not a regular one, not to be read, no picture, a damaged one (also
            where decoding it within the `with` block finds so), or one of more pixels than
            PIL.Image.MAX_IMAGE_PIXELS, of which none has been decoded.
    """
    require("PIL", "pillow", "reading pictures")
    from PIL import Image

    # all of Pillow's formats, in the order in which open() adds them: while one thread does so,
    # open() in another takes what it has not seen yet for no picture
    Image.preinit()
    Image.init()
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a named pipe is to wait for a writer
            raise DataError(f"{path}: not a regular file")
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:  # Pillow only warns
                raise DataError(
                    f"{path}: refused as a decompression bomb: {image.width}x{image.height} "
                    f"pixels, more than PIL.Image.MAX_IMAGE_PIXELS = {limit}"
                )
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: refused as a decompression bomb: {one_line(error)}") from None
    except Exception as error:  # of many kinds: a damaged file can end anywhere in a decoder
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: cannot read: {error.strerror}") from None
        raise DataError(f"{path}: not a picture that can be read: {one_line(error)}") from None


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures [N, H, W, C] with values 0 to 255, at another size and as uint8."""
    if images.shape[1:3] != size:
        planes = images.permute(0, 3, 1, 2).to(torch.float32)
        planes = F.interpolate(planes, size, mode="bilinear", antialias=True)
        images = planes.permute(0, 2, 3, 1).round().clamp(0, 255)
    return images.to(torch.uint8).contiguous()
