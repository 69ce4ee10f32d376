"""from_keras: what is not whole, not a ResNet's or not Keras's is refused in one clear line."""

from __future__ import annotations

import copy
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras_files as kf
import numpy as np
import pytest
import torch
from keras_models import make, narrowed

from fusedres.models import from_keras

Items = list[kf.Item]
Written = tuple[Items, dict[str, kf.Arrays]]


@pytest.fixture(autouse=True, scope="module")
def _narrow() -> Iterator[None]:
    with narrowed():
        yield


@pytest.fixture(scope="module")
def written() -> Written:
    model = make()
    items = kf.network(model, "coursera")
    return items, kf.arrays_of(model, items)


@pytest.fixture(scope="module")
def numbered() -> Written:
    model = make()
    items = kf.network(model, "automatic")
    return items, kf.arrays_of(model, items)


def refused(path: Path, *parts: str, **options: Any) -> str:
    with pytest.raises(ValueError) as raised:
        from_keras(path, **options)
    message = str(raised.value)
    assert "\n" not in message and str(path) in message, message
    for part in parts:
        assert part in message, (part, message)
    return message


def write(form: str, path: Path, written: Written, config: Any = None) -> Path:
    items, arrays = written
    if form == "legacy":
        return kf.write_legacy(path, items, arrays, config=config)
    if form == ".keras":
        return kf.write_keras(path, items, arrays, config or kf.config_of(items))
    kf.write_weights(path, items, arrays)
    return path


# --- what is missing, left over, of another shape -------------------------------------------------

FORMS = ["legacy", "weights.h5", ".keras"]


@pytest.mark.parametrize("form", FORMS)
def test_arrays_that_are_missing(form: str, written: Written, tmp_path: Path) -> None:
    items, arrays = written
    for layer, role in (
        ("res2a_branch2a", "kernel"),
        ("res4c_branch2b", "bias"),
        ("bn_conv1", "moving_variance"),
        ("bn5b_branch2c", "gamma"),
        ("bn3a_branch1", "moving_mean"),
        ("fc6", "bias"),
    ):
        if form != "legacy" and role in ("kernel", "gamma", "moving_mean"):
            continue  # the others would move up
        less = {**arrays, layer: {r: a for r, a in arrays[layer].items() if r != role}}
        refused(write(form, tmp_path / "x", (items, less)), f"1 missing ({layer}/{role})")


@pytest.mark.parametrize("form", ["legacy", "weights.h5"])
def test_arrays_that_are_listed_and_not_there(form: str, written: Written, tmp_path: Path) -> None:
    path = write(form, tmp_path / "x", written)
    with h5py.File(path, "a") as file:
        if form == "legacy":
            del file["model_weights/res2a_branch2a/res2a_branch2a/kernel"]
            del file["model_weights/bn2a_branch2a/bn2a_branch2a/beta"]
        else:
            del file["layers/conv2d_1/vars/0"], file["layers/batch_normalization_1/vars/1"]
    refused(path, "2 missing (res2a_branch2a/kernel, bn2a_branch2a/beta)")


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_is_missing_or_left_over(form: str, written: Written, tmp_path: Path) -> None:
    items, arrays = written
    path = tmp_path / "x"
    less = {name: of for name, of in arrays.items() if name != "res5c_branch2b"}
    refused(write(form, path, (items, less)), "res5c_branch2b/kernel", "2 missing")
    dense = kf.Item("Dense", "fc7", {}, ("fc6",), "")
    kernel = {"kernel": np.zeros((6, 2), "f4"), "bias": np.zeros(2, "f4")}
    more = ([*items, dense], {**arrays, "fc7": kernel})
    refused(write(form, path, more), "2 unexpected (fc7/kernel [6, 2], fc7/bias [2])")
    conv = kf.Item("Conv2D", "res6a_branch2a", dict(items[2].options), ("fc6",), "")
    extra = ([*items, conv], {**arrays, conv.name: {"kernel": np.zeros((1, 1, 4, 4), "f4")}})
    extra[1][conv.name]["bias"] = np.zeros(4, "f4")
    refused(write(form, path, extra), "2 unexpected (res6a_branch2a/kernel [1, 1, 4, 4], ")
    norm = ([*items, conv], {**arrays, conv.name: {"scale": np.zeros(4, "f4")}})
    assert "unexpected" in refused(write("legacy", path, norm))


