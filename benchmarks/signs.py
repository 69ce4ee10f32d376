"""What `fusedres train` reaches on SIGNS with its defaults, fused and unfused, over three seeds.

    python benchmarks/signs.py --data FOLDER    train; write results, curve and docs
    python benchmarks/signs.py                  write the table in the docs anew

Accuracies only: how long it takes is measured on a GPU, by other means.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
from pathlib import Path
from typing import Any

import torch

import fusedres
from fusedres.training import Epoch, Recipe, train
from fusedres.training.figures import curves, save_figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "signs.json"
DOCS = ROOT / "docs" / "training.md"
CURVES = ROOT / "docs" / "signs_curves.png"
BEGIN, END = "<!-- benchmarks/results/cpu/signs.json -->", "<!-- end -->"
BACKENDS = {"fused": "auto", "unfused": "reference"}
SEEDS = (0, 1, 2)
LOGGED = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")  # by epoch
RECIPE = ("optimizer", "lr", "batch_size", "epochs", "warmup", "label_smoothing", "augment", "amp")


def measure(data: Path, runs: Path) -> dict[str, Any]:
    """Train with every backend and seed; a run that `runs` holds already is taken from there."""
    rows = []
    for path, backend in BACKENDS.items():
        for seed in SEEDS:
            out = runs / f"{path}-{seed}"
            if not (out / "result.json").exists():
                with fusedres.use_backend(backend):
                    train(data, out, Recipe(seed=seed), variant="coursera")
            result = json.loads((out / "result.json").read_text())
            with (out / "log.csv").open() as file:
                log = list(csv.DictReader(file))
            by_epoch = {name: [float(epoch[name]) for epoch in log] for name in LOGGED}
            accuracy = result["test_accuracy"]
            rows.append(
                {"path": path, "seed": seed, "test_accuracy": accuracy, "by_epoch": by_epoch}
            )
    return {
        "data": "SIGNS",
        "train_images": result["train_images"],
        "test_images": result["test_images"],
        "network": f"{result['model']}, variant {result['variant']}",
        "recipe": {name: result[name] for name in RECIPE},
        "device": f"cpu, threads: {torch.get_num_threads()}",
        "versions": {
            "fusedres": fusedres.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "runs": rows,
    }


def table(results: dict[str, Any]) -> str:
    """The results as the docs show them."""
    seeds = sorted({run["seed"] for run in results["runs"]})
    lines = [
        "| test accuracy | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
        "|---|" + "---|" * (len(seeds) + 1),
    ]
    for path in BACKENDS:
        found = [run["test_accuracy"] for run in results["runs"] if run["path"] == path]
        cells = [f"{accuracy:.1%}" for accuracy in [*found, sum(found) / len(found)]]
        lines.append(f"| {path} | " + " | ".join(cells) + " |")
    recipe = ", ".join(f"{name} {value}" for name, value in results["recipe"].items())
    where = f"{results['device']}, torch {results['versions']['torch']}"
    lines += [
        "",
        f"{results['train_images']} pictures to train on, {results['test_images']} to test on; "
        f"{results['network']}; {recipe}; {where}.",
    ]
    return "\n".join(lines)


def draw_curves(results: dict[str, Any]) -> Any:
    """Loss and accuracy of the first run."""
    run = results["runs"][0]
    rows = zip(*(run["by_epoch"][name] for name in LOGGED), strict=True)
    history = [Epoch(epoch, 0, 0.0, *row, 0.0, 0.0) for epoch, row in enumerate(rows, 1)]
    return curves(history, f"{results['data']}, {run['path']}, seed {run['seed']}")


def write_docs(results: dict[str, Any]) -> None:
    """Put table and curves in their place in the docs."""
    save_figure(CURVES, draw_curves(results))
    before, _, rest = DOCS.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


def main() -> None:
    """Measure where data are given; write the docs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder of train_signs.h5 and test_signs.h5")
    parser.add_argument("--runs", type=Path, default=Path("signs-runs"), help="where runs are kept")
    args = parser.parse_args()
    if args.data is not None:
        results = measure(args.data, args.runs)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_docs(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
