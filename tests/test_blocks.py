"""Blocks against the same children called as plain modules; padding, hooks, modes, initialisers,
errors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedres import ConvBlock, ConvBNReLU, IdentityBlock, report, use_backend
from fusedres.nn import BasicBlock, Stage
from fusedres.nn.blocks import FusedModule
from fusedres.testing import CHANNELS_LAST, CONTIGUOUS, serving_backends

BACKENDS = serving_backends()
BLOCKS: dict[str, Callable[[], FusedModule]] = {
    "identity": lambda: IdentityBlock(8, (4, 4, 8)),
    "identity, 2x2": lambda: IdentityBlock(8, (4, 6, 8), kernel_size=2),
    "identity, 5x5": lambda: IdentityBlock(8, (4, 6, 8), kernel_size=5),
    "conv": lambda: ConvBlock(8, (4, 4, 16)),
    "conv, stride in 1x1": lambda: ConvBlock(8, (4, 4, 16), stride_in_1x1=True),
    "conv, stride 1": lambda: ConvBlock(8, (4, 4, 16), stride=1),
    "conv, 4x4": lambda: ConvBlock(8, (4, 6, 16), kernel_size=4),
    "conv, 4x4, stride in 1x1": lambda: ConvBlock(8, (4, 6, 16), 4, stride_in_1x1=True),
    "basic": lambda: BasicBlock(8, 8),
    "basic, projected": lambda: BasicBlock(8, 12, 2),
    "conv bn relu": lambda: ConvBNReLU(8, 6, 3, 2, 1),
    "conv bn": lambda: ConvBNReLU(8, 6, (3, 1), padding=(1, 0), relu=False),
    "stage": lambda: Stage(ConvBlock(8, (4, 4, 16)), IdentityBlock(16, (4, 4, 16))),
}


def prepared(name: str, dtype: torch.dtype = torch.float64) -> FusedModule:
    block = BLOCKS[name]()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):  # affine maps that are not the identity
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return block.to(dtype)


def plain(block: nn.Module) -> nn.Module:
    """A copy whose children are called as modules."""
    copied = copy.deepcopy(block)
    for module in copied.modules():
        if isinstance(module, FusedModule):
            module.fused = False
    return copied


def results(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = block(x)
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    out.backward(upstream)
    found = {"out": out.detach(), "x": x.grad}
    found |= {f"gradient of {n}": p.grad for n, p in block.named_parameters()}
    return found | {n: b.clone() for n, b in block.named_buffers()}  # type: ignore[return-value]


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tol: float = 1e-10) -> None:
    for name, truth in theirs.items():
        torch.testing.assert_close(
            ours[name], truth, rtol=0, atol=tol * max(1.0, float(truth.abs().max())), msg=name
        )


def assert_equals_plain(block: nn.Module, x: Tensor) -> None:
    twin = plain(block)  # before running statistics move
    assert_equal(results(block, x), results(twin, x))


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen statistics", "momentum=None"])
def test_fused_equals_plain(
    name: str, backend: str, mode: str, memory_format: torch.memory_format
) -> None:
    block = prepared(name).to(memory_format=memory_format)
    x = torch.randn(3, 8, 9, 10, dtype=torch.float64).contiguous(memory_format=memory_format)
    if mode == "eval":
        block.eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            if mode == "frozen statistics":
                module.eval()
            if mode == "momentum=None":
                module.momentum = None
    twin = plain(block)
    with use_backend(backend):
        for _ in range(2):  # the running statistics of the second step start from the first's
            block.zero_grad()
            twin.zero_grad()
            ours, theirs = results(block, x), results(twin, x)
            assert_equal(ours, theirs)
    assert ours["out"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_affine_and_running_statistics(backend: str) -> None:
    block = IdentityBlock(8, (4, 4, 8)).double()
    block.bn1 = nn.BatchNorm2d(4, affine=False, track_running_stats=False).double()
    block.bn2 = nn.BatchNorm2d(4, track_running_stats=False).double()
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    for mode in (True, False):
        block.train(mode)
        block.zero_grad()
        with use_backend(backend):
            assert_equals_plain(block, x)


@pytest.mark.parametrize("size", [1, 4, 5, 8])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_same_padding_as_keras(kernel: int, size: int) -> None:
    """Keras 'same' at stride 1: floor((k - 1) / 2) before, the rest after; the output keeps its
    size.
    """
    block = IdentityBlock(3, (4, 4, 3), kernel_size=kernel).eval()
    x = torch.randn(2, 3, size, size)
    before, after = (kernel - 1) // 2, kernel - 1 - (kernel - 1) // 2
    h = block.bn1(block.conv1(x)).relu()
    h = nn.functional.pad(h, (before, after, before, after))
    h = block.bn2(nn.functional.conv2d(h, block.conv2.weight)).relu()
    expected = (block.bn3(block.conv3(h)) + x).relu()
    assert expected.shape == x.shape
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_children_are_plain_modules_under_torchvisions_names() -> None:
    children = {n: type(m) for n, m in ConvBlock(8, (4, 4, 16)).named_modules() if n}
    conv, bn = nn.Conv2d, nn.BatchNorm2d
    expected = {"conv1": conv, "bn1": bn, "conv2": conv, "bn2": bn, "conv3": conv, "bn3": bn}
    expected |= {"downsample": nn.Sequential, "downsample.0": conv, "downsample.1": bn}
    assert children == expected
    assert not any(n.endswith("conv.bias") for n in ConvBlock(8, (4, 4, 16)).state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("where", ["1", "1.bn2", "0.downsample.0", "0.downsample", ""])
def test_hooks_see_tensors_and_change_nothing(hook: str, where: str, backend: str) -> None:
    stage = Stage(
        ConvBlock(8, (4, 4, 8), stride=1), IdentityBlock(8, (4, 4, 8)), IdentityBlock(8, (4, 4, 8))
    ).double()
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    expected = results(plain(stage), x)
    seen: list[Any] = []

    def note(module: nn.Module, *values: Any) -> None:
        seen.extend(
            v for group in values for v in (group if isinstance(group, tuple) else (group,))
        )

    getattr(stage.get_submodule(where), f"register_{hook}_hook")(note)
    with use_backend(backend):
        assert_equal(results(stage, x), expected)
    assert seen and all(isinstance(v, Tensor) for v in seen)
    reasons = {row.name: row.reason for row in report(stage)}
    if where == "1":
        assert "Tensors enter and leave 1" in reasons["1.conv1 + bn1"]
    if where.startswith("1.bn2"):
        assert "bn2 has a hook" in reasons["1.conv1 + bn1"]
        assert "hook" not in reasons["2.conv1 + bn1"]


def test_a_global_hook_is_seen_too() -> None:
    block, seen = IdentityBlock(8, (4, 4, 8)), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        block(torch.randn(2, 8, 5, 5))
    finally:
        handle.remove()
    assert block.bn3 in seen and block in seen


def test_a_hook_on_a_plain_child_keeps_what_it_saw() -> None:
    block, seen = IdentityBlock(8, (4, 4, 8)), []
    block.fused = False
    block.bn1.register_forward_hook(lambda m, i, o: seen.append(o))
    block(torch.randn(2, 8, 5, 5))
    assert (seen[0] < 0).any()


class Doubled(nn.Module):
    """A foreign module."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        return 2 * x


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_foreign_module_between_blocks_gets_a_tensor(backend: str) -> None:
    stage = Stage(IdentityBlock(8, (4, 4, 8)), Doubled(), IdentityBlock(8, (4, 4, 8))).double()
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    with use_backend(backend):
        assert_equals_plain(stage, x)


