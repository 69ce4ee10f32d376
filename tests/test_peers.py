"""fuse on the models of torchvision, timm and Hugging Face, and FusedResNet50 beside them.

CONTRIBUTING says what has to be installed; nothing here is skipped.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres

pytestmark = pytest.mark.peers

# convolutions that are called as they are, and why
LEFT = {"timm seresnet50": (32, "no BatchNorm follows")}


def logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def two_steps(model: nn.Module, inputs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Outputs, every gradient and running statistics."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)  # larger ones amplify what is measured
    found: dict[str, Tensor] = {}
    for step, (x, target) in enumerate(inputs):
        optimizer.zero_grad()
        out = logits(model(x))
        F.cross_entropy(out, target).backward()
        found[f"{step}: out"] = out.detach()
        found |= {f"{step}: gradient of {n}": p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    return found | {n: b.clone() for n, b in model.named_buffers()}


def worst(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error relative to the largest element of the tensor it is in."""
    assert ours.keys() == truth.keys()
    off = {
        name: float(
            (ours[name] - true).detach().abs().max() / true.detach().abs().max().clamp_min(1e-300)
        )
        for name, true in truth.items()
    }
    return max((error, name) for name, error in off.items())


@pytest.mark.parametrize("name", peers.MODELS)
def test_fp64_equals_the_model(name: str, record_property: Any) -> None:
    plain = peers.make(name).double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):  # no affine map is the identity
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    original = copy.deepcopy(plain)
    fused = fusedres.fuse(copy.deepcopy(plain))
    assert [*fused.state_dict()] == [*plain.state_dict()]
    for ours, theirs in zip(fused.modules(), plain.modules(), strict=True):
        assert isinstance(ours, type(theirs))
    rows = fusedres.report(fused)
    left = [row for row in rows if row.runs != "fused"]
    count, reason = LEFT.get(name, (0, ""))
    convolutions = sum(isinstance(m, nn.Conv2d) for m in plain.modules())
    assert len(rows) == convolutions and len(left) == count
    assert all(reason in row.reason for row in left)

    inputs = [(torch.randn(4, 3, 64, 64).double(), torch.tensor([0, 1, 2, 4])) for _ in range(2)]
    back = fusedres.unfuse(fusedres.fuse(original))
    truth = two_steps(plain, inputs)
    error = worst(two_steps(fused, inputs), truth)
    print(f"{name}: {len(rows) - count} of {len(rows)} layers fused, error {error[0]:.1e}")
    assert error[0] < 1e-9, error
    fused.eval(), plain.eval()
    with torch.no_grad():
        x = inputs[0][0]
        assert worst({"out": logits(fused(x))}, {"out": logits(plain(x))})[0] < 1e-9
    found = two_steps(back, inputs)
    assert all(torch.equal(found[name], true) for name, true in truth.items())


@pytest.mark.parametrize("name", peers.MODELS)
def test_frozen(name: str) -> None:
    """Evaluation mode's numbers in fp64, on maps of several sizes; the original stays as it was."""
    torch.manual_seed(0)
    plain = peers.make(name).double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    plain.eval()
    before = copy.deepcopy(plain.state_dict())
    frozen = fusedres.freeze(fusedres.fuse(plain))
    assert isinstance(frozen, type(plain))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    rows = fusedres.report(frozen)
    assert len(rows) == sum(isinstance(m, nn.Conv2d) for m in plain.modules())
    assert {row.runs for row in rows} == {"fused"}  # also those of gates, which have a bias
    with torch.no_grad():
        for shape in ((2, 3, 64, 64), (1, 3, 96, 64), (3, 3, 64, 64)):
            x = torch.randn(shape).double()
            for order in (torch.contiguous_format, torch.channels_last):
                ours, truth = frozen(x.contiguous(memory_format=order)), plain(x)
                assert near(logits(ours), logits(truth))
    after = plain.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def near(ours: Tensor, truth: Tensor) -> bool:
    return worst({"": ours}, {"": truth})[0] < 1e-9


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "timm seresnet50"])
def test_memory_and_signature(name: str) -> None:
    """memory="recompute" changes no number; tools that look at a forward see the same."""
    plain = peers.make(name).double()
    inputs = [(torch.randn(3, 3, 32, 32).double(), torch.tensor([0, 1, 2]))] * 2
    exact, less = (fusedres.fuse(copy.deepcopy(plain), memory=m) for m in ("exact", "recompute"))
    found, truth = two_steps(less, inputs), two_steps(exact, inputs)
    assert all(torch.equal(found[n], t) for n, t in truth.items())
    assert inspect.signature(less.forward) == inspect.signature(plain.forward)


