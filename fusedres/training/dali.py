"""Pictures in files by NVIDIA DALI: decoded, cropped and scaled on the GPU, or by its threads on a
CPU. Worker processes read the files, and say which part of each is wanted.

The same pictures and parts of them as without it; pixels differ by how DALI decodes and scales.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fusedres.training.data import FilePictures, Share
from fusedres.training.data.crops import middle, random_box
from fusedres.training.data.pictures import opened, upright_size
from fusedres.training.files import DataError, one_line, require
from fusedres.training.loader import Batch, read_by_workers

DECODED = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")  # Pillow's names of what DALI reads


class Encoded(NamedTuple):
    """Files of a batch, one behind the other in `content`, and the parts that are wanted."""

    content: Tensor  # [bytes] uint8
    lengths: list[int]
    corners: Tensor  # [B, 2] fp32, x and y in pixels
    extents: Tensor  # [B, 2]
    mirrored: Tensor  # [B] int32
    labels: Tensor
    numbers: list[int]  # of the pictures


class _Files(Dataset[Any]):
    """Pictures as they are in their files."""

    def __init__(self, pictures: FilePictures) -> None:
        self._pictures = pictures

    def __getitems__(self, share: Share) -> Encoded | DataError:
        try:
            rows = [self._one(at, share) for at in range(len(share.index))]
        except DataError as error:
            return error
        contents, boxes = zip(*rows, strict=True)
        places = torch.tensor([box[:4] for box in boxes])
        return Encoded(
            torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8),
            [len(content) for content in contents],
            places[:, :2].float(),
            places[:, 2:].float(),
            torch.tensor([box[4] for box in boxes], dtype=torch.int32),
            self._pictures.labels[torch.tensor(share.index)],
            share.index,
        )

    def _one(self, at: int, share: Share) -> tuple[bytes, list[int]]:
        """(content of the file, [x, y, width, height of the part in whole pixels, mirrored])"""
        path, size = self._pictures.paths[share.index[at]], self._pictures.size
        with opened(path) as image:
            known = image.format in DECODED
            shape = upright_size(image)
            if known:
                content = path.read_bytes()
            else:
                whole = io.BytesIO()
                image.convert("RGB").save(whole, "BMP")
                content = whole.getvalue()
        if share.draws is None:
            box = middle(shape, size, self._pictures.crop)
        else:
            box = random_box(shape, share.draws[at].tolist())
        sides = np.array(shape[::-1])
        corner = np.rint(sides * (box.left, box.top)).clip(0, sides - 1)
        end = np.rint(sides * (box.right, box.bottom)).clip(corner + 1, sides)
        return content, [*map(int, corner), *map(int, end - corner), int(box.mirrored)]


class _Feed:
    """What the pipeline asks for its next batch; apart from the loader, for a circle of the two
    would be taken down in any order, and worker processes be waited for.
    """

    def __init__(self) -> None:
        self.begin(iter(()))

    def begin(self, batches: Iterator[Any]) -> None:
        """Give these from now on."""
        self._pending = batches
        self.fed: list[Encoded] = []  # to the pipeline, not yet given out
        self.error: DataError | None = None

    def __call__(self) -> tuple[list[np.ndarray], ...]:
        """Files, corners and extents of parts, mirrored or not. StopIteration ends DALI's epoch; an
        error is kept for who waits for the pipeline, which would drop its kind.
        """
        batch = next(self._pending)
        if isinstance(batch, DataError):
            self.error = batch
            raise batch
        self.fed.append(batch)
        columns = batch.content.split(batch.lengths), batch.corners, batch.extents, batch.mirrored
        return tuple([row.numpy() for row in column] for column in columns)


class DaliLoader:
    """Batches of pictures in files; its iterator gives (uint8 [B, H, W, 3], int64 [B]) on the
    device.

    Args:
        pictures: in files.
        batches: which, in what order.
        device: where they are wanted.
        batch_size: pictures of the largest batch.
        workers: processes that read files, and DALI's threads, at least 1.

    Raises:
        TrainingError: DALI is not installed; says how to install it.
        DataError, while it iterates: a picture cannot be read.
    """

    def __init__(
        self,
        pictures: FilePictures,
        batches: Sampler[Share] | Sequence[Share],
        device: torch.device,
        batch_size: int,
        workers: int,
    ) -> None:
        self._dali: Any = require(
            "nvidia.dali", "NVIDIA DALI (nvidia-dali-cuda130)", "--loader dali", "dali"
        )
        self._pictures, self._device = pictures, device
        self._batch_size, self._threads = batch_size, max(1, workers)
        # not by fork: a child of a process with DALI's threads may crash
        self._files = read_by_workers(_Files(pictures), batches, workers, start="forkserver")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pipeline: Any = None
        self._feed = _Feed()

    def __iter__(self) -> Iterator[Batch]:
        feed = self._feed
        feed.begin(iter(self._files))
        if self._pipeline is None:
            self._pipeline = self._build()
        else:
            self._pipeline.reset()
        whole = False
        try:
            while True:
                try:
                    (images,) = self._pipeline.run()
                except StopIteration:
                    break
                except Exception as error:  # of DALI's own kinds, which say no file's name
                    raise feed.error or self._culprit(error) from None
                yield self._given(images, feed.fed.pop(0).labels)
            whole = True
        finally:
            feed.begin(iter(()))
            if not whole:  # what it has read ahead cannot be taken out of it
                self._pipeline = None

    def _given(self, images: Any, labels: Tensor) -> Batch:
        """Copies on the device, for DALI's memory is its own."""
        feed: Any = importlib.import_module("nvidia.dali.plugin.pytorch").feed_ndarray
        height, width = self._pictures.size
        shape = len(images), height, width, 3
        dense = images.as_tensor()
        if self._copies is None:
            out = torch.empty(shape, dtype=torch.uint8)
            feed(dense, out)
            return out, labels
        # on a stream of its own, which is done at once: the steps on the other one are not waited
        # for, and DALI may use its memory again
        with torch.cuda.stream(self._copies):
            out = torch.empty(shape, dtype=torch.uint8, device=self._device)
            feed(dense, out, cuda_stream=self._copies)
            labels = labels.to(self._device)
        self._copies.synchronize()
        for t in (out, labels):
            t.record_stream(torch.cuda.current_stream(self._device))
        return out, labels

    def _build(self) -> Any:
        fn, types = self._dali.fn, self._dali.types
        gpu = self._device.type == "cuda"
        where = "gpu" if gpu else "cpu"

        @self._dali.pipeline_def(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if gpu else None,
            prefetch_queue_depth=2,
        )
        def pipeline() -> Any:
            files, corners, extents, mirrored = fn.external_source(
                source=self._feed, num_outputs=4, batch=True
            )
            # what lies outside of the part is not decoded, where the format allows
            images = fn.decoders.image_slice(
                files,
                corners,
                extents,
                device="mixed" if gpu else "cpu",
                output_type=types.RGB,
                axis_names="WH",
                normalized_anchor=False,
                normalized_shape=False,
            )
            images = fn.resize(
                images,
                size=self._pictures.size,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
                device=where,
            )
            return fn.flip(images, horizontal=mirrored, device=where)

        made = pipeline()
        made.build()
        return made

    def _culprit(self, error: Exception) -> DataError:
        """The first picture under way that Pillow cannot read either, or DALI's own words."""
        for batch in self._feed.fed:
            for i in batch.numbers:
                try:
                    self._pictures.read([i])
                except DataError as found:
                    return found
        names = [str(self._pictures.paths[batch.numbers[0]]) for batch in self._feed.fed[:1]]
        return DataError(f"DALI cannot read a picture near {', '.join(names)}: {one_line(error)}")
