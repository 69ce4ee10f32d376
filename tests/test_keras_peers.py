"""from_keras against Keras itself: its networks, saved by it in each form, computed by both.

CONTRIBUTING says what has to be installed; nothing here is skipped.
"""

from __future__ import annotations

import importlib
import json
import os
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import keras_files as kf
import numpy as np
import pytest
import torch
from torch import Tensor

import fusedres
from fusedres.models import from_keras

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore::DeprecationWarning:keras")]

TOLERANCE = 1e-5  # of the largest logit, in fp32
FORMS = ["x.keras", "x.h5", "x.weights.h5"]


@cache
def keras() -> Any:
    os.environ["KERAS_BACKEND"] = "torch"  # read when it is imported
    return importlib.import_module("keras")


def randomised(model: Any, seed: int = 0) -> Any:
    """Every array drawn so that none is what it begins as, and activations stay of order 1."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if hasattr(layer, "layers"):
            randomised(layer, seed + 1)
            continue
        values = []
        for variable in layer.weights:
            name, shape = variable.name, tuple(variable.shape)
            if name == "kernel":
                values.append(rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape) * 1.3)
            elif name in ("gamma", "moving_variance"):
                values.append(rng.uniform(0.5, 1.5, shape))
            else:
                values.append(rng.normal(0, 0.2, shape))
        layer.set_weights(values)
    return model


def assignment(named: bool, classes: int = 6) -> Any:
    """The Residual Networks assignment's network, by its names or by automatic ones."""
    k = keras()
    layers = k.layers

    def name(text: str) -> dict[str, str]:
        return {"name": text} if named else {}

    def conv(x: Any, filters: int, size: int, names: tuple[str, str], stride: int = 1) -> Any:
        same = {"padding": "same" if size == 3 else "valid", "strides": stride}
        x = layers.Conv2D(filters, size, **same, **name(names[0]))(x)
        return layers.BatchNormalization(axis=3, **name(names[1]))(x)

    inputs = k.Input((64, 64, 3))
    x = conv(layers.ZeroPadding2D((3, 3))(inputs), 64, 7, ("conv1", "bn_conv1"), 2)
    x = layers.MaxPooling2D((3, 3), strides=(2, 2))(layers.Activation("relu")(x))
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 2):
        for b in range(blocks):
            stride, shortcut = (2 if stage > 2 and b == 0 else 1), x
            at = f"{stage}{'abcdef'[b]}_branch"
            for part, filters, size in (("2a", width, 1), ("2b", width, 3), ("2c", 4 * width, 1)):
                names = (f"res{at}{part}", f"bn{at}{part}")
                x = conv(x, filters, size, names, stride if part == "2a" else 1)
                x = x if part == "2c" else layers.Activation("relu")(x)
            if b == 0:
                shortcut = conv(shortcut, 4 * width, 1, (f"res{at}1", f"bn{at}1"), stride)
            x = layers.Activation("relu")(layers.Add()([x, shortcut]))
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    return k.Model(inputs, layers.Dense(classes, activation="softmax", **name(f"fc{classes}"))(x))


def application(network: str, **options: Any) -> Any:
    given = {"weights": None, "classes": 7, "input_shape": (75, 75, 3)} | options
    return getattr(keras().applications, network)(**given)


def with_a_head() -> Any:
    """An application as a layer, behind augmentation and before a Dense."""
    k = keras()
    base = application("ResNet50", include_top=False, classes=1000)
    base.trainable = False
    inputs = k.Input((75, 75, 3))
    x = k.layers.GlobalAveragePooling2D()(base(k.layers.RandomFlip()(inputs)))
    return k.Model(inputs, k.layers.Dense(4, name="mine")(k.layers.Dropout(0.3)(x)))


NETWORKS: dict[str, tuple[Callable[[], Any], str]] = {
    "ResNet50": (lambda: application("ResNet50"), "keras"),
    "ResNet101": (lambda: application("ResNet101"), "keras"),
    "assignment": (lambda: assignment(True), "coursera"),
    "assignment, automatic names": (lambda: assignment(False), "coursera"),
    "ResNet50 with a head": (with_a_head, "keras"),
}


def logits_of(model: Any, images: np.ndarray) -> Tensor:
    """What enters the softmax: Keras's own computation, less its last activation."""
    last = model.layers[-1]
    activation, last.activation = last.activation, keras().activations.linear
    try:
        return torch.from_numpy(keras().ops.convert_to_numpy(model(images, training=False)))
    finally:
        last.activation = activation


def saved(model: Any, path: Path) -> Path:
    (model.save_weights if path.name.endswith(".weights.h5") else model.save)(path)
    return path


