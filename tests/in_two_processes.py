"""What two processes compute together, on one thread each over gloo; test_distributed.py starts
them, both with the same tests in the same order.

The truth is plain torch.nn in one process, which has the batches of both.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_fuse import Small
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedres
from fusedres import (
    ConvBlock,
    ConvBNReLU,
    IdentityBlock,
    fuse,
    ops,
    report,
    unfuse,
    use_backend,
    use_plan,
)
from fusedres._plans import DATAFLOWS
from fusedres.models import stages
from fusedres.nn import Stage
from fusedres.nn.blocks import FusedModule
from fusedres.testing import CHANNELS_LAST, CONTIGUOUS, serving_backends

RANK = int(os.environ["RANK"])
BACKENDS = serving_backends()
CLASSES = 3


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{os.environ['MEETING']}", timedelta(seconds=60), 2, RANK
    )
    yield
    dist.destroy_process_group()


def small(**options: Any) -> nn.Module:
    """A convolution, a projection and an identity; BatchNorms that are not identities."""
    model = nn.Sequential(
        ConvBNReLU(3, 8, 3, padding=1),
        Stage(ConvBlock(8, (4, 4, 16)), IdentityBlock(16, (4, 4, 16))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    ).double()
    return prepared(model, **options)


def prepared(model: nn.Module, **options: Any) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            for name, value in options.items():
                setattr(module, name, value)
    return model


def narrow() -> nn.Module:
    """ResNet-18 of few channels: stem, stages, shortcuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_PLANES", (8, 8, 16, 16))
        return prepared(fusedres.resnet18(CLASSES).double())


def converted(model: nn.Module) -> nn.Module:
    """A copy whose BatchNorms are nn.SyncBatchNorm."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))


def ddp_of(own: nn.Module, **options: Any) -> nn.Module:
    """DDP around a model whose BatchNorms become nn.SyncBatchNorm in place. It refuses a CPU's,
    having no other than torch's in mind; the converted ones hold the same parameters and buffers.
    """
    ddp = DistributedDataParallel(own, **options)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(own) is own
    assert not any(isinstance(m, nn.BatchNorm2d) for m in own.modules())
    assert all(m.plain_reason() is None for m in own.modules() if isinstance(m, FusedModule))
    return ddp


def plain(model: nn.Module) -> nn.Module:
    """A copy of plain torch.nn modules."""
    return unfuse(copy.deepcopy(model))


def part(x: Tensor, sizes: tuple[int, int]) -> Tensor:
    """What is this process's of both."""
    return x[: sizes[0]] if RANK == 0 else x[sizes[0] :]


def batch(sizes: tuple[int, int], side: int) -> tuple[Tensor, Tensor]:
    n = sum(sizes)
    return torch.randn(n, 3, side, side, dtype=torch.float64), torch.arange(n) % CLASSES


def step(
    model: nn.Module, images: Tensor, labels: Tensor, factor: float
) -> tuple[Tensor, Tensor | None]:
    """Logits and the images' gradient; the loss is factor * the sum over the images."""
    images = images.clone().requires_grad_()
    logits = model(images)
    (F.cross_entropy(logits, labels, reduction="sum") * factor).backward()
    return logits.detach(), images.grad


def assert_near(ours: Tensor | None, theirs: Tensor | None, name: str, tol: float = 1e-9) -> None:
    assert (ours is None) == (theirs is None), name
    if ours is None or theirs is None:
        return
    bound = tol * max(1.0, float(theirs.abs().max())) if theirs.numel() else 0
    torch.testing.assert_close(
        ours.double(), theirs.double(), rtol=0, atol=bound, msg=lambda m: f"{name}: {m}"
    )


def assert_alike(ours: nn.Module, theirs: nn.Module, when: str, tol: float = 1e-9) -> None:
    """Gradients, parameters, running statistics and counts; parameters may be sharded."""
    truth = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    found = dict(ours.named_parameters()) | dict(ours.named_buffers())
    assert found.keys() == truth.keys()
    for name, t in found.items():
        assert_near(whole(t), truth[name].detach(), f"{when}, {name}", tol)
        assert_near(whole(t.grad), truth[name].grad, f"{when}, gradient of {name}", tol)


