"""What users of timm and torchvision expect of a network: features, classifier, weights, and the
networks that differ in their 3x3 convolutions. What must be equal is compared in fp64.
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_resnet import PlainResNet50
from torch import Tensor, nn

import fusedres
from fusedres import ConvBlock, FusedResNet50, IdentityBlock, report, use_backend
from fusedres.models import layer_names, summary
from fusedres.nn import unfuse
from fusedres.testing import CHANNELS_LAST, CONTIGUOUS, serving_backends

BACKENDS = serving_backends()
STAGES = ("relu", "layer1", "layer2", "layer3", "layer4")


def relative(ours: Tensor, truth: Tensor) -> float:
    """Largest error relative to the truth's largest element; one for an all-zero result."""
    return float((ours - truth).detach().abs().max() / truth.detach().abs().max())


def scattered(model: nn.Module) -> nn.Module:
    """The model in fp64, with no BatchNorm an identity, nor biases of zero."""
    for name, p in model.named_parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, *((0.5, 1.5) if "weight" in name else (-0.2, 0.2)))
    return model.double()


def pair(**options: Any) -> tuple[FusedResNet50, PlainResNet50]:
    """A fused and a plain network of the same weights, in fp64."""
    fused = scattered(FusedResNet50(6, **options))
    if "replace_stride_with_dilation" in options:
        options["dilate"] = options.pop("replace_stride_with_dilation")
    plain = PlainResNet50(6, **options).double()
    plain.load_state_dict(fused.state_dict(), strict=True)
    return fused, plain  # type: ignore[return-value]


def plain_maps(plain: nn.Module, x: Tensor) -> list[Tensor]:
    """The maps behind the first ReLU and the stages."""
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda m, i, o: maps.setdefault(name, o)

    for name in STAGES:
        plain.get_submodule(name).register_forward_hook(keep(name))
    plain(x)
    return list(maps.values())


# --- features and classifier ----------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_is_its_two_halves(backend: str, memory_format: torch.memory_format) -> None:
    model = fusedres.resnet18(5).eval()
    x = torch.randn(2, 3, 64, 64).to(memory_format=memory_format)
    with use_backend(backend):
        features = model.forward_features(x)
        whole = model(x)
    assert features.shape == (2, 512, 2, 2) and model.num_features == 512
    assert features.is_contiguous(memory_format=memory_format)
    assert torch.equal(model.forward_head(features), whole) and whole.shape == (2, 5)
    pooled = model.forward_head(features, pre_logits=True)
    assert relative(pooled, features.mean((2, 3))) < 1e-6
    assert torch.equal(model.fc(pooled), whole)


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
def test_maps_on_the_way_and_their_gradients(memory_format: torch.memory_format) -> None:
    """All five in training, against hooks in the plain network; and one alone, and the last."""
    fused, plain = pair()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64).to(memory_format=memory_format)
    theirs = plain_maps(plain, x)
    last, ours = fused.forward_intermediates(x)
    assert len(ours) == len(theirs) == 5 and torch.equal(last, ours[-1])
    for a, b, info in zip(ours, theirs, fused.feature_info, strict=True):
        assert relative(a, b) < 1e-10
        assert a.is_contiguous(memory_format=memory_format)
        size = 64 // info["reduction"]
        assert a.shape == (2, info["num_chs"], size, size)
    for maps in (ours, theirs):
        sum(m.sin().sum() for m in maps).backward()  # type: ignore[union-attr]
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == name.startswith("fc.")
        assert p.grad is None or relative(p.grad, q.grad) < 1e-10, name
    for (name, b), c in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert relative(b, c) < 1e-10, name
    (third,) = fused.forward_intermediates(x, [3], intermediates_only=True)
    assert relative(third, theirs[3]) < 1e-10
    assert relative(fused.forward_features(x), theirs[4]) < 1e-10