@pytest.mark.parametrize("form", FORMS)
def test_arrays_too_many(form: str, written: Written, tmp_path: Path) -> None:
    """Of layers that have a place."""
    items, arrays = written
    extra = {**arrays["conv1"], "scale": np.zeros((64,), "f4")}
    role = "scale" if form == "legacy" else "2"
    path = write(form, tmp_path / "x", (items, {**arrays, "conv1": extra}))
    refused(path, f"1 unexpected (conv1/{role} [64])")
    unbiased = options("conv1", use_bias=False)(items)
    if form != "weights.h5":  # which does not say that
        path = write(form, tmp_path / "x", written, kf.config_of(unbiased))
        refused(path, "1 unexpected (conv1/bias [64])")


@pytest.mark.parametrize("form", [*FORMS, "legacy, weights"])
def test_a_classifier_without_arrays_is_missing(
    form: str, written: Written, tmp_path: Path
) -> None:
    """And not a network that never had one."""
    items, arrays = written
    path, less = tmp_path / "x", {name: of for name, of in arrays.items() if name != "fc6"}
    if form == "legacy, weights":
        kf.write_legacy(path, items, less, whole=False)
        with h5py.File(path, "a") as file:
            del file["fc6"]
    else:
        config = kf.config_of(items) if form == "legacy" else None
        write(form, path, (items, less), config)
    refused(path, "2 missing (fc6/kernel, fc6/bias)")
    if form == "legacy":
        with h5py.File(path, "a") as file:
            attrs = file["model_weights"].attrs
            names = [name for name in attrs["layer_names"] if name not in ("fc6", b"fc6")]
            assert len(names) == len(attrs["layer_names"]) - 1
            attrs["layer_names"] = names
        refused(path, "2 missing (fc6/kernel, fc6/bias)")


@pytest.mark.parametrize("form", FORMS)
def test_arrays_of_another_shape(form: str, written: Written, tmp_path: Path) -> None:
    items, arrays = written
    for layer, role, array, what in (
        ("res3b_branch2b", "kernel", np.zeros((8, 8, 3, 3), "f4"), "[8, 8, 3, 3] for [3, 3, 8, 8]"),
        ("bn3b_branch2b", "beta", np.zeros((9,), "f4"), "[9] for [8]"),
        ("res3b_branch2b", "bias", np.zeros((8,), "i4"), "[8] int32 for [8]"),
        ("fc6", "kernel", np.zeros((128, 6), "f4"), "[128, 6] for [32, 6]"),
        ("fc6", "bias", np.zeros((7,), "f4"), "[7] for [6]"),
        ("conv1", "kernel", np.zeros((7, 7, 3, 32), "f4"), "[7, 7, 3, 32] for [7, 7, 3, 64]"),
    ):
        other = {**arrays, layer: {**arrays[layer], role: array}}
        refused(
            write(form, tmp_path / "x", (items, other)), f"1 mismatched ({layer}/{role} {what})"
        )


@pytest.mark.parametrize("form", ["legacy", "weights.h5"])
@pytest.mark.parametrize("role", ["gamma", "beta"])
def test_norms_without_scale_or_center(
    form: str, role: str, written: Written, tmp_path: Path
) -> None:
    items, arrays = written
    less = {name: {r: a for r, a in of.items() if r != role} for name, of in arrays.items()}
    last = role if form == "legacy" else "moving_variance"  # numbers say how many there are
    path = write(form, tmp_path / "x", (items, less))
    refused(path, f"53 missing (bn_conv1/{last}, ", "BatchNorms need both scale and center")


