"""from_keras: each form of file and each naming gives the network that was written, to the bit."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras_files as kf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keras_models import assert_images_count, calmed, make, narrowed
from torch import Tensor, nn

import fusedres
from fusedres.models import from_keras
from fusedres.models.keras import convert

CAFFE = (103.939, 116.779, 123.68)  # of blue, green, red
VARIANT = {"keras": "keras", "coursera": "coursera", "automatic": "coursera"}


@pytest.fixture(autouse=True, scope="module")
def _narrow() -> Iterator[None]:
    with narrowed():
        yield


def same(ours: nn.Module, truth: nn.Module) -> None:
    found, expected = ours.state_dict(), truth.state_dict()
    assert [*found] == [*expected]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype and found[name].is_contiguous()


def legacy(keras: int, whole: bool, **options: Any) -> Callable[..., Path]:
    def write(folder: Path, items: list[kf.Item], arrays: dict[str, kf.Arrays]) -> Path:
        config = kf.config_of(items, keras) if whole else None
        return kf.write_legacy(
            folder / "x.h5", items, arrays, keras=keras, whole=whole, config=config, **options
        )

    return write


def weights(**options: Any) -> Callable[..., Path]:
    return lambda folder, items, arrays: kf.write_weights(
        folder / "x.weights.h5", items, arrays, **options
    )


def archive(**options: Any) -> Callable[..., Path]:
    return lambda folder, items, arrays: kf.write_keras(
        folder / "x.keras", items, arrays, kf.config_of(items), **options
    )


FORMS = {
    "Keras 1, weights": legacy(1, False),
    "Keras 1, weights, numbered": legacy(1, False, suffix="_1"),
    "Keras 2": legacy(2, True),
    "Keras 2, weights": legacy(2, False),
    "Keras 2, weights, numbered": legacy(2, False, suffix="_2"),
    "Keras 3, legacy": legacy(3, True),
    "weights.h5": weights(optimizer=True),
    "weights.h5, older": weights(named=False),
    ".keras": archive(optimizer=True),
    ".keras, older": archive(named=False),
}


CASES = [(n, f) for n in VARIANT for f in FORMS if n == "coursera" or "Keras 1" not in f]


@pytest.mark.parametrize(("naming", "form"), CASES)
def test_forms_and_namings(naming: str, form: str, tmp_path: Path) -> None:
    model = make(variant=VARIANT[naming])
    items = kf.network(model, naming)
    path = FORMS[form](tmp_path, items, kf.arrays_of(model, items))
    found = convert(path.rename(tmp_path / "any"))  # not by its suffix
    same(found.model, model)
    by_group = form == "weights.h5, older"
    assert found.naming == ("automatic" if by_group else naming)
    assert found.model.variant == ("coursera" if by_group else VARIANT[naming])
    assert type(found.model) is fusedres.FusedResNet50 and found.model.training
    assert (found.depth, found.arrays, found.details) == (50, 2 * 53 + 4 * 53 + 2, {})
    assert found.model.num_classes == 6 and all(p.requires_grad for p in found.model.parameters())


@pytest.mark.parametrize(("naming", "depth"), [("keras", 101), ("automatic", 101), ("keras", 152)])
def test_deeper_networks(naming: str, depth: int, tmp_path: Path) -> None:
    model = make(depth, 3, "keras")
    items = kf.network(model, naming)
    path = kf.write_weights(tmp_path / "x", items, kf.arrays_of(model, items))
    found = from_keras(path, variant="keras")
    same(found, model)
    assert type(found) is type(model) and found.num_classes == 3
    with pytest.raises(ValueError, match=f"has a ResNet-{depth}, no ResNet-50"):
        fusedres.FusedResNet50.from_keras(path)


@pytest.mark.parametrize("order", ["abcs", "sabc", "absc", "asbc"])
@pytest.mark.parametrize("form", ["Keras 2, weights", ".keras"])
def test_automatic_numbers_in_any_order(order: str, form: str, tmp_path: Path) -> None:
    """Beginning anywhere, with gaps: 98, 101, ... is not the order of letters."""
    model = make()
    items = kf.network(model, "automatic", order=order, start=98, step=3)
    same(from_keras(FORMS[form](tmp_path, items, kf.arrays_of(model, items))), model)


@pytest.mark.parametrize("naming", ["keras", "automatic"])
@pytest.mark.parametrize("form", ["legacy", "legacy, weights", "weights.h5", ".keras"])
def test_a_network_as_a_layer(naming: str, form: str, tmp_path: Path) -> None:
    """Its Dense is outside of it, and has a name of its own."""
    model, path = make(variant="keras"), tmp_path / "x"
    items = kf.network(model, naming)
    items[-1] = items[-1]._replace(name="head")
    arrays, config = kf.arrays_of(model, items), kf.nested(items[:-1])
    if form.startswith("legacy"):
        whole = form == "legacy"
        options: Any = {"whole": whole, "config": config if whole else None}
        kf.write_legacy(path, items, arrays, inside="functional", **options)
    elif form == "weights.h5":
        kf.write_weights(path, items, arrays, inside="functional")
    else:
        kf.write_keras(path, items, arrays, config, inside="functional")
    found = from_keras(path)
    same(found, model)
    known = naming == "keras" or form in ("legacy", ".keras")
    assert found.variant == ("keras" if known else "coursera")


def test_names_that_tensorflow_had_already(tmp_path: Path) -> None:
    """In a model as a layer they get a number; longer lists of names are in several attributes."""
    model = make(variant="keras")
    items = kf.network(model, "keras")
    items = [i._replace(name=f"{i.name}_1") if i.cls != "Dense" else i for i in items]
    path, arrays = tmp_path / "x", kf.arrays_of(model, items)
    kf.write_legacy(path, items, arrays, keras=2, inside="resnet50")
    with h5py.File(path, "a") as file:
        top = file["model_weights"]
        for group, name in ((top, "layer_names"), (top["resnet50"], "weight_names")):
            names = [*group.attrs.pop(name)]
            group.attrs[f"{name}0"], group.attrs[f"{name}1"] = names[:1], names[1:]
    found = convert(path)
    same(found.model, model)
    assert found.naming == "keras"


@pytest.mark.parametrize("naming", ["keras", "coursera", "automatic"])
def test_without_a_classifier(naming: str, tmp_path: Path) -> None:
    model = make(classes=0, variant=VARIANT[naming])
    items = kf.network(model, naming)
    found = from_keras(archive()(tmp_path, items, kf.arrays_of(model, items)))
    same(found, model)
    assert found.num_classes == 0 and isinstance(found.fc, nn.Identity)
    x = torch.randn(1, 3, 64, 64)
    assert found.eval()(x).shape == (1, 32) and found.forward_features(x).dim() == 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", ">f4"])
@pytest.mark.parametrize("form", ["Keras 3, legacy", "weights.h5"])
def test_other_types(dtype: str, form: str, tmp_path: Path) -> None:
    model = make(classes=32, in_channels=1)  # a square matrix
    items = kf.network(model, "coursera")
    arrays = kf.arrays_of(model, items, np.float32 if dtype == "bfloat16" else dtype)
    arrays = kf.bfloat16(arrays) if dtype == "bfloat16" else arrays
    found = from_keras(FORMS[form](tmp_path, items, arrays))
    same(found, model)
    assert found.conv1.in_channels == 1


@pytest.mark.parametrize("biased", [True, False])
def test_a_bias_is_the_means(biased: bool, tmp_path: Path) -> None:
    """convolution, bias and BatchNorm one after the other, in fp64."""
    model = make()
    items = kf.network(model, "coursera")
    if not biased:
        items = [i._replace(options=i.options | {"use_bias": False}) for i in items]
        items[-1].options["use_bias"] = True
    arrays = kf.arrays_of(model, items, np.float64, bias=biased)
    if biased:
        arrays["conv1"]["bias"] += 1e-4 / 3  # a value that no fp32 has
    found = from_keras(archive()(tmp_path, items, arrays)).double().eval()
    x = torch.randn(2, 3, 9, 9).double()
    conv, bn = arrays["conv1"], {k: torch.from_numpy(v) for k, v in arrays["bn_conv1"].items()}
    w = torch.from_numpy(conv["kernel"].transpose(3, 2, 0, 1).copy())
    y = F.conv2d(x, w, torch.from_numpy(conv["bias"]) if biased else None, 2, 3)
    scale = bn["gamma"] / (bn["moving_variance"] + 1e-3).sqrt()
    truth = (y - bn["moving_mean"].view(-1, 1, 1)) * scale.view(-1, 1, 1)
    truth = truth + bn["beta"].view(-1, 1, 1)
    assert (found.bn1(found.conv1(x)) - truth).abs().max() < 1e-6
    if biased:
        exact = arrays["bn_conv1"]["moving_mean"] - conv["bias"]
        assert np.array_equal(found.bn1.running_mean.float().numpy(), exact.astype(np.float32))


# --- details of the network -----------------------------------------------------------------------


@pytest.mark.parametrize("keras", [2, 3])
def test_details_are_the_configurations(keras: int, tmp_path: Path) -> None:
    """By automatic names they say whose network it is; details of nobody's are kept as they are."""
    own: Any = {"eps": 2e-4, "momentum": 0.03, "stem_pool_padding": 0}
    for naming, variant, options, details in (
        ("automatic", "keras", {}, {}),
        ("automatic", "coursera", {}, {}),
        ("keras", "coursera", {}, {}),
        ("keras", "keras", own, own),
        ("coursera", "coursera", {"stem_pool_padding": 1}, {"stem_pool_padding": 1}),
    ):
        model = make(variant=variant, **options)
        items = kf.network(model, naming)
        arrays, path = kf.arrays_of(model, items), tmp_path / "x"
        kf.write_legacy(path, items, arrays, keras=keras, config=kf.config_of(items, keras))
        found = convert(path)
        assert (found.model.variant, found.details) == (variant, details)
        ours, truth = (calmed(m).eval() for m in (found.model, model))
        x = torch.randn(2, 3, 49, 49)
        logits = truth(x)
        assert_images_count(logits)
        assert torch.equal(ours(x), logits)
        for bn in (m for m in found.model.modules() if isinstance(m, nn.BatchNorm2d)):
            assert (bn.eps, bn.momentum) == (truth.bn1.eps, truth.bn1.momentum)