@pytest.mark.parametrize(
    ("indices", "taken"),
    [
        (None, (0, 1, 2, 3, 4)),
        (1, (4,)),
        (2, (3, 4)),
        (5, (0, 1, 2, 3, 4)),
        ([0], (0,)),
        ((1, -1), (1, 4)),
        ([-2, 1, 3], (1, 3)),
    ],
    ids=str,
)
def test_indices_as_timm_takes_them(indices: Any, taken: tuple[int, ...]) -> None:
    model = fusedres.resnet18(3).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    _, every = model.forward_intermediates(x)
    last, found = model.forward_intermediates(x, indices)
    assert len(found) == len(taken)
    for m, i in zip(found, taken, strict=True):
        torch.testing.assert_close(m, every[i], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, every[-1], rtol=1e-12, atol=1e-12)
    alone = model.forward_intermediates(x, indices, norm=True, intermediates_only=True)
    assert isinstance(alone, list) and all(map(torch.equal, alone, found))


def test_stages_that_nobody_asks_for_can_be_left_out() -> None:
    model = fusedres.resnet18(3)
    ran: list[str] = []
    for name in STAGES[1:]:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    x = torch.randn(2, 3, 64, 64)
    last, (second,) = model.forward_intermediates(x, [2], stop_early=True)
    assert ran == ["layer1", "layer2"] and torch.equal(last, second)
    ran.clear()
    last, (stem,) = model.forward_intermediates(x, [0], stop_early=True)
    assert ran == [] and torch.equal(last, model.maxpool(stem))
    model.forward_intermediates(x, [0])
    assert ran == list(STAGES[1:])


def test_maps_of_a_stem_with_a_hook_are_its_modules() -> None:
    fused, plain = pair()
    seen: list[Tensor] = []
    fused.relu.register_forward_hook(lambda m, i, o: seen.append(o))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    theirs = plain_maps(plain.eval(), x)
    maps = fused.eval().forward_intermediates(x, intermediates_only=True)
    assert len(seen) == 1 and torch.equal(seen[0], maps[0])
    assert all(relative(a, b) < 1e-10 for a, b in zip(maps, theirs, strict=True))