def test_only_the_first_of_many_are_listed(written: Written, tmp_path: Path) -> None:
    items, arrays = written
    less = {name: of for name, of in arrays.items() if not name.startswith("bn")}
    message = refused(write("weights.h5", tmp_path / "x", (items, less)), "212 missing")
    assert len(message) < 400


@pytest.mark.parametrize("form", ["legacy", "weights.h5"])
def test_automatic_names_that_do_not_fit(form: str, numbered: Written, tmp_path: Path) -> None:
    items, arrays = numbered
    path = tmp_path / "x"
    less = [item for item in items if item.name != "conv2d_7"]
    refused(write(form, path, (less, arrays)), "52 convolutions and 53 BatchNorms", "53 of each")
    wrong = {**arrays, "conv2d_20": {**arrays["conv2d_20"], "kernel": np.zeros((1, 1, 8, 9), "f4")}}
    refused(write(form, path, (items, wrong)), "1 mismatched (conv2d_20/kernel [1, 1, 8, 9] for ")
    swapped = dict(arrays)  # of one block alone
    swapped["conv2d_11"], swapped["conv2d_14"] = arrays["conv2d_14"], arrays["conv2d_11"]
    refused(write(form, path, (items, swapped)), "order of its automatic names")
    named = [i._replace(name="mine") if i.name == "conv2d_9" else i for i in items]
    mixed = {**arrays, "mine": arrays["conv2d_9"]}
    refused(write(form, path, (named, mixed)), "automatic names and others (mine)")


def test_the_blocks_order_holds_for_all_of_them(tmp_path: Path) -> None:
    """Stage 1, where shapes say nothing, goes by the others; these have to agree."""
    model = make()
    one, two = (kf.network(model, "automatic", order=order) for order in ("abcs", "sabc"))
    names = {item.path: item.name for item in two if item.path.startswith("layer3.0")}
    mixed = [i._replace(name=names.get(i.path, i.name)) for i in one]
    path = tmp_path / "x"
    kf.write_weights(path, mixed, kf.arrays_of(model, mixed))
    refused(path, "order of its automatic names")


# --- other networks -------------------------------------------------------------------------------

Change = Callable[[Items], Items]


def options(name: str, **changed: Any) -> Change:
    def change(items: Items) -> Items:
        return [i._replace(options=i.options | changed) if i.name == name else i for i in items]

    return change


def replaced(name: str, **changed: Any) -> Change:
    return lambda items: [i._replace(**changed) if i.name == name else i for i in items]


OTHERS: dict[str, tuple[Change, str]] = {
    "leaky": (replaced("activation_3", cls="LeakyReLU"), "'activation_3' is a LeakyReLU"),
    "tanh": (options("activation_3", activation="tanh"), "is the activation 'tanh', not relu"),
    "relu6": (
        replaced("activation_3", cls="ReLU", options={"max_value": 6.0}),
        "is a ReLU with max_value 6.0",
    ),
    "activated": (options("res2a_branch2a", activation="relu"), "has activation 'relu' before"),
    "dilated": (options("res3b_branch2b", dilation_rate=[2, 2]), "is dilated by [2, 2]"),
    "no scale": (options("bn_conv1", scale=False), "is a BatchNorm with scale=False"),
    "lambda": (replaced("activation_3", cls="Lambda"), "'activation_3' is a Lambda"),
    "rescaled": (replaced("activation_3", cls="Rescaling"), "rescales the images"),
    "max": (replaced("avg_pool", cls="GlobalMaxPooling2D"), "GlobalMaxPooling2D"),
    "pool": (options("max_pooling2d", pool_size=[2, 2]), "pools (2, 2) at stride (2, 2)"),
    "pool same": (options("max_pooling2d", padding="same"), "'max_pooling2d' is padded by same"),
    "eps": (options("bn4b_branch2a", epsilon=1e-5), "differ in epsilon (1e-05, 0.001)"),
    "momentum": (options("bn4b_branch2a", momentum=0.9), "differ in momentum"),
    "strides": (options("res3a_branch2a", strides=[1, 1]), "strides that no variant has"),
    "stem": (options("conv1", padding="same"), "'conv1' is padded by 'same' at a stride"),
    "stem pad": (options("zero_padding2d", padding=[[2, 2], [2, 2]]), "padded by 2 zeros"),
    "valid": (options("res2b_branch2b", padding="valid"), "'res2b_branch2b' is padded by 0 zeros"),
    "turned": (replaced("bn2b_branch2b", inputs=("res2b_branch2a",)), "reads res2b_branch2a, "),
    "shortcut": (replaced("res3a_branch1", inputs=("activation",)), "'res3a_branch1' reads"),
    "no list": (options("conv1", strides="two"), "its configuration is not as Keras writes it"),
}


