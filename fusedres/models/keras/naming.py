"""Which of Keras's layers is which of ours: by the names of Keras Applications, by those of the
Residual Networks assignment, or, where names were given automatically, by their numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

from torch import nn

from fusedres.models.keras.files import Layer, RefusedError
from fusedres.models.layer_names import layer_names

NAMINGS = {  # what an error and the command line call them
    "keras": "Keras Applications",
    "coursera": "the Residual Networks assignment",
    "automatic": "automatic names",
}
CONVOLUTIONS = {53: 50, 104: 101, 155: 152}  # of a network: its depth
_PATTERNS = {
    "keras": r"conv1_(conv|bn)|conv[2-5]_block\d+_[0-3]_(conv|bn)",
    "coursera": r"conv1|bn_conv1|(res|bn)[2-5][a-z]_branch(1|2[abc])",
    "automatic": r"(conv(olution)?2d|batch_?normalization(_v\d)?)(_\d+)?",
}
_LAST_BLOCK = {6: 50, 23: 101, 36: 152}  # of Keras's conv4: the depth
_SHOWN = 3

Shape = tuple[int, ...]


class Recognised(NamedTuple):
    """How the layers of a file are called, and how deep a network they make."""

    naming: str
    depth: int


def recognise(prefix: str, layers: Sequence[Layer]) -> Recognised:
    """Raises RefusedError where names are of no naming known, or of a network of another kind."""
    names = [layer.name for layer in layers if layer.kind in ("conv", "bn")]
    second = [n for n in (x.name for x in layers) if n.endswith(("_preact_bn", "post_bn"))]
    if second:
        raise RefusedError(
            f"{prefix} is of a ResNet V2, which normalises before it convolves "
            f"({second[0]}); accepted: ResNet-50, 101, 152 of the first version"
        )
    hits = {
        naming: sum(re.fullmatch(pattern, _plain(naming, name)) is not None for name in names)
        for naming, pattern in _PATTERNS.items()
    }
    naming = max(hits, key=hits.__getitem__)
    if hits[naming] == 0:
        shown = ", ".join(names[:_SHOWN]) or "none"
        raise RefusedError(
            f"{prefix} has no convolutions by names that are known (it has {shown}); accepted: "
            "names of Keras Applications (conv1_conv, conv2_block1_1_conv), of the Residual "
            "Networks assignment (conv1, res2a_branch2a), automatic ones (conv2d_1)"
        )
    if naming == "coursera":
        return Recognised(naming, 50)
    if naming == "automatic":
        return Recognised(naming, _depth_by_count(prefix, layers))
    found = (re.match(r"conv([34])_block(\d+)_", name) for name in names)
    blocks = [(int(m[1]), int(m[2])) for m in found if m is not None]
    last = max((b for stage, b in blocks if stage == 4), default=0)
    return Recognised(naming, next((d for b, d in _LAST_BLOCK.items() if last <= b), 152))


def _plain(naming: str, name: str) -> str:
    """Without the number that TensorFlow adds to a name that it has already, in nested models."""
    if naming == "automatic" or re.fullmatch(_PATTERNS[naming], name):
        return name
    return re.sub(r"_\d+$", "", name)


def _depth_by_count(prefix: str, layers: Sequence[Layer]) -> int:
    counts = Counter(layer.kind for layer in layers)
    if counts["conv"] != counts["bn"] or counts["conv"] not in CONVOLUTIONS:
        accepted = ", ".join(f"{c} of each (ResNet-{depth})" for c, depth in CONVOLUTIONS.items())
        raise RefusedError(
            f"{prefix} has {counts['conv']} convolutions and {counts['bn']} BatchNorms by "
            f"automatic names; accepted: {accepted}"
        )
    return CONVOLUTIONS[counts["conv"]]


class Place(NamedTuple):
    """A layer of ours: what Keras calls it, and the layer of the file, if there is one."""

    name: str
    layer: Layer | None


def placed(
    prefix: str, model: nn.Module, naming: str, layers: Sequence[Layer]
) -> tuple[dict[str, Place], list[Layer]]:
    """The layers by their path within a model of that depth, and those that have no place in it.

    The classifier is the one Dense layer, whatever its name.

    Raises:
        RefusedError: automatic names that do not make an order.
    """
    dense = [layer for layer in layers if layer.kind == "dense"]
    width = keras_shape(weight_shape(model, "fc"))[0]
    fits = [layer for layer in dense if (_shape(layer) or (0,))[0] == width]
    classifier = (fits or dense)[:1]
    others = [layer for layer in layers if all(layer is not c for c in classifier)]
    if naming == "automatic":
        places, left = _by_number(prefix, model, others)
    else:
        places, left = _by_name(model, naming, others)
    if classifier:
        places["fc"] = Place(classifier[0].name, classifier[0])
    return places, left


def _by_name(
    model: nn.Module, naming: str, layers: Sequence[Layer]
) -> tuple[dict[str, Place], list[Layer]]:
    known: dict[str, Layer] = {}
    left = []
    for layer in layers:
        name = _plain(naming, layer.name)
        if name in known:
            left.append(layer)
        known.setdefault(name, layer)
    names = {p: name for p, name in layer_names(model, naming).items() if p != "fc"}
    places = {path: Place(name, known.get(name)) for path, name in names.items()}
    taken = set(names.values())
    return places, left + [layer for name, layer in known.items() if name not in taken]


# --- by number ------------------------------------------------------------------------------------


def _by_number(
    prefix: str, model: nn.Module, layers: Sequence[Layer]
) -> tuple[dict[str, Place], list[Layer]]:
    convs, bns = (_in_order(prefix, [x for x in layers if x.kind == k]) for k in ("conv", "bn"))
    units = _units(model)
    order = _order(prefix, model, units, convs)
    places: dict[str, Place] = {}
    for unit, start in units:
        for position, which in enumerate(order if len(unit) == 4 else range(len(unit))):
            for path, layer in zip(unit[which], (convs, bns), strict=True):
                found = layer[start + position]
                places[path] = Place(found.name, found)
    return places, [layer for layer in layers if layer.kind not in ("conv", "bn")]


def _in_order(prefix: str, layers: Sequence[Layer]) -> list[Layer]:
    def number(layer: Layer) -> int:
        found = re.search(r"_(\d+)$", layer.name)
        return int(found[1]) if found else 0

    for name, count in Counter(layer.name for layer in layers).items():
        if count > 1:
            raise RefusedError(f"{prefix} has {count} layers of the name {name!r}")
    odd = [x.name for x in layers if not re.fullmatch(_PATTERNS["automatic"], x.name)]
    if odd:
        raise RefusedError(
            f"{prefix} has automatic names and others ({odd[0]}), which make no order"
        )
    return sorted(layers, key=number)


Unit = list[tuple[str, str]]  # paths of convolutions and their BatchNorms


def _units(model: nn.Module) -> list[tuple[Unit, int]]:
    """The stem and each block: what is in them, a shortcut last; how many stand before."""
    found: list[tuple[Unit, int]] = [([("conv1", "bn1")], 0)]
    count = 1
    for i in range(1, 5):
        for path, block in model.get_submodule(f"layer{i}").named_children():
            at = f"layer{i}.{path}"
            unit = [(f"{at}.conv{k}", f"{at}.bn{k}") for k in (1, 2, 3)]
            if getattr(block, "downsample", None) is not None:
                unit.append((f"{at}.downsample.0", f"{at}.downsample.1"))
            found.append((unit, count))
            count += len(unit)
    return found


def _order(
    prefix: str, model: nn.Module, units: Sequence[tuple[Unit, int]], convs: Sequence[Layer]
) -> tuple[int, ...]:
    """Which part of a block with a projection comes first, second, ...: in all the same, by the
    shapes in stages 2 to 4; in stage 1 the last convolution is shaped like the shortcut.
    """
    orders = []
    for unit, start in [u for u in units if len(u[0]) == 4][1:]:
        wanted = [keras_shape(weight_shape(model, conv)) for conv, _ in unit]
        given = [_shape(layer) for layer in convs[start : start + 4]]
        orders += [p for p in permutations(range(4)) if [wanted[i] for i in p] == given]
    if len(set(orders)) != 1:
        shown = ", ".join(layer.name for layer in convs[1:5])
        raise RefusedError(
            f"{prefix}: the order of its automatic names ({shown}, ...) is not that of a ResNet's "
            "blocks, each with its shortcut at the same place"
        )
    return orders[0]


def _shape(layer: Layer) -> Shape | None:
    return tuple(layer.arrays["kernel"].shape) if "kernel" in layer.arrays else None


def weight_shape(model: nn.Module, path: str) -> Shape:
    """Of a layer of ours."""
    return tuple(model.get_parameter(f"{path}.weight").shape)


def keras_shape(shape: Sequence[int]) -> Shape:
    """Of a kernel: [K, C, R, S] -> (R, S, C, K); of a dense one [K, C] -> (C, K); of others."""
    if len(shape) == 4:
        return (shape[2], shape[3], shape[1], shape[0])
    return tuple(reversed(shape))


def names_of(places: Mapping[str, Place]) -> Iterator[tuple[str, str]]:
    """(Keras's name as in the file, path), of layers that are there."""
    for path, place in places.items():
        if place.layer is not None:
            yield place.layer.name, path
