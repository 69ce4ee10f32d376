"""Why residual networks: the gradient that reaches the first layers of a deep network, with
shortcuts and without.

Two networks of LAYERS convolutions with a sigmoid after each, a mean over the picture and a
classifier: `plain` computes h = sigmoid(conv(h)), `residual` h = h + sigmoid(conv(h)) from the
second on. Nothing else differs: same weights, same batches, neither has BatchNorm (which keeps the
gradient of a plain ReLU network from vanishing as well). A sigmoid's slope is 1/4 at most, so that
each plain layer takes a factor off the gradient on its way back; a shortcut lets it pass.

Source of the experiment: the Residual Networks assignment; of the shortcut: He et al., "Deep
Residual Learning for Image Recognition", 2015.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres.training.data import Data
from fusedres.training.figures import new_figure, text_of
from fusedres.training.files import TrainingError
from fusedres.training.preprocess import Preprocess, unit
from fusedres.training.trainer import seeded

LAYERS = 12
SHOWN = (1, 5, 10, LAYERS)
WIDTH = 16  # channels of each
SIZE = 16  # pixels that pictures are averaged down to
BATCH = 32
LEARNING_RATE = 0.05  # of SGD with momentum 0.9
NETWORKS = ("plain", "residual")


class DeepNetwork(nn.Module):
    """LAYERS 3x3 convolutions with sigmoids, with a shortcut around each or without.

    Args:
        in_channels, classes: what goes in, [N, C, H, W], and out, [N, classes].
        residual: whether there are shortcuts.
    """

    def __init__(self, in_channels: int, classes: int, *, residual: bool) -> None:
        super().__init__()
        channels = [in_channels] + [WIDTH] * LAYERS
        self.layers = nn.ModuleList(
            nn.Conv2d(channels[i], WIDTH, 3, padding=1) for i in range(LAYERS)
        )
        self.classifier = nn.Linear(WIDTH, classes)
        self.residual = residual
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, classes]."""
        h = x
        for i, layer in enumerate(self.layers):
            out = torch.sigmoid(layer(h))
            h = h + out if self.residual and i > 0 else out
        return self.classifier(h.mean((2, 3)))

    def gradient_norms(self) -> list[float]:
        """Of each layer's weight, the first layer first."""
        norms = [layer.weight.grad.norm() for layer in self.layers]  # type: ignore[union-attr, operator]
        return torch.stack(norms).tolist()


@dataclass(frozen=True)
class Gradients:
    """What `vanishing_gradients` measured.

    Attributes:
        norms: by network, [iterations][LAYERS]: the 2-norm of the gradient of a layer's weight.
        source: name of the data.
    """

    norms: dict[str, list[list[float]]]
    source: str

    def csv(self) -> bytes:
        """A line for each network, iteration and layer, both counted from 1."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("network", "iteration", "layer", "gradient_norm"))
        for network, iterations in self.norms.items():
            for i, norms in enumerate(iterations, 1):
                writer.writerows(
                    (network, i, layer, repr(norm)) for layer, norm in enumerate(norms, 1)
                )
        return text.getvalue().encode()

    def figure(self) -> Any:
        """Norm against iteration, a panel for each network, a line for each layer of SHOWN."""
        figure = new_figure(10, 4.6)
        figure.suptitle(
            f"Gradient norm by layer, {LAYERS} sigmoid layers, on {text_of(self.source)}"
        )
        titles = ("plain", "residual: the same with a shortcut around each layer")
        panels = figure.subplots(1, 2, sharey=True)
        colors = ("#440154", "#31688e", "#35b779", "#e8a50c")
        for axes, network, title in zip(panels, NETWORKS, titles, strict=True):
            for layer, color in zip(SHOWN, colors, strict=True):
                values = [norms[layer - 1] for norms in self.norms[network]]
                name = f"layer {layer}" + {1: " (first)", LAYERS: " (last)"}.get(layer, "")
                axes.plot(range(1, len(values) + 1), values, color=color, label=name)
            axes.set(title=title, xlabel="iteration", yscale="log")
            axes.grid(alpha=0.3)
            axes.set_xlim(1, max(2, len(self.norms[network])))
        panels[0].set_ylabel("2-norm of the weight's gradient")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(SHOWN))
        return figure


def vanishing_gradients(data: Data, *, iterations: int = 200, seed: int = 0) -> Gradients:
    """Train both networks for some iterations and watch the gradients of their layers.

    Args:
        data: pictures and labels; only the training part is used.
        iterations: SGD steps, from 1 up.
        seed: of weights and batches.

    Raises:
        TrainingError: iterations below 1.
    """
    if iterations < 1:
        raise TrainingError(f"iterations must be from 1 up, got {iterations}")
    preprocess = Preprocess.fit(data.train)
    norms: dict[str, list[list[float]]] = {}
    for network in NETWORKS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DeepNetwork(
                data.train.channels, len(data.classes), residual=network == "residual"
            )
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
        norms[network] = []
        for i in range(iterations):
            index = torch.randint(len(data.train), (BATCH,), generator=seeded(seed, i))
            images = preprocess(unit(data.train.read(index.tolist())))
            logits = model(F.adaptive_avg_pool2d(images, SIZE))
            optimizer.zero_grad()
            F.cross_entropy(logits, data.train.labels[index]).backward()
            norms[network].append(model.gradient_norms())
            optimizer.step()
    return Gradients(norms, data.name)
