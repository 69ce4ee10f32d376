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
import shutil
from pathlib import Path
from typing import Any

import torch

import fusedres
from fusedres.training import train

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "signs.json"
DOCS = ROOT / "docs" / "training.md"
CURVES = ROOT / "docs" / "signs_curves.png"
BEGIN, END = "<!-- benchmarks/results/cpu/signs.json -->", "<!-- end -->"
BACKENDS = {"fused": "auto", "unfused": "reference"}
SEEDS = (0, 1, 2)
RECIPE = ("optimizer", "lr", "batch_size", "epochs", "warmup", "label_smoothing", "augment", "amp")


def measure(data: Path, runs: Path) -> dict[str, Any]:
    """Train with every backend and seed; a run that `runs` holds already is taken from there."""
    rows = []
    for path, backend in BACKENDS.items():
        for seed in SEEDS:
            out = runs / f"{path}-{seed}"
            if not (out / "result.json").exists():
                with fusedres.use_backend(backend):
                    train(data, out, fusedres.training.Recipe(seed=seed), variant="coursera")
            result = json.loads((out / "result.json").read_text())
            with (out / "log.csv").open() as file:
                log = list(csv.DictReader(file))
            rows.append(
                {
                    "path": path,
                    "seed": seed,
                    "test_accuracy": result["test_accuracy"],
                    "test_accuracy_by_epoch": [float(epoch["test_accuracy"]) for epoch in log],
                    "train_loss_by_epoch": [float(epoch["train_loss"]) for epoch in log],
                }
            )
    shutil.copyfile(runs / "fused-0" / "curves.png", CURVES)
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


def write_docs(results: dict[str, Any]) -> None:
    """Put the table in its place in the docs."""
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
