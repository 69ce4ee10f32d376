"""The vanishing gradient, as the files that the command writes show it."""

from __future__ import annotations

import csv
import itertools
import statistics
from pathlib import Path

import pytest
import tiny
import torch

from fusedres.cli import main
from fusedres.training import TrainingError
from fusedres.training.gradients import LAYERS, DeepNetwork, vanishing_gradients


def medians(path: Path) -> dict[str, list[float]]:
    """By network, of each layer."""
    norms: dict[str, dict[int, list[float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            layers = norms.setdefault(row["network"], {})
            layers.setdefault(int(row["layer"]), []).append(float(row["gradient_norm"]))
    return {
        network: [statistics.median(layers[i]) for i in range(1, LAYERS + 1)]
        for network, layers in norms.items()
    }


def test_the_first_layers_gradient_vanishes_without_shortcuts_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    assert main(["gradients", "--iterations", "60", "--out", str(tmp_path)]) == 0
    found = medians(tmp_path / "gradients.csv")
    assert found.keys() == {"plain", "residual"}
    plain, residual = found["plain"], found["residual"]
    assert plain[0] < 1e-5 * plain[-1]
    assert all(a < b for a, b in itertools.pairwise(plain))
    assert residual[0] > 0.1 * residual[-1]
    assert max(residual) < 100 * min(residual)
    assert (tmp_path / "gradients.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert f"{plain[0]:.1e}" in out and f"{residual[-1]:.1e}" in out


def test_the_table_has_every_iteration_and_layer() -> None:
    gradients = vanishing_gradients(tiny.data(), iterations=3)
    lines = gradients.csv().decode().splitlines()
    assert lines[0] == "network,iteration,layer,gradient_norm"
    assert len(lines) == 1 + 2 * 3 * LAYERS
    assert lines[1] == f"plain,1,1,{gradients.norms['plain'][0][0]!r}"
    assert lines[-1] == f"residual,3,{LAYERS},{gradients.norms['residual'][2][-1]!r}"
    assert vanishing_gradients(tiny.data(), iterations=3) == gradients  # the same seed
    assert vanishing_gradients(tiny.data(), iterations=3, seed=1) != gradients


def test_nothing_but_the_shortcuts_differs() -> None:
    plain, residual = (DeepNetwork(3, 2, residual=flag) for flag in (False, True))
    residual.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 16, 16)
    h = torch.sigmoid(plain.layers[0](x))
    g = h
    for layer in list(plain.layers)[1:]:
        h, g = torch.sigmoid(layer(h)), g + torch.sigmoid(layer(g))
    assert torch.equal(plain(x), plain.classifier(h.mean((2, 3))))
    assert torch.equal(residual(x), plain.classifier(g.mean((2, 3))))


def test_no_iterations() -> None:
    with pytest.raises(TrainingError, match="iterations must be from 1 up, got 0"):
        vanishing_gradients(tiny.data(), iterations=0)