@pytest.fixture(scope="module")
def legacy(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("legacy", tmp_path_factory.mktemp("legacy") / "x", written)


@pytest.mark.parametrize("what", OTHERS)
def test_networks_that_are_not_ours(what: str, written: Written, legacy: Path) -> None:
    items, _ = written
    change, message = OTHERS[what]
    keras = 2 + [*OTHERS].index(what) % 2  # which write connections differently
    with h5py.File(legacy, "a") as file:
        file.attrs["model_config"] = json.dumps(kf.config_of(change(items), keras))
    refused(legacy, message)


def test_swapped_shortcuts_of_stage_1_are_seen_in_a_configuration(
    numbered: Written, tmp_path: Path
) -> None:
    items, _ = numbered
    names = {"conv2d_3": "conv2d_4", "conv2d_4": "conv2d_3"}
    swapped = [i._replace(name=names.get(i.name, i.name)) for i in items]
    path = write(".keras", tmp_path / "x", numbered, kf.config_of(swapped))
    refused(path, "reads")


def test_the_second_version_and_names_of_others(written: Written, tmp_path: Path) -> None:
    items, arrays = written
    for name, message in (
        ("conv2_block1_preact_bn", "is of a ResNet V2"),
        ("post_bn", "is of a ResNet V2"),
    ):
        second = [i._replace(name=name) if i.name == "bn_conv1" else i for i in items]
        path = write("weights.h5", tmp_path / "x", (second, {**arrays, name: arrays["bn_conv1"]}))
        refused(path, message)
    mine = [i._replace(name=f"my_{i.name}") for i in items]
    theirs = {f"my_{name}": of for name, of in arrays.items()}
    refused(write("legacy", tmp_path / "x", (mine, theirs)), "my_conv1", "names that are known")


def test_a_configuration_of_any_kind(written: Written, tmp_path: Path) -> None:
    """Not as Keras writes it, it is refused; without layers in it names decide."""
    items, arrays = written
    path = tmp_path / "x"
    for config in (
        {"class_name": "Functional", "config": {"layers": [1, 2]}},
        {"config": {"layers": [{"class_name": "Conv2D", "config": 3, "name": "conv1"}]}},
        {"config": {"layers": [{"config": {"layers": "x"}}]}, "class_name": 3},
    ):
        kf.write_keras(path, items, arrays, config)
        try:
            from_keras(path)
        except ValueError:
            refused(path)
    kf.write_keras(path, items, arrays, {"class_name": "Mine", "config": {}})
    assert from_keras(path).variant == "coursera"
    with zipfile.ZipFile(path, "w") as archive:
        inner = kf.write_weights(tmp_path / "w", items, arrays)
        archive.write(inner, "model.weights.h5")
        archive.writestr("config.json", "[" * 100_000)
    refused(path, "damaged or not Keras's")


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_files_that_are_cut_off(form: str, written: Written, tmp_path: Path) -> None:
    path = write(form, tmp_path / "x", written)
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, 3000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path)