def whole(t: Tensor | None) -> Tensor | None:
    gather = getattr(t, "full_tensor", None)
    return gather().detach() if gather is not None else None if t is None else t.detach()


def two_steps(
    ours: nn.Module,  # computes on its part of each batch, and averages gradients
    theirs: nn.Module,
    sizes: tuple[int, int],
    side: int,
    tol: float = 1e-9,
    *,
    own: nn.Module | None = None,  # whose parameters ours has
    rate: float = 0.05,
) -> None:
    """Outputs, the images' gradients and all of the models', over two steps of SGD."""
    own = ours if own is None else own
    optimizers = [torch.optim.SGD(m.parameters(), rate, momentum=0.9) for m in (own, theirs)]
    count = sum(sizes)
    for when in ("step 1", "step 2"):
        images, labels = batch(sizes, side)
        dtype = next(own.parameters()).dtype
        share = part(images, sizes).to(dtype)
        for optimizer in optimizers:
            optimizer.zero_grad()
        # averaging halves what is summed here
        logits, gradient = step(ours, share, part(labels, sizes), 2 / count)
        truth, whole_gradient = step(theirs, images, labels, 1 / count)
        assert_near(logits, part(truth, sizes), f"{when}, logits", tol)
        assert whole_gradient is not None and gradient is not None
        assert_near(gradient / 2, part(whole_gradient, sizes), f"{when}, images", tol)
        for optimizer in optimizers:
            optimizer.step()
        assert_alike(own, theirs, when, tol)


def synchronised(model: nn.Module, sizes: tuple[int, int], side: int, **options: Any) -> None:
    """DDP on a converted copy of the model, fused, against one process."""
    own = copy.deepcopy(model)
    two_steps(ddp_of(own), plain(model), sizes, side, own=own, **options)