class Leaky(nn.BatchNorm2d):
    """A subclass whose forward does more than its parent's."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(super().forward(x))


class Shared(nn.SyncBatchNorm):
    """Another subclass."""


@pytest.mark.parametrize(
    ("child", "replacement", "reason"),
    [
        ("bn1", Leaky(4), "bn1 is a Leaky, a subclass"),
        ("bn2", nn.GroupNorm(2, 4), "bn2 is a GroupNorm"),
        ("bn3", nn.Identity(), "bn3 is a Identity"),
        ("conv1", nn.Conv2d(8, 4, 1), "conv1 has a bias"),
        ("conv2", nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False), "'reflect'"),
        ("bn1", Shared(4), "bn1 is a Shared"),
        ("bn2", nn.ReLU(), "bn2 is a ReLU"),
    ],
)
def test_what_cannot_fuse_runs_as_it_is(child: str, replacement: nn.Module, reason: str) -> None:
    block = IdentityBlock(8, (4, 4, 8))
    setattr(block, child, replacement)
    block = block.double()
    assert reason in (block.plain_reason() or "")
    assert all(row.runs == "plain" and reason in row.reason for row in report(block))
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    assert_equals_plain(block, x)


@pytest.mark.parametrize("name", ["kaiming_normal", "glorot_uniform", "random_uniform"])
def test_initialisers_give_the_same_bits_for_the_same_seed(name: str) -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(IdentityBlock(64, (64, 64, 64), initializer=name).conv2.weight)
    assert torch.equal(*weights)
    bound = {
        "kaiming_normal": (2.0 / (64 * 9)) ** 0.5,
        "glorot_uniform": (2.0 / (2 * 64 * 9)) ** 0.5,
        "random_uniform": 0.1 / 12**0.5,
    }[name]
    assert abs(float(weights[0].detach().std()) / bound - 1) < 0.05


def test_initialisers_by_constant_and_callable() -> None:
    assert not IdentityBlock(8, (4, 4, 8), initializer="zeros").conv1.weight.any()
    assert (IdentityBlock(8, (4, 4, 8), initializer="ones").conv3.weight == 1).all()
    block = ConvBlock(8, (4, 4, 8), initializer=lambda w: w.fill_(0.25))
    assert block.downsample is not None
    assert (block.downsample[0].weight == 0.25).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: IdentityBlock(8, (4, 4, 16)),
            ValueError,
            r"filters\[2\] must equal in_channels 8",
        ),
        (lambda: IdentityBlock(8, (4, 4)), ValueError, "filters must be"),
        (lambda: IdentityBlock(8, 4), ValueError, "filters must be"),
        (lambda: IdentityBlock(8, (4, 0, 8)), ValueError, "filters must be at least 1"),
        (lambda: IdentityBlock(0, (4, 4, 8)), ValueError, "in_channels must be at least 1"),
        (lambda: IdentityBlock(8, (4, 4, 8), 0), ValueError, "kernel_size must be at least 1"),
        (lambda: IdentityBlock(8, (4, 4, 8), 2.5), TypeError, "kernel_size must be an int"),
        (lambda: ConvBlock(8, (4, 4, 8), stride=0), ValueError, "stride must be at least 1"),
        (lambda: ConvBlock(8, (4, 4, 8), initializer="he"), ValueError, "initializer: got 'he'"),
        (lambda: ConvBlock(8, (4, 4, 8), initializer=3), TypeError, "initializer must be a name"),
    ],
)
def test_errors_name_the_argument(
    make: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_fused_module_must_say_what_it_fuses() -> None:
    class Unfinished(FusedModule):
        pass

    with pytest.raises(TypeError, match=r"abstract method.*units"):
        Unfinished()


def test_a_wrong_input_counts_no_batch() -> None:
    block = IdentityBlock(8, (4, 4, 8))
    with pytest.raises(ValueError, match="weight has 8 input channels"):
        block(torch.randn(2, 7, 5, 5))
    assert int(block.bn1.num_batches_tracked) == 0 and not block.bn1.running_mean.any()
    with pytest.raises(TypeError, match="input must be a Tensor or a Deferred, got list"):
        block([1.0])
