"""fuse on the models of torchvision, timm and Hugging Face, and FusedResNet50 beside them.

CONTRIBUTING says what has to be installed; nothing here is skipped.
"""

from __future__ import annotations

import copy
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
        name: float((ours[name] - true).abs().max() / true.abs().max().clamp_min(1e-300))
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