# sizes that differ, one value per channel on a process, and no value
SIZES = [((2, 2), 9), ((3, 1), 9), ((1, 3), 1), ((1, 1), 1), ((4, 0), 5), ((0, 3), 9)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("sizes", "side"), SIZES)
def test_equals_one_process(sizes: tuple[int, int], side: int, backend: str) -> None:
    with use_backend(backend):
        synchronised(small(), sizes, side)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_equals_one_process(backend: str) -> None:
    """With the stem, and one pixel per image in the last stage."""
    with use_backend(backend):
        synchronised(narrow(), (3, 1), 32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last(backend: str) -> None:
    model = small().to(memory_format=torch.channels_last)
    with use_backend(backend):
        synchronised(model, (3, 2), 9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind", ["momentum=None", "affine=False", "no running statistics", "no statistics, no affine"]
)
def test_kinds_of_batch_norm(kind: str, backend: str) -> None:
    model = small(momentum=None) if kind == "momentum=None" else small()
    options = {"track_running_stats": "statistics" not in kind, "affine": "affine" not in kind}
    if kind != "momentum=None":
        for block in (m for m in model.modules() if isinstance(m, IdentityBlock | ConvBNReLU)):
            for name in ("bn", "bn1", "bn3"):
                if hasattr(block, name):
                    old = getattr(block, name).num_features
                    setattr(block, name, nn.BatchNorm2d(old, **options).double())
    with use_backend(backend):
        synchronised(model, (3, 1), 9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["all", "some"])
def test_frozen_statistics(which: str, backend: str) -> None:
    model = small()
    for i, module in enumerate(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            module.train(which == "some" and i % 2 == 0)
    frozen = [not m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert any(frozen) and all(frozen) == (which == "all")
    with use_backend(backend):
        synchronised(model, (3, 1), 9)
        ours = converted(model).eval()
        x, _ = batch((3, 1), 9)
        assert_near(ours(x), plain(model).eval()(x), "eval")


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_by_batch_statistics_is_each_processs_own(backend: str) -> None:
    """As in torch, where a BatchNorm keeps no running ones."""
    block = ConvBNReLU(3, 8, 3).double().eval()
    block.bn = nn.BatchNorm2d(8, track_running_stats=False).double().eval()
    x = part(batch((3, 1), 9)[0], (3, 1))
    with use_backend(backend):
        assert_near(converted(block)(x), plain(block)(x), "eval")


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_convolutions(backend: str) -> None:
    """The BatchNorm of a convolution whose gradient nobody wants is synchronised as well."""
    model = small()
    for name in ("conv", "conv1"):
        for module in (m for m in model.modules() if hasattr(m, name)):
            getattr(module, name).weight.requires_grad_(False)
    with use_backend(backend):
        synchronised(model, (3, 1), 9)


@pytest.mark.parametrize("plan", ["fused", "split"])
def test_plans_in_fp32(plan: str) -> None:
    """Channels in blocks of 32: cpp's fused kernels, which fp64 does not reach."""
    model = nn.Sequential(
        ConvBNReLU(3, 32, 1),
        Stage(ConvBlock(32, (32, 32, 64)), IdentityBlock(64, (32, 32, 64))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )
    model = prepared(model).to(memory_format=torch.channels_last)
    truth = plain(model).double()
    with use_backend("cpp"), use_plan(plan):
        ddp = ddp_of(model)
        assert [row.plan for row in report(model) if "conv3" in row.name] == [plan] * 2
        two_steps(ddp, truth, (3, 2), 8, 1e-5, own=model, rate=1e-3)


@pytest.mark.skipif("triton" not in BACKENDS, reason="runs under TRITON_INTERPRET=1")
@pytest.mark.parametrize("plan", ["fused", "split", "epilogue", *DATAFLOWS])
def test_plans_of_triton(plan: str) -> None:
    """Gradients that come unmasked or for some pixels, masks in bits: the sums are the same."""
    with use_backend("triton"), use_plan(plan):
        synchronised(small().to(memory_format=torch.channels_last), (2, 1), 6)


# --- conv_bn itself -------------------------------------------------------------------------------


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x of both processes, weight, BatchNorm's weight and bias."""
    x = torch.randn(5, 4, 6, 7, dtype=dtype)
    return x, torch.randn(6, 2, 3, 3, dtype=dtype), *torch.rand(2, 6, dtype=dtype)


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.3, torch.tensor(0.3, dtype=torch.float64)])
def test_conv_bn(
    momentum: float | Tensor, backend: str, memory_format: torch.memory_format
) -> None:
    x, *parameters = operands(torch.float64)
    x = x.contiguous(memory_format=memory_format)
    upstream = torch.randn(5, 6, 3, 4, dtype=torch.float64)
    found = []
    for sync, mine in ((dist.group.WORLD, lambda t: part(t, (2, 3))), (None, lambda t: t)):
        leaves = [t.clone().requires_grad_() for t in (mine(x), *parameters)]
        running = torch.zeros(6).double(), torch.ones(6).double()
        with use_backend(backend if sync else "reference"):
            d = ops.conv_bn(
                *leaves, *running, stride=2, padding=1, groups=2, momentum=momentum, sync=sync
            )
            out = d.value()
            out.backward(mine(upstream))
        gradients = [t.grad for t in leaves]
        if sync is not None:  # the sum over processes is that of the whole batch
            for gradient in gradients[1:]:
                dist.all_reduce(gradient)
        found.append([d.mean.detach(), *running, out.detach(), *gradients])
    ours, theirs = found
    for i in (3, 4):
        theirs[i] = part(theirs[i], (2, 3))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_near(a, b, f"result {i}", 1e-12)
    means = [torch.empty_like(ours[0]) for _ in range(2)]
    dist.all_gather(means, ours[0])
    assert torch.equal(*means)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_mean_costs_no_variance(backend: str) -> None:
    """The mean is 1000 standard deviations, and differs between processes by 10."""
    x = torch.randn(8, 4, 6, 6) + 1000
    x[:3] += 10
    weight = torch.eye(4).view(4, 4, 1, 1)
    with use_backend(backend):
        d = ops.conv_bn(part(x, (3, 5)), weight, sync=dist.group.WORLD, relu=False)
    truth = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(d.value().double(), part(truth, (3, 5)), rtol=0, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_everywhere(backend: str) -> None:
    x, weight, *_ = operands(torch.float64)
    running = torch.full((6,), 2.0).double(), torch.full((6,), 3.0).double()
    weight.requires_grad_()
    with use_backend(backend):
        d = ops.conv_bn(x[:0], weight, None, None, *running, groups=2, sync=dist.group.WORLD)
        d.value().sum().backward()
    assert (running[0] == 2).all() and (running[1] == 3).all()
    assert weight.grad is not None and not weight.grad.any()
    assert all(v.isfinite().all() for v in (d.mean, d.scale, d.bias))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_process_that_wants_no_gradient_of_its_input(backend: str) -> None:
    """It takes part in adding up the sums all the same ("reference" does as autograd does)."""
    x, weight, *_ = operands(torch.float64)
    bn = torch.ones(6).double().requires_grad_()
    mine = part(x, (2, 3)).clone().requires_grad_(RANK == 1)
    with use_backend(backend):
        d = ops.conv_bn(mine, weight, bn, groups=2, sync=dist.group.WORLD)
        d.value().square().sum().backward()
    assert (mine.grad is None) == (RANK == 0)
    assert bn.grad is not None and bn.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_of_one_is_a_batch_of_ones_own(backend: str) -> None:
    alone = [dist.new_group([rank]) for rank in range(2)]
    model = small()
    own = copy.deepcopy(model)
    own = nn.SyncBatchNorm.convert_sync_batchnorm(own, alone[RANK])
    x, labels = batch((3, 3), 9)
    with use_backend(backend):
        ours = step(own, part(x, (3, 3)), part(labels, (3, 3)), 1)
        theirs = step(plain(model), part(x, (3, 3)), part(labels, (3, 3)), 1)
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, "a group of one")
    weight = torch.ones(2, 2, 1, 1)
    for group in (None, alone[RANK]):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            ops.conv_bn(torch.ones(1, 2, 1, 1), weight, sync=group)
    # whoever is not in a group has no one to share with, as in torch
    bn = nn.SyncBatchNorm(2, process_group=alone[1 - RANK])
    block = ConvBNReLU(2, 2, 1)
    block.bn = bn
    assert block(torch.randn(2, 2, 3, 3)).shape == (2, 2, 3, 3)


def test_errors_move_nothing() -> None:
    x, weight, *_ = operands(torch.float64)
    running = torch.zeros(6).double(), torch.ones(6).double()
    with pytest.raises(ValueError, match="pool_padding must be at most half"):
        ops.conv_bn_relu_maxpool(
            x, weight, None, None, *running, groups=2, pool_padding=2, sync=dist.group.WORLD
        )
    assert not running[0].any() and (running[1] == 1).all()


def test_a_graph_has_the_module_itself() -> None:
    """Which refuses a CPU, so that the error says who ran."""
    block = converted(IdentityBlock(8, (4, 4, 8)))
    assert all(row.runs == "fused" for row in report(block))
    x = torch.randn(2, 8, 5, 5)
    with pytest.raises(Exception, match="SyncBatchNorm expected input tensor to be on GPU"):
        torch.compile(block, backend="eager")(x)
    with pytest.raises(Exception, match="SyncBatchNorm expected input tensor to be on GPU"):
        torch.jit.trace(block, (x,), check_trace=False)
    assert torch.jit.trace(block.eval(), (x,))(x).shape == x.shape

    def traced(x: Tensor) -> Tensor:
        return ops.conv_bn(x, torch.ones(2, 8, 1, 1), sync=dist.group.WORLD).value()

    with pytest.raises(RuntimeError, match="sync cannot be recorded"):
        torch.jit.trace(traced, (x,))


# --- DDP and FSDP2 --------------------------------------------------------------------------------


def averaged(model: nn.Module) -> None:
    """Gradients as DDP leaves them."""
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [small, narrow])
def test_ddp_with_statistics_of_each_process(make: Callable[[], nn.Module], backend: str) -> None:
    """Fused blocks against torch.nn, both under DDP, running statistics broadcast at each step."""
    own = make()
    twin = plain(own)
    models = [DistributedDataParallel(m) for m in (own, twin)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in models]
    with use_backend(backend):
        for when in ("step 1", "step 2"):
            images, labels = (part(t, (4, 4)) for t in batch((4, 4), 40))
            ours, theirs = (step(m, images, labels, 0.25) for m in models)
            for name, a, b in zip(("logits", "images"), ours, theirs, strict=True):
                assert_near(a, b, f"{when}, {name}")
            for optimizer in optimizers:
                optimizer.step()
            assert_alike(own, twin, when)
            for optimizer in optimizers:
                optimizer.zero_grad()


def torchs() -> nn.Module:
    """A small ResNet of plain torch.nn."""
    return prepared(Small().double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["exact", "recompute"])
@pytest.mark.parametrize("first", ["fuse", "convert"])
def test_a_model_fused_and_converted(first: str, memory: str, backend: str) -> None:
    """In either order, against the plain model in one process."""
    model = torchs()
    own = copy.deepcopy(model)
    ddp = DistributedDataParallel(own)
    for change in (first, "convert" if first == "fuse" else "fuse"):
        if change == "fuse":
            assert fuse(own, inplace=True, memory=memory) is own
        else:
            nn.SyncBatchNorm.convert_sync_batchnorm(own)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in own.modules()) == 15
    with use_backend(backend):
        assert {r.runs for r in report(own)} == {"plain" if backend == "reference" else "fused"}
        two_steps(ddp, model, (3, 1), 40, own=own)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sync", [False, True], ids=["batch norm", "sync batch norm"])