@pytest.mark.parametrize(
    ("indices", "error"),
    [
        (0, ValueError), (6, ValueError), ([], ValueError), ([5], ValueError), ([-6], ValueError),
        (True, TypeError), ("12", TypeError), ([1.0], TypeError), ({1}, TypeError),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_indices(indices: Any, error: type[Exception]) -> None:
    model = fusedres.resnet18(3)
    before = model.bn1.running_mean.clone()
    with pytest.raises(error, match=r"forward_intermediates: indices: got .*accepted: None, an"):
        model.forward_intermediates(torch.randn(1, 3, 64, 64), indices)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NLC")
    assert torch.equal(model.bn1.running_mean, before)


class LayerGetter(nn.ModuleDict):
    """Calls the children one by one, up to the last that is wanted, as torchvision's getter for
    detectors does.
    """

    def __init__(self, model: nn.Module, wanted: Mapping[str, str]) -> None:
        names = [name for name, _ in model.named_children()]
        last = max(map(names.index, wanted))
        super().__init__(list(model.named_children())[: last + 1])
        self.wanted = wanted

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = {}
        for name, child in self.items():
            x = child(x)
            if name in self.wanted:
                out[self.wanted[name]] = x
        return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_children_one_by_one(backend: str) -> None:
    fused, plain = pair()
    getter = LayerGetter(fused, {"layer1": "0", "layer2": "1", "layer4": "3"})
    assert "fc" not in getter
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    theirs = plain_maps(plain, x)
    with use_backend(backend):
        found = getter(x)
    assert list(found) == ["0", "1", "3"]
    for i, m in found.items():
        assert type(m) is Tensor and relative(m, theirs[int(i) + 1]) < 1e-10


@pytest.mark.parametrize("dilate", [None, (False, True, True), (True, True, True)], ids=str)
def test_feature_info(dilate: tuple[bool, ...] | None) -> None:
    model = FusedResNet50(3, replace_stride_with_dilation=dilate).eval()
    steps = {None: (8, 16, 32), (False, True, True): (8, 8, 8), (True, True, True): (4, 4, 4)}
    assert [info["reduction"] for info in model.feature_info] == [2, 4, *steps[dilate]]
    assert [info["num_chs"] for info in model.feature_info] == [64, 256, 512, 1024, 2048]
    assert [info["module"] for info in model.feature_info] == list(STAGES)
    assert (model.num_features, model.num_classes) == (2048, 3)
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, 64, 64), intermediates_only=True)
    for m, info in zip(maps, model.feature_info, strict=True):
        assert m.shape[1:] == (info["num_chs"], 64 // info["reduction"], 64 // info["reduction"])


@pytest.mark.parametrize("variant", ["torchvision", "keras"])
def test_a_new_classifier_starts_as_the_constructors(variant: str) -> None:
    model = fusedres.resnet18(5, variant=variant).bfloat16().eval()
    assert model.get_classifier() is model.fc
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    model.reset_classifier(7)
    fc = model.get_classifier()
    assert (fc.weight.shape, fc.weight.dtype) == ((7, 512), torch.bfloat16)
    assert fc.weight.requires_grad and not fc.training and model.num_classes == 7
    assert list(before) == list(model.state_dict())
    torch.manual_seed(3)
    if variant == "torchvision":
        twin = nn.Linear(512, 7, dtype=torch.bfloat16)
        assert torch.equal(fc.weight, twin.weight) and torch.equal(fc.bias, twin.bias)
    else:
        assert not fc.bias.any()
        limit = (6 / (512 + 7)) ** 0.5  # Glorot's
        assert 0.9 * limit < fc.weight.abs().max() <= limit * 1.01
    x = torch.randn(2, 3, 32, 32).bfloat16()
    assert model(x).shape == (2, 7)
    assert torch.equal(model.conv1.weight, before["conv1.weight"])


def test_a_new_classifier_by_an_initializer_of_ones_own() -> None:
    model = fusedres.resnet18(5, initializer=lambda w: nn.init.constant_(w, 0.25))
    assert (model.fc.weight == 0.25).all() and not model.fc.bias.any()
    model = pickle.loads(pickle.dumps(model))  # so it keeps no function
    model.reset_classifier(2)
    assert model.fc.weight.std() > 0.01 and model.fc.bias.any() and model.fc.training


def test_no_classifier_and_no_pool() -> None:
    model = fusedres.resnet18(5).eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    model.reset_classifier(0)
    assert type(model.get_classifier()) is nn.Identity and model.num_classes == 0
    assert torch.equal(model(x), model.forward_head(features, pre_logits=True))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(0)
    assert torch.equal(model(x), features)
    with pytest.raises(ValueError, match="num_classes must be 0 where nothing is pooled, got 4"):
        model.reset_classifier(4)
    model.reset_classifier(4, "avg")
    assert model(x).shape == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "num_classes must be 0 or a positive int below .*, got -1"),
        ((2.0,), "num_classes must be 0 or a positive int"),
        ((True,), "num_classes must be 0 or a positive int"),
        ((3, "max"), "global_pool must be None, 'avg' or '', got 'max'"),
        ((3, ""), "num_classes must be 0 where nothing is pooled"),
    ],
)
def test_a_classifier_that_cannot_be(arguments: tuple[Any, ...], message: str) -> None:
    model = fusedres.resnet18(5)
    fc, pool = model.fc, model.avgpool
    with pytest.raises(ValueError, match=f"reset_classifier: {message}"):
        model.reset_classifier(*arguments)
    assert model.fc is fc and model.avgpool is pool and model.num_classes == 5


# --- weights --------------------------------------------------------------------------------------


class Member:
    """What stands for a member of torchvision's weights enums."""

    def __init__(self, state: Mapping[str, Tensor] | Exception) -> None:
        self.state, self.asked = state, {}

    def get_state_dict(self, *args: Any, **options: Any) -> Mapping[str, Tensor]:
        self.asked = options
        if isinstance(self.state, Exception):
            raise self.state
        return self.state

    def __str__(self) -> str:
        return "Weights.V1"


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """A state_dict unlike that of any new network."""
    torch.manual_seed(99)
    model = fusedres.resnet18(4)
    model(torch.randn(2, 3, 64, 64))
    return model.state_dict()