def test_what_is_asked_for_wins(tmp_path: Path) -> None:
    model = make(variant="keras")
    items = kf.network(model, "keras")
    path = archive()(tmp_path, items, kf.arrays_of(model, items))
    found = from_keras(path, variant="torchvision", eps=0.25, memory="recompute")
    assert found.variant == "torchvision" and found.layer1[0].memory == "recompute"
    assert found.bn1.eps == 0.25 and found.layer2[0].conv1.stride == (1, 1)
    assert from_keras(path, eps=0.25).layer2[0].conv1.stride == (2, 2)

    class Mine(fusedres.FusedResNet50):
        pass

    mine = Mine.from_keras(str(path))
    assert type(mine) is Mine
    for given, fills in (({}, True), ({"initializer": "kaiming_normal"}, False)):
        other = from_keras(path, **given)
        other.reset_classifier(4)  # as of a new network: Glorot's with no bias, or nn.Linear's
        assert bool((other.fc.bias == 0).all()) is fills
    same(found, model)


# --- pixels ---------------------------------------------------------------------------------------


def by_hand(model: Any, pixels: Tensor, preprocess: str) -> Tensor:
    """Keras's preprocessing, then the network that was written, in fp64."""
    x = pixels.double()
    if preprocess == "caffe":
        x = x.flip(1) - torch.tensor(CAFFE, dtype=torch.float64).view(-1, 1, 1)
    else:
        x = x / 255
    plain = fusedres.unfuse(model).double().eval()
    with torch.no_grad():
        logits: Tensor = plain(x)
    assert_images_count(logits)
    return logits