def test_ours_beside_torchvisions_and_timms() -> None:
    """The same weights give the same logits and the same maps on the way."""
    vision, timm = (peers.make(name).double().eval() for name in ("resnet50", "timm resnet50"))
    ours = fusedres.FusedResNet50(5, weights=vision.state_dict()).double().eval()
    timm.load_state_dict(vision.state_dict())
    x = torch.randn(2, 3, 64, 96).double()
    with torch.no_grad():
        assert near(ours(x), vision(x))
        theirs = timm.forward_intermediates(x)
        found = ours.forward_intermediates(x)
        assert near(found[0], theirs[0]) and len(found[1]) == len(theirs[1]) == 5
        assert all(near(a, b) for a, b in zip(found[1], theirs[1], strict=True))
        info = [dict(i) for i in timm.feature_info]
        for mine, its in zip(ours.feature_info, info, strict=True):
            assert (mine["num_chs"], mine["reduction"]) == (its["num_chs"], its["reduction"])


def test_weights_of_torchvisions_enum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network: what it would download is handed to it."""
    vision = peers.torchvision()
    model = vision.models.resnet50()
    asked = []

    def download(url: str, **options: Any) -> dict[str, Tensor]:
        asked.append(url)
        return model.state_dict()

    monkeypatch.setattr(vision.models._api, "load_state_dict_from_url", download)
    ours = fusedres.FusedResNet50(weights=vision.models.ResNet50_Weights.IMAGENET1K_V2)
    assert len(asked) == 1 and asked[0].endswith(".pth")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("which", ["ours", "fused"])
def test_maps_for_torchvisions_detectors(which: str) -> None:
    getter = peers.torchvision().models._utils.IntermediateLayerGetter
    plain = peers.make("resnet50").double()
    model = fusedres.fuse(copy.deepcopy(plain))
    if which == "ours":
        model = fusedres.FusedResNet50(5, weights=plain.state_dict()).double()
    names = {"layer2": "a", "layer4": "b"}
    x = torch.randn(2, 3, 64, 64).double()
    found, truth = getter(model, names)(x), getter(plain, names)(x)
    assert [*found] == [*truth] and all(near(found[k], truth[k]) for k in truth)


def test_a_segmentation_model() -> None:
    make = peers.torchvision().models.segmentation.fcn_resnet50
    plain = make(weights=None, weights_backbone=None, num_classes=3, aux_loss=True).double()
    fused = fusedres.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 3, 65, 65).double()
    results = []
    for model in (fused, plain):
        torch.manual_seed(0)  # dropout
        out = model(x)
        sum(v.square().mean() for v in out.values()).backward()  # type: ignore[union-attr]
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append(dict(out) | grads | dict(model.named_buffers()))
    error = worst(*results)
    assert error[0] < 1e-8, error  # of a deeper network
    assert sum(row.runs == "fused" for row in fusedres.report(fused)) >= 53


def test_timms_own_ways() -> None:
    """features_only, a new classifier, checkpointing switched on later, forward_features."""
    timm = importlib.import_module("timm")
    plain = timm.create_model("resnet26", features_only=True).double()
    fused, x = fusedres.fuse(copy.deepcopy(plain)), torch.randn(2, 3, 64, 64).double()
    assert all(near(a, b) for a, b in zip(fused(x), plain(x), strict=True))
    plain = timm.create_model("resnet26", num_classes=5).double()
    fused = fusedres.fuse(copy.deepcopy(plain))
    for model in (fused, plain):
        torch.manual_seed(3)
        model.reset_classifier(7)
        model.double().set_grad_checkpointing()
    found, truth = (two_steps(m, [(x, torch.tensor([0, 6]))]) for m in (fused, plain))
    statistics = [n for n in truth if "running" in n or "num_batches" in n]
    for name in statistics:  # plain checkpointing moves them twice in the stages
        del truth[name], found[name]
    assert worst(found, truth)[0] < 1e-9
    assert near(fused.eval().forward_features(x), fused.forward_features(x))
    counts = {int(b) for n, b in fused.named_buffers() if "num_batches" in n}
    assert counts == {1}


def test_hugging_faces_own_ways(tmp_path: Any) -> None:
    """save_pretrained and from_pretrained, hidden states, a loss from labels."""
    plain: Any = peers.make(peers.HUGGING_FACE).double().eval()
    fused: Any = fusedres.fuse(plain)
    x = torch.randn(2, 3, 64, 64).double()
    options = {"labels": torch.tensor([0, 4]), "output_hidden_states": True}
    with torch.no_grad():
        ours, theirs = fused(x, **options), plain(x, **options)
    assert near(ours.logits, theirs.logits) and near(ours.loss, theirs.loss)
    pairs = zip(ours.hidden_states, theirs.hidden_states, strict=True)
    assert all(near(a, b) for a, b in pairs)
    fused.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in again.state_dict().items())
