"""How many pictures a second the loader alone brings, for each core that reads.

    python benchmarks/loader.py              measure; write results and docs
    python benchmarks/loader.py --docs       write the table in the docs anew

Pictures are JPEGs of ImageNet's usual size, cut out of scikit-learn's two photographs; they are in
the page cache, so that decoding is measured and no disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow
from sklearn.datasets import load_sample_images

import fusedres
from fusedres.training.data import ArrayPictures, FilePictures, Pictures, Share
from fusedres.training.loader import Batches, make_loader

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "loader.json"
DOCS = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- benchmarks/results/cpu/loader.json -->", "<!-- end -->"
PICTURES, WIDTH, HEIGHT, QUALITY = 512, 500, 375, 92
SIZE, BATCH = 224, 64
SECONDS, ROUNDS = 4.0, 5
TARGET = 9500  # pictures a second that a step is to take
CPU = torch.device("cpu")


def write_pictures(folder: Path) -> list[Path]:
    """JPEGs of different parts of two photographs."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    paths = []
    for i in range(PICTURES):
        photograph = photographs[i % 2]
        x, y = (
            rng.integers(0, side) for side in (photograph.width - WIDTH, photograph.height - HEIGHT)
        )
        path = folder / f"{i}.jpg"
        photograph.crop((x, y, x + WIDTH, y + HEIGHT)).save(path, quality=QUALITY)
        paths.append(path)
    return paths


def rate(pictures: Pictures, crops: bool, workers: int) -> float:
    """Pictures a second, once the first ones have come."""
    epoch = Batches(len(pictures), BATCH, 0, slice(0, BATCH), crops)
    batches: list[Share] = list(chain.from_iterable(repeat(list(epoch), 200)))
    loader = iter(make_loader(pictures, batches, CPU, batch_size=BATCH, workers=workers))
    for _ in range(2 * workers + 2):
        next(loader)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        count += len(next(loader)[1])
    return count / (time.perf_counter() - start)


def measure() -> dict[str, Any]:
    """The rates of every way to read, median over rounds in which all take turns."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        paths = write_pictures(Path(name))
        kib = sum(path.stat().st_size for path in paths) / len(paths) / 1024
        files = FilePictures(paths, torch.zeros(PICTURES).long(), (SIZE, SIZE), 0.875)
        held = ArrayPictures(files.read(range(PICTURES)), files.labels)
        ways: dict[str, tuple[Pictures, bool]] = {
            "random parts, worker processes": (files, True),
            "middles, worker processes": (files, False),
            "from memory, no worker": (held, False),
        }
        counts = sorted({1, cores})
        found: dict[tuple[str, int], list[float]] = {}
        for _ in range(ROUNDS):
            for way, (pictures, crops) in ways.items():
                for workers in counts if pictures is files else (1,):
                    found.setdefault((way, workers), []).append(rate(pictures, crops, workers))
    return {
        "pictures": f"JPEG, {WIDTH}x{HEIGHT}, quality {QUALITY}, {kib:.0f} KiB, to {SIZE}x{SIZE}",
        "cores": cores,
        "rows": [
            {"way": way, "workers": workers, "img_per_s": round(median(rates), 1)}
            for (way, workers), rates in found.items()
        ],
        "versions": {
            "fusedres": fusedres.__version__,
            "torch": torch.__version__,
            "pillow": pillow,
            "python": platform.python_version(),
        },
    }


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        f"| what reads | cores | img/s | img/s a core | cores for {TARGET:,} img/s |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        each = row["img_per_s"] / row["workers"]
        needed = -(-TARGET // each)
        cells = (
            row["way"],
            row["workers"],
            *(f"{v:,.0f}" for v in (row["img_per_s"], each, needed)),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    lines += ["", f"{results['pictures']}; a CPU of {results['cores']} cores, {versions}."]
    return "\n".join(lines)


def write_docs(results: dict[str, Any]) -> None:
    """Put the table into the page."""
    text = DOCS.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, DOCS
    DOCS.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true")
    if not parser.parse_args().docs:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    write_docs(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