def test_accumulation_equals_one_backward(sync: bool, backend: str) -> None:
    model = small()
    own, joint = copy.deepcopy(model), converted(model) if sync else copy.deepcopy(model)
    ddp = ddp_of(own) if sync else DistributedDataParallel(own)
    batches = [batch((3, 2), 9) for _ in range(3)]
    with use_backend(backend):
        total: Any = 0
        for i, (images, labels) in enumerate(batches):
            images, labels = part(images, (3, 2)), part(labels, (3, 2))
            with ddp.no_sync() if i < 2 else nullcontext():
                step(ddp, images, labels, 1)
            if i == 1:  # nothing was averaged so far
                alone = own[-1].weight.grad.clone()
                dist.all_reduce(alone)
                assert not torch.allclose(alone / 2, own[-1].weight.grad)
            total = total + F.cross_entropy(joint(images), labels, reduction="sum")
        total.backward()
    averaged(joint)
    for (name, p), q in zip(own.named_parameters(), joint.parameters(), strict=True):
        assert_near(p.grad, q.grad, name)


@pytest.mark.parametrize("options", ["static_graph", "find_unused_parameters", "view"])
def test_options_of_ddp(options: str) -> None:
    model = small()
    own = copy.deepcopy(model)
    name = "gradient_as_bucket_view" if options == "view" else options
    two_steps(ddp_of(own, **{name: True}), plain(model), (3, 1), 9, own=own)


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2 of each block, what holds it, and the root."""
    mesh = init_device_mesh("cpu", (2,))
    for module in reversed(list(model.modules())):
        if isinstance(module, FusedModule) and module is not model:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [small, narrow, lambda: fuse(torchs())])
def test_fsdp_equals_one_process(make: Callable[[], nn.Module], backend: str) -> None:
    model = make()
    own = sharded(converted(model))
    assert any(isinstance(m, FusedModule) for m in own.modules())
    with use_backend(backend):
        assert {r.runs for r in report(own)} == {"plain" if backend == "reference" else "fused"}
        two_steps(own, plain(model), (3, 1), 32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fsdp_with_statistics_of_each_process(backend: str) -> None:
    own = small()
    twin = plain(own)
    own = sharded(own)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (own, twin)]
    with use_backend(backend):
        for when in ("step 1", "step 2"):
            images, labels = (part(t, (3, 2)) for t in batch((3, 2), 9))
            for name, a, b in zip(
                ("logits", "images"),
                *(step(m, images, labels, 1) for m in (own, twin)),
                strict=True,
            ):
                assert_near(a, b, f"{when}, {name}")
            averaged(twin)
            for optimizer in optimizers:
                optimizer.step()
            assert_alike(own, twin, when)
            for optimizer in optimizers:
                optimizer.zero_grad()
