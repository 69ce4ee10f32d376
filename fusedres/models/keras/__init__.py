"""ResNets that Keras saved, as networks of fusedres; without Keras, by h5py alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from fusedres.models.keras import config as configs
from fusedres.models.keras.arrays import check, state_of
from fusedres.models.keras.files import KerasFile, RefusedError, opened
from fusedres.models.keras.naming import NAMINGS, Place, names_of, placed, recognise
from fusedres.models.resnet import FusedResNet50, ResNet
from fusedres.models.variants import VARIANTS, Variant
from fusedres.nn import FromPixels

__all__ = ["PREPROCESS", "from_keras"]

PREPROCESS = {  # what Keras's preprocessing subtracts from R, G, B
    "caffe": (123.68, 116.779, 103.939),
    "scale": None,
}
_OF_THE_FILE = ("num_classes", "in_channels", "weights")


class Converted(NamedTuple):
    """A network, and what its file was."""

    model: ResNet
    depth: int
    naming: str  # a key of naming.NAMINGS
    form: str
    arrays: int
    details: dict[str, Any]  # of the file's configuration that differ from the variant's
    source: str  # where variant and details are from, in words


def from_keras(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    preprocess: str | None = None,
    **options: Any,
) -> ResNet:
    """A ResNet-50, 101 or 152 with the weights that Keras saved.

    Every array has to find its place, and every place its array. The network's output are logits,
    what enters Keras's softmax; without a classifier in the file (include_top=False) it is the
    pooled features, and forward_features gives the map.

    Args:
        path: of a .keras, .weights.h5 or legacy .h5 file, of the whole model or of weights alone,
            also of a model that has the ResNet as a layer. Layers are found by the names of Keras
            Applications or of the Residual Networks assignment (of ResNet-50), else by the numbers
            of automatic ones.
        variant: whose details the network has, as in FusedResNet50. None: those in the file's
            configuration, where it has one (stride_in_1x1, eps, momentum, stem_pool_padding); else
            "keras" by names of Keras Applications, "coursera" by others.
        preprocess: None: the network takes what Keras's takes. Else it takes RGB pixels, of values
            from 0 to 255, as floats [N, 3, H, W] or uint8 [N, H, W, 3], and does itself what was
            done to the images of Keras's: "scale" divides by 255; "caffe" is the preprocess_input
            of Keras's ResNets, BGR less a mean. Order and scale go into the first convolution's
            weights; the mean is a step before it, `from_pixels`.
        **options: as FusedResNet50 takes them, eps=... and memory=... among them; num_classes and
            in_channels are the file's.

    Returns:
        The network in fp32, in training mode as a new one; a FusedResNet50 where it is one.

    Raises:
        FileNotFoundError, OSError: a file that is not there or cannot be read.
        ValueError: one that is damaged, of another kind or network; arrays that are missing, left
            over or of another shape, named as Keras does; an argument out of range.
        TypeError: an unknown option, or one that the file decides.
        ImportError: without h5py.
    """
    return convert(path, variant=variant, preprocess=preprocess, options=options).model


def convert(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    preprocess: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    cls: type[FusedResNet50] | None = None,
) -> Converted:
    """As from_keras, with what was read; `cls` is the class that has to come of it, if any."""
    _check(variant, preprocess, options)
    sketch = _sketch(50, variant, options)  # what is wrong with them is not the file's fault
    path = Path(os.fsdecode(path))
    prefix = f"from_keras: file {str(path)!r}"
    with opened(prefix, path) as file:
        return _converted(prefix, file, variant, preprocess, options, cls, sketch)


def _check(variant: str | None, preprocess: str | None, options: Mapping[str, Any]) -> None:
    if variant is not None and variant not in VARIANTS:
        accepted = ", ".join(map(repr, VARIANTS))
        raise ValueError(f"from_keras: variant: got {variant!r}, accepted: None, {accepted}")
    if preprocess is not None and preprocess not in PREPROCESS:
        accepted = ", ".join(map(repr, PREPROCESS))
        raise ValueError(f"from_keras: preprocess: got {preprocess!r}, accepted: None, {accepted}")
    for name in _OF_THE_FILE:
        if name in options:
            raise TypeError(f"from_keras: {name} comes from the file; leave it out")


def _converted(
    prefix: str,
    file: KerasFile,
    variant: str | None,
    preprocess: str | None,
    options: Mapping[str, Any],
    cls: type[FusedResNet50] | None,
    sketch: ResNet,
) -> Converted:
    nodes = configs.read_nodes(prefix, file.config) if isinstance(file.config, dict) else {}
    configs.check_classes(prefix, nodes)
    layers = configs.renamed(file.layers, nodes)
    naming, depth = recognise(prefix, layers)
    if cls is not None and depth != 50:
        raise RefusedError(
            f"{prefix} has a ResNet-{depth}, no ResNet-50; fusedres.models.from_keras takes it"
        )
    sketch = sketch if depth == 50 else _sketch(depth, variant, options)
    places, left = placed(prefix, sketch, naming, layers)
    for name in configs.classifiers(nodes):
        places.setdefault("fc", Place(name, None))
    asked, details, source = variant, dict[str, Any](), "as asked"
    if asked is None:
        asked, source = "keras" if naming == "keras" else "coursera", "by its names"
        if nodes:
            found = configs.details(prefix, nodes, dict(names_of(places)))
            (asked, details), source = _nearest(asked, found), "by its configuration"
    classes, channels = _size(places, "fc", 1), _size(places, "conv1", 2)
    if preprocess == "caffe" and channels not in (0, 3):  # 0: missing, as is said below
        raise RefusedError(f"{prefix} takes {channels} channels, preprocess 'caffe' is for 3")
    given = {**details, **options, "variant": asked, "in_channels": channels or 3}
    own = given.get("initializer", VARIANTS[asked].initializer)
    given["initializer"] = nn.init.zeros_  # there is nothing to fill yet
    with torch.device("meta"):
        model: ResNet
        if depth == 50:
            model = (cls or FusedResNet50)(classes or 1, **given)
        else:
            model = ResNet(depth, classes or 1, **given)
        if "fc" not in places:
            model.reset_classifier(0)
    model._initializer = own if isinstance(own, str) else "kaiming_normal"  # as the constructor
    what = f"{prefix} does not fit a ResNet-{depth} by {NAMINGS[naming]}"
    check(what, model, places, left, configs.biases(nodes))
    model.load_state_dict(state_of(model, places, preprocess), strict=True, assign=True)
    if preprocess is not None:
        pixels = FromPixels(PREPROCESS[preprocess] or (0.0,) * channels)
        model.from_pixels = pixels.to(model.conv1.weight)
    arrays = sum(len(layer.arrays) for layer in layers)
    return Converted(model, depth, naming, file.form, arrays, details, source)


def _sketch(depth: int, variant: str | None, options: Mapping[str, Any]) -> ResNet:
    """A network of that depth, with no weights."""
    given = {"variant": variant or "keras", "initializer": nn.init.zeros_, **options}
    with torch.device("meta"):
        return ResNet(depth, 1, **given)


def _nearest(asked: str, own: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The variant that has these details, or the one asked for and what it has other."""
    others = {name: _differences(VARIANTS[name], own) for name in (asked, *VARIANTS)}
    exact = next((name for name, differing in others.items() if not differing), asked)
    return exact, others[exact]


def _differences(variant: Variant, own: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in own.items() if not math.isclose(v, getattr(variant, k), rel_tol=1e-6)}


def _size(places: Mapping[str, Place], path: str, axis: int) -> int:
    """Along an axis of a layer's kernel; 0 where there is none."""
    layer = places[path].layer if path in places else None
    shape = () if layer is None or "kernel" not in layer.arrays else layer.arrays["kernel"].shape
    return int(shape[axis]) if axis < len(shape) else 0
