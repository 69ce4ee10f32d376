"""What Keras's ResNets call the layers that PyTorch's call layer1.0.conv1."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fusedres.nn import ConvBlock, IdentityBlock

NAMINGS = ("keras", "coursera")


def layer_names(model: nn.Module, naming: str) -> dict[str, str]:
    """Keras's names for the weighted layers of a ResNet-50, 101 or 152.

    Args:
        model: a fusedres ResNet of bottlenecks.
        naming:
            "keras": Keras Applications, conv1_conv, conv2_block1_1_conv, conv2_block1_0_bn (0 is
                the shortcut), ..., predictions;
            "coursera": the Residual Networks assignment, conv1, bn_conv1, res2a_branch2a,
                bn2a_branch1 (1 is the shortcut), ..., fc6 for six classes; ResNet-50 only.

    Returns:
        {path within the model: Keras's name}, in the order of the network; 107 for ResNet-50, 106
        without its classifier.

    Raises:
        ValueError: an unknown naming, or a model that it has no names for.
    """
    if naming not in NAMINGS:
        accepted = ", ".join(map(repr, NAMINGS))
        raise ValueError(f"layer_names: naming: got {naming!r}, accepted: {accepted}")
    stages: list[nn.Sequential] = [
        getattr(model, f"layer{i}", nn.Sequential()) for i in range(1, 5)
    ]
    blocks = [block for stage in stages for block in stage]
    if not blocks or not all(isinstance(b, IdentityBlock | ConvBlock) for b in blocks):
        raise ValueError(f"layer_names: {type(model).__name__} has no stages of bottlenecks")
    if naming == "coursera" and [len(stage) for stage in stages] != [3, 4, 6, 3]:
        raise ValueError("layer_names: the assignment names the layers of a ResNet-50 only")
    names = _keras(stages) if naming == "keras" else _coursera(stages)
    if isinstance(model.get_submodule("fc"), nn.Identity):
        return dict(names)
    return dict(names) | {"fc": "predictions" if naming == "keras" else f"fc{_classes(model)}"}


def _classes(model: nn.Module) -> int:
    return int(model.get_submodule("fc").out_features)  # type: ignore[arg-type]


def _layers(block: nn.Module) -> Iterator[tuple[str, str, int]]:
    """(convolution, BatchNorm, number) of a block; the shortcut's number is 0."""
    if block.downsample is not None:
        yield "downsample.0", "downsample.1", 0
    for i in (1, 2, 3):
        yield f"conv{i}", f"bn{i}", i


def _keras(stages: list[nn.Sequential]) -> Iterator[tuple[str, str]]:
    yield "conv1", "conv1_conv"
    yield "bn1", "conv1_bn"
    for s, stage in enumerate(stages, 1):
        for b, block in enumerate(stage):
            for conv, bn, i in _layers(block):
                name = f"conv{s + 1}_block{b + 1}_{i}"
                yield f"layer{s}.{b}.{conv}", f"{name}_conv"
                yield f"layer{s}.{b}.{bn}", f"{name}_bn"


def _coursera(stages: list[nn.Sequential]) -> Iterator[tuple[str, str]]:
    yield "conv1", "conv1"
    yield "bn1", "bn_conv1"
    for s, stage in enumerate(stages, 1):
        for letter, (b, block) in zip("abcdef", enumerate(stage), strict=False):
            for conv, bn, i in _layers(block):
                name = f"{s + 1}{letter}_branch" + ("1" if i == 0 else "2" + "abc"[i - 1])
                yield f"layer{s}.{b}.{conv}", f"res{name}"
                yield f"layer{s}.{b}.{bn}", f"bn{name}"