def test_files_of_other_kinds(written: Written, tmp_path: Path) -> None:
    path = tmp_path / "x.keras"
    path.write_bytes(b"")
    refused(path, "it is empty", "accepted: what Keras saves")
    path.write_text("no weights\nat all")
    refused(path, "neither HDF5 nor a .keras archive: it begins with b'no weigh'")

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    path.write_bytes(pickle.dumps(Evil()))
    refused(path, "neither HDF5")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../model.weights.h5", b"")
    refused(path, "an archive without model.weights.h5")
    torch.save(make(classes=1).state_dict(), path)
    refused(path, "an archive without model.weights.h5")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.weights.h5", pickle.dumps(Evil()))
    refused(path, "damaged or not Keras's")
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros(3)
    refused(path, "no weights of Keras's layers")
    assert not (tmp_path / "executed").exists()


def test_archives_of_enormous_files(written: Written, tmp_path: Path) -> None:
    """Many zeros pack into little."""
    path = write(".keras", tmp_path / "x", written)
    with zipfile.ZipFile(path) as archive:
        inner = archive.read("model.weights.h5")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", inner)
        archive.writestr("config.json", bytes(2**26 + 1))
    assert path.stat().st_size < 2**23
    refused(path, "config.json in it has 67108865 bytes; accepted: up to 67108864")


def test_an_archive_whose_bytes_changed(written: Written, tmp_path: Path) -> None:
    path = write(".keras", tmp_path / "x", written)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(path, "Bad CRC-32")


def test_nothing_is_read_from_other_files(written: Written, tmp_path: Path) -> None:
    """Links, virtual arrays and arrays whose bytes lie elsewhere count as not there."""
    path, other = write("weights.h5", tmp_path / "x", written), tmp_path / "other"
    with h5py.File(other, "w") as file:
        file["a"] = np.zeros((64,), "f4")
        file["group/vars/0"] = np.zeros((64,), "f4")
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(256))
    with h5py.File(path, "a") as file:
        vars_ = file["layers/conv2d/vars"]
        assert vars_.attrs["name"] == "conv1"
        del vars_["1"], file["layers/batch_normalization/vars/0"]
        vars_["1"] = h5py.ExternalLink(str(other), "a")
        file["layers/batch_normalization"]["vars"].create_dataset(
            "0", (64,), "f4", external=[(str(raw), 0, 256)]
        )
        layout = h5py.VirtualLayout((64,), "f4")
        layout[:] = h5py.VirtualSource(str(other), "a", (64,))
        del file["layers/batch_normalization/vars/1"]
        file["layers/batch_normalization/vars"].create_virtual_dataset("1", layout)
        file["layers/extra"] = h5py.ExternalLink(str(other), "group")
        file["elsewhere"] = h5py.ExternalLink(str(other), "group")
        file["layers/round"] = file["layers"]
    message = refused(path, "3 missing (conv1/bias, bn_conv1/gamma, bn_conv1/beta)")
    assert "unexpected" not in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.h5' is not there; accepted"):
        from_keras(tmp_path / "nowhere.h5")
    with pytest.raises(OSError, match="cannot be read"):
        from_keras(tmp_path)


def test_arguments(written: Written, tmp_path: Path) -> None:
    items, arrays = written
    path = write("weights.h5", tmp_path / "x", written)
    for given, error, message in (
        ({"variant": "tf"}, ValueError, "variant: got 'tf', accepted: None, 'torchvision'"),
        (
            {"preprocess": "tf"},
            ValueError,
            "preprocess: got 'tf', accepted: None, 'caffe',",
        ),
        ({"num_classes": 6}, TypeError, "num_classes comes from the file"),
        ({"weights": path}, TypeError, "weights comes from the file"),
        ({"epsilon": 1.0}, TypeError, "unknown argument 'epsilon'"),
        ({"eps": 1e-3, "memory": "some"}, ValueError, "memory must be"),
    ):
        with pytest.raises(error, match=message):
            from_keras(path, **given)
    grey = copy.copy(arrays)
    grey["conv1"] = {**arrays["conv1"], "kernel": arrays["conv1"]["kernel"][:, :, :1]}
    write("weights.h5", path, (items, grey))
    refused(path, "takes 1 channels, preprocess 'caffe' is for 3", preprocess="caffe")
    assert from_keras(path, preprocess="scale").from_pixels.values == (0.0,)