def check_loaded(weights: Any, state: Mapping[str, Tensor]) -> None:
    loaded = fusedres.resnet18(4, weights=weights).state_dict()
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], t) for name, t in state.items())
    assert all(loaded[name].data_ptr() != t.data_ptr() for name, t in state.items())


WRAPPINGS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda s: s,
    "dict": dict,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"lr": 0.1}},
    "model": lambda s: {"model": s, "args": [1, 2]},
    "module.": lambda s: {f"module.{name}": t for name, t in s.items()},
    "both": lambda s: {"state_dict": OrderedDict((f"module.{name}", t) for name, t in s.items())},
    "of a training run": lambda s: {"format": "x", "state": {"model": s, "step": 3}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_by_path_and_mapping(
    wrapping: str, trained: dict[str, Tensor], tmp_path: Path
) -> None:
    content = WRAPPINGS[wrapping](trained)
    check_loaded(content, trained)
    for name in ("weights.pt", "weights.pth"):
        torch.save(content, tmp_path / name)
        check_loaded(tmp_path / name, trained)
    check_loaded(str(tmp_path / "weights.pt"), trained)


def test_weights_in_torchs_old_formats(trained: dict[str, Tensor], tmp_path: Path) -> None:
    """No zip file; one without checksums; one from before batches were counted."""
    torch.save(trained, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    check_loaded(tmp_path / "old.pth", trained)
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(trained, tmp_path / "unsummed.pth")
    finally:
        torch.serialization.set_crc32_options(computed)
    check_loaded(tmp_path / "unsummed.pth", trained)
    uncounted = {k: v for k, v in trained.items() if "num_batches" not in k}
    model = fusedres.resnet18(4, weights=uncounted)
    assert torch.equal(model.bn1.running_mean, trained["bn1.running_mean"])


def test_weights_in_safetensors(
    trained: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path.write_bytes(b"")
    with pytest.raises(ImportError, match=r"resnet18: weights: file .* pip install safetensors"):
        fusedres.resnet18(4, weights=path)
    monkeypatch.undo()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(trained, path)
    check_loaded(path, trained)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"resnet18: weights: file .* is refused: not a whole"):
        fusedres.resnet18(4, weights=path)
    with pytest.raises(FileNotFoundError, match=r"weights: file .* is not there"):
        fusedres.resnet18(4, weights=tmp_path / "none.safetensors")


def test_weights_of_torchvision(trained: dict[str, Tensor]) -> None:
    member = Member(trained)
    check_loaded(member, trained)
    assert member.asked == {"progress": True, "check_hash": True}
    with pytest.raises(RuntimeError, match=r"weights: Weights\.V1 could not be fetched: no route"):
        fusedres.resnet18(4, weights=Member(OSError("no route")))


def test_weights_are_cast_to_the_parameters(trained: dict[str, Tensor]) -> None:
    halves = {k: v.half() if v.is_floating_point() else v for k, v in trained.items()}
    model = fusedres.resnet18(4, weights=halves)
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, trained["conv1.weight"].half().float())


def test_weights_that_do_not_fit(trained: dict[str, Tensor]) -> None:
    state = dict(trained)
    for key in ("conv1.weight", "bn1.weight", "bn1.bias", "layer1.0.conv1.weight"):
        del state[key]
    state["extra.weight"] = torch.zeros(1)
    state["fc.bias"] = torch.zeros(9)
    state["fc.weight"] = state["fc.weight"].to(torch.int8)
    message = (
        r"^resnet18: weights: the mapping does not fit this network: 4 missing \(conv1\.weight, "
        r"bn1\.weight, bn1\.bias, \.\.\.\); 1 unexpected \(extra\.weight\); 2 mismatched "
        r"\(fc\.weight \[4, 512\] int8 for \[4, 512\], fc\.bias \[9\] for \[4\]\); accepted: [^;]*$"
    )
    with pytest.raises(ValueError, match=message):
        fusedres.resnet18(4, weights=state)
    with pytest.raises(ValueError, match=r"2 mismatched .*num_classes.*then reset_classifier"):
        fusedres.resnet18(5, weights=trained)
    with pytest.raises(ValueError, match=r"the mapping does not fit.* missing .* mismatched"):
        FusedResNet50(4, weights=trained)
    with pytest.raises(ValueError, match="nowhere to go"), torch.device("meta"):
        fusedres.resnet18(4, weights=trained)
    on_meta = {k: v.to("meta") for k, v in trained.items()}
    with pytest.raises(ValueError, match=r"conv1\.weight \[64, 3, 7, 7\] float32 on meta for"):
        fusedres.resnet18(4, weights=on_meta)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (True, TypeError, "got a value of type bool; accepted: the path of"),
        (Member, TypeError, "got the class Member; accepted: the path of"),
        (nn.Identity(), TypeError, "got a value of type Identity"),
        ("IMAGENET1K_V2", FileNotFoundError, "file 'IMAGENET1K_V2' is not there; accepted: .*enum"),
        ({"epoch": 3, "lr": 0.1}, ValueError, ".* entry 'epoch' is of type int"),
        ({}, ValueError, "the mapping does not fit this network: 102 missing"),
        (Member([3]), ValueError, r"Weights\.V1 holds a value of type list, not a state_dict"),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_weights_that_are_none(weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^resnet18: weights: {message}"):
        fusedres.resnet18(4, weights=weights)


class Harmful:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_files_that_are_no_weights(trained: dict[str, Tensor], tmp_path: Path) -> None:
    path, folder = tmp_path / "weights.pth", tmp_path / "made by a pickle"

    def refused(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=rf"^resnet18: weights: file '.*weights\.pth' {message}"):
            fusedres.resnet18(4, weights=path)

    path.mkdir()
    refused(OSError, "cannot be read: Is a directory")
    path.rmdir()
    torch.save({"state_dict": trained, "args": Harmful(folder)}, path)
    refused(ValueError, r"is refused: .* \(it wants \w+\.mkdir\); nothing in it was executed")
    path.write_bytes(pickle.dumps(Harmful(folder)))
    refused(ValueError, "is refused: ")
    assert not folder.exists()
    torch.save(fusedres.resnet18(4), path)
    refused(ValueError, r"is refused: .*it wants fusedres\.")
    torch.save([trained], path)
    refused(ValueError, "holds a value of type list, not a state_dict")
    path.write_bytes(b"no weights at all")
    refused(ValueError, "is refused: not a whole file of tensors and plain data")
    path.write_bytes(b"")
    refused(ValueError, "is refused: not a whole file of tensors and plain data")
    torch.save(trained, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(ValueError, "is refused: not a whole file")
    damaged = bytearray(whole)
    at = whole.index(trained["fc.weight"].numpy().tobytes()[:64])
    damaged[at + 8] ^= 0x40  # torch itself would take it
    path.write_bytes(bytes(damaged))
    refused(ValueError, r"is refused: .* \(damaged: .*/data/\d+ in it is not what was written\)")


# --- ResNeXt, wide and dilated networks -----------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "grouped": {"groups": 8, "width_per_group": 12},
    "wide, dilated": {"width_per_group": 80, "replace_stride_with_dilation": (False, True, True)},
    "dilated in the middle": {"replace_stride_with_dilation": [False, True, False], "groups": 2},
    "dilated, stride in 1x1": {
        "replace_stride_with_dilation": [True, False, True],
        "stride_in_1x1": True,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_equal_plain_pytorch(kind: str) -> None:
    """1e-10 in fp64: outputs, every gradient, running statistics; the keys and shapes too."""
    fused, plain = pair(**KINDS[kind])
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64).to(memory_format=CHANNELS_LAST)
    target = torch.tensor([1, 4])
    found = []
    for model in (fused, plain):
        logits = model(x)
        F.cross_entropy(logits, target).backward()
        found.append({"logits": logits} | {n: p.grad for n, p in model.named_parameters()})
        found[-1] |= {n: b for n, b in model.named_buffers() if "running" in n}
    assert found[0].keys() == found[1].keys() and len(found[1]) == 1 + 161 + 106
    for name, truth in found[1].items():
        assert relative(found[0][name], truth) < 1e-10, name


@pytest.mark.parametrize(
    ("depth", "groups", "width", "parameters"),
    [
        (50, 32, 4, 25_028_904),
        (101, 32, 8, 88_791_336),
        (101, 64, 4, 83_455_272),
        (50, 1, 128, 68_883_240),
        (101, 1, 128, 126_886_696),
    ],
)
def test_parameters_as_torchvision_documents_them(
    depth: int, groups: int, width: int, parameters: int
) -> None:
    with torch.device("meta"):
        build = getattr(fusedres, f"resnet{depth}")
        model = build(groups=groups, width_per_group=width)
        plain = PlainResNet50(groups=groups, width_per_group=width)
    assert sum(p.numel() for p in model.parameters()) == parameters
    if depth == 50:
        ours, theirs = (
            {name: t.shape for name, t in m.state_dict().items()} for m in (model, plain)
        )
        assert list(ours.items()) == list(theirs.items())


def test_where_a_dilated_network_dilates() -> None:
    """A dilated stage's first block has the dilation of the stage before, and still projects."""
    with torch.device("meta"):
        model = FusedResNet50(replace_stride_with_dilation=(False, True, True))
    found = {
        f"{stage}.{b}": (block.conv2.dilation[0], block.conv2.padding[0], block.conv2.stride[0])
        for stage in STAGES[1:]
        for b, block in enumerate(model.get_submodule(stage))
    }
    assert found["layer2.0"] == (1, 1, 2) and found["layer2.1"] == (1, 1, 1)
    assert found["layer3.0"] == (1, 1, 1) and found["layer3.1"] == (2, 2, 1)
    assert found["layer4.0"] == (2, 2, 1) and found["layer4.2"] == (4, 4, 1)
    assert model.layer4[0].downsample[0].stride == (1, 1)
    assert list(model.state_dict()) == list(PlainResNet50().state_dict())


@pytest.mark.parametrize(
    ("depth", "options", "error", "message"),
    [
        (18, {"groups": 2}, ValueError, "groups must be 1 in a network of basic blocks, got 2"),
        (34, {"width_per_group": 128}, ValueError, "width_per_group must be 64 in a network of"),
        (
            18,
            {"replace_stride_with_dilation": [False, False, True]},
            ValueError,
            r"replace_stride_with_dilation: got \[False, False, True\], but basic blocks are not",
        ),
        (50, {"groups": 0}, ValueError, "groups must be a positive int below .*, got 0"),
        (50, {"groups": True}, ValueError, "groups must be a positive int below .*, got True"),
        (50, {"width_per_group": 4.0}, ValueError, "width_per_group must be a positive int"),
        (50, {"groups": 2**20, "width_per_group": 2**10}, ValueError, "groups .* of width_per"),
        (50, {"replace_stride_with_dilation": (True, True)}, ValueError, "got 2 of them; accepted"),
        (50, {"replace_stride_with_dilation": (1, 0, 0)}, TypeError, r"got \(1, 0, 0\); accepted"),
        (50, {"replace_stride_with_dilation": True}, TypeError, "got True; accepted: None, or"),
    ],
)
def test_errors_name_the_argument(
    depth: int, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"resnet{depth}: .*{message}"):
        getattr(fusedres, f"resnet{depth}")(**options)


def test_basic_blocks_take_the_defaults() -> None:
    with torch.device("meta"):
        fusedres.resnet18(groups=1, width_per_group=64, replace_stride_with_dilation=[False] * 3)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "identity, groups": lambda: IdentityBlock(8, (4, 4, 8), groups=2),
    "identity, depthwise": lambda: IdentityBlock(8, (4, 4, 8), groups=4),
    "identity, dilated": lambda: IdentityBlock(8, (4, 6, 8), dilation=2),
    "identity, dilated 2x2": lambda: IdentityBlock(8, (4, 6, 8), 2, dilation=3),
    "conv, dilated 4x4": lambda: ConvBlock(8, (4, 6, 16), 4, dilation=3),
    "conv, dilated 4x4 evenly": lambda: ConvBlock(8, (4, 6, 16), 4, dilation=2),
    "conv, both, stride in 1x1": lambda: ConvBlock(
        8, (4, 4, 16), stride_in_1x1=True, groups=2, dilation=2
    ),
    "conv, both": lambda: ConvBlock(8, (4, 4, 16), stride=1, groups=2, dilation=3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(kind: str, backend: str) -> None:
    """Against the unfused children forward and backward, whose middle convolution is checked
    against one of an input that was padded by hand.
    """
    block = scattered(BLOCKS[kind]())
    twin: Any = unfuse(copy.deepcopy(block))
    x = torch.randn(2, 8, 9, 8, dtype=torch.float64)
    first: list[Tensor] = []
    second: list[Tensor] = []
    twin.bn1.register_forward_hook(lambda m, i, o: first.append(o))
    twin.conv2.register_forward_hook(lambda m, i, o: second.append(o))
    with use_backend(backend):
        ours = block(x)
    theirs = twin(x)
    assert relative(ours, theirs) < 1e-10
    for out in (ours, theirs):
        out.square().sum().backward()
    for (name, p), q in zip(block.named_parameters(), twin.named_parameters(), strict=True):
        assert relative(p.grad, q[1].grad) < 1e-10, name
    conv = twin.conv2
    both = conv.dilation[0] * (conv.kernel_size[0] - 1)
    before, after = both // 2, both - both // 2
    padded = F.pad(F.relu(first[0]), (before, after, before, after))
    options = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    truth = F.conv2d(padded, conv.weight, **options)
    assert relative(second[0], truth) < 1e-10


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: IdentityBlock(8, (4, 6, 8), groups=4),
            ValueError,
            "groups must divide filters F1",
        ),
        (lambda: ConvBlock(8, (6, 4, 8), groups=4), ValueError, "groups must divide filters F1 6"),
        (lambda: ConvBlock(8, (4, 4, 8), groups=0), ValueError, "groups must be at least 1"),
        (lambda: ConvBlock(8, (4, 4, 8), dilation=1.5), TypeError, "dilation must be an int"),
    ],
)
def test_blocks_that_cannot_be(
    build: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"Block: {message}"):
        build()


# --- what reads a network -------------------------------------------------------------------------


def test_report_summary_and_names_of_other_networks() -> None:
    model = FusedResNet50(4, groups=32, width_per_group=4)
    rows = report(model)
    assert len(rows) == 53 and {row.runs for row in rows} == {"fused"}
    layers = {layer.name: layer for layer in summary(model, (64, 64, 3)).layers}
    assert layers["layer1.0.conv2"].parameters == 128 * 4 * 9
    dilated = FusedResNet50(4, replace_stride_with_dilation=(False, True, True))
    layers = {layer.name: layer for layer in summary(dilated, (64, 64, 3)).layers}
    assert layers["layer4.2.conv3"].output == (8, 8, 2048)
    assert len(layer_names(dilated, "keras")) == 107


@pytest.mark.parametrize("naming", ["torch", "keras", "coursera"])
def test_summary_without_a_classifier(naming: str) -> None:
    model = FusedResNet50(4)
    model.reset_classifier(0)
    layers = summary(model, (64, 64, 3), naming).layers
    assert layers[-1].kind == "Identity" and layers[-1].output == (2048,)
    assert len({layer.name for layer in layers}) == len(layers)
    if naming != "torch":
        assert len(layer_names(model, naming)) == 106
    model.reset_classifier(0, "")
    assert summary(model, (64, 64, 3), naming).layers[-1].output == (2, 2, 2048)


def test_maps_compile_without_a_graph_break() -> None:
    model = fusedres.resnet18(4).eval()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model.forward_intermediates, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        _, found = compiled(x, [0, 1], stop_early=True)
        _, eager = model.forward_intermediates(x, [0, 1], stop_early=True)
    for a, b in zip(found, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_copy_and_a_pickle_know_as_much() -> None:
    model = fusedres.resnet18(4, variant="keras").eval()
    x = torch.randn(1, 3, 32, 32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x)) and twin.feature_info == model.feature_info
        twin.reset_classifier(2)
        assert not twin.fc.bias.any() and model.num_classes == 4