@pytest.mark.parametrize("preprocess", ["caffe", "scale"])
def test_pixels(preprocess: str, tmp_path: Path) -> None:
    """Small maps, whose borders count."""
    model = calmed(make())
    with torch.no_grad():
        model.conv1.weight /= 1 if preprocess == "scale" else 100
    items = kf.network(model, "coursera")
    path = FORMS["weights.h5"](tmp_path, items, kf.arrays_of(model, items, np.float64))
    found = from_keras(path, preprocess=preprocess).eval()
    assert [*found.state_dict()] == [*model.state_dict()]
    frames = torch.randint(256, (2, 65, 71, 3), dtype=torch.uint8)
    frames[0] = 255
    pixels = frames.permute(0, 3, 1, 2)
    truth = by_hand(model, pixels, preprocess)
    with torch.no_grad():
        for images in (frames, pixels.float(), pixels.float().contiguous()):
            assert (found(images) - truth).abs().max() < 1e-5 * truth.abs().max()
        last, maps = found.forward_intermediates(frames)
        assert torch.equal(last, found.forward_features(frames)) and len(maps) == 5
        assert torch.equal(maps[0], found.forward_intermediates(pixels.float())[1][0])


def test_h5py_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install "fusedres\[keras\]"'):
        from_keras(path)


PAGE = Path(__file__).resolve().parent.parent / "docs" / "keras.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="needs the source tree")
def test_the_pages_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    items = kf.network(model, "coursera")
    arrays = kf.arrays_of(model, items)
    kf.write_legacy(tmp_path / "signs.h5", items, arrays, config=kf.config_of(items))
    kf.write_weights(tmp_path / "signs.weights.h5", items, arrays)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block, scope)
    assert isinstance(scope["model"].from_pixels, fusedres.nn.FromPixels)