def error_of(ours: Tensor, truth: Tensor) -> float:
    assert ours.shape == truth.shape and truth.abs().max() > 0.1
    assert (truth[0] - truth[1]).abs().max() > 1e-3 * truth.abs().max()  # images matter
    return float((ours - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_logits(name: str, tmp_path: Path) -> None:
    make, variant = NETWORKS[name]
    keras().backend.clear_session()
    model = randomised(make())
    side = model.input_shape[1]
    images = np.random.default_rng(1).normal(0, 1, (2, side, side, 3)).astype(np.float32)
    truth = logits_of(model, images)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    for form in FORMS:
        ours = from_keras(saved(model, tmp_path / form)).eval()
        assert ours.variant == variant and ours.num_classes == model.output_shape[1]
        with torch.no_grad():
            error = error_of(ours(x), truth)
        print(f"{name}, {form}: error {error:.1e}")
        assert error < TOLERANCE, form
        (tmp_path / form).unlink()


@pytest.mark.parametrize("preprocess", ["caffe", "scale"])
def test_the_same_logits_of_pixels(preprocess: str, tmp_path: Path) -> None:
    model = randomised(application("ResNet50"))
    frames = np.random.default_rng(2).integers(0, 256, (2, 75, 75, 3)).astype(np.uint8)
    if preprocess == "caffe":
        images = keras().applications.resnet.preprocess_input(frames.astype(np.float32))
    else:
        images = frames.astype(np.float32) / 255
    truth = logits_of(model, images)
    path = saved(model, tmp_path / "x.keras")
    ours = fusedres.FusedResNet50.from_keras(path, preprocess=preprocess).eval()
    pixels = torch.from_numpy(frames)
    with torch.no_grad():
        for x in (pixels, pixels.permute(0, 3, 1, 2).float()):
            error = error_of(ours(x), truth)
            assert error < TOLERANCE
            assert error_of(fusedres.freeze(ours)(x), truth) < TOLERANCE
    print(f"{preprocess}: error {error:.1e}")
    path.unlink()


def test_the_map_without_a_classifier(tmp_path: Path) -> None:
    model = randomised(application("ResNet50", include_top=False, classes=1000))
    images = np.random.default_rng(1).normal(0, 1, (2, 75, 75, 3)).astype(np.float32)
    truth = torch.from_numpy(keras().ops.convert_to_numpy(model(images))).permute(0, 3, 1, 2)
    ours = from_keras(saved(model, tmp_path / "x.h5")).eval()
    with torch.no_grad():
        found = ours.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert error_of(found, truth) < TOLERANCE
    (tmp_path / "x.h5").unlink()


def test_the_second_version_is_refused(tmp_path: Path) -> None:
    path = saved(application("ResNet50V2"), tmp_path / "x.weights.h5")
    with pytest.raises(ValueError, match="is of a ResNet V2"):
        from_keras(path)
    path.unlink()


# --- the files that the other tests write ---------------------------------------------------------


def contents(path: Path | Any) -> dict[str, Any]:
    """Groups and arrays by path, their shapes and dtypes, and what attributes say."""
    found: dict[str, Any] = {}
    with h5py.File(path, "r") as file:

        def visit(name: str, item: Any) -> None:
            attrs = {
                key: [v.decode() if isinstance(v, bytes) else str(v) for v in np.ravel(value)]
                for key, value in item.attrs.items()
                if key not in ("model_config", "training_config")
            }
            array = isinstance(item, h5py.Dataset)
            found[name] = (attrs, (item.shape, str(item.dtype)) if array else None)

        visit("", file)
        file.visititems(visit)
    return found


@pytest.mark.parametrize("naming", ["keras", "coursera", "automatic"])
def test_files_are_as_keras_writes_them(naming: str, tmp_path: Path) -> None:
    keras().backend.clear_session()
    app = naming == "keras"
    theirs = (
        application("ResNet50", classes=6, name="functional")
        if app
        else assignment(naming == "coursera")
    )
    ours = fusedres.FusedResNet50(6, variant="keras" if app else "coursera")
    items = kf.network(ours, naming)
    arrays = kf.arrays_of(ours, items)
    config: Any = {"config": kf.config_of(items), "optimizer": False}
    kf.write_legacy(tmp_path / "ours.h5", items, arrays, **config)
    kf.write_weights(tmp_path / "ours.weights.h5", items, arrays)
    for form in ("h5", "weights.h5"):
        path = saved(theirs, tmp_path / f"theirs.{form}")
        found, truth = contents(tmp_path / f"ours.{form}"), contents(path)
        assert found.keys() == truth.keys()
        for name, value in truth.items():
            assert found[name] == value, name
    with h5py.File(tmp_path / "theirs.h5") as file:
        configs = [json.loads(file.attrs["model_config"])]
    saved(theirs, tmp_path / "theirs.keras")
    with zipfile.ZipFile(tmp_path / "theirs.keras") as archive:
        configs.append(json.loads(archive.read("config.json")))
        assert archive.namelist() == ["metadata.json", "config.json", "model.weights.h5"]
    mine = kf.config_of(items)
    for config in configs:
        assert config["class_name"] == mine["class_name"]
        for own, true in zip(mine["config"]["layers"], config["config"]["layers"], strict=True):
            assert (own["class_name"], own["name"]) == (true["class_name"], true["name"])
            written = own["config"] if own["class_name"] != "InputLayer" else {}
            assert written == {key: true["config"].get(key) for key in written}, own["name"]
            assert inputs_of(own) == inputs_of(true)
    for path in tmp_path.iterdir():
        path.unlink()


def inputs_of(layer: dict[str, Any]) -> list[str]:
    found: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, dict) and "keras_history" in value:
            found.append(value["keras_history"][0])
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                look(inner)

    look(layer["inbound_nodes"])
    return found
