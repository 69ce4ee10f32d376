"""The cuda backend on a GPU: every kernel at ResNet-50's sizes against fp64, streams, CUDA graphs.

With FUSEDRES_EMULATED set and the plugin `emulated` loaded (test_cuda_kernels.py says how), what
needs no real device runs on the CPU at small sizes: `-m "not gpu"` selects it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from in_emulator import check, check_stored_like, gradient, plain_statistics, wide
from test_triton_gpu import LAYERS, Layer
from torch import Tensor

from fusedres import _norm
from fusedres._tensors import elements_per_channel, per_channel, stat_dtype
from fusedres.models import FusedResNet50
from fusedres.native import _pack, add_relu, batch_norm, bn_act, bn_relu_maxpool, require
from fusedres.reference.bn_act import bn_act as reference_bn_act
from fusedres.testing import CHANNELS_LAST, CONTIGUOUS, HALF_TYPES, assert_three_way, check_case

EMULATED = "FUSEDRES_EMULATED" in os.environ
DEVICE = "cpu" if EMULATED else "cuda"
pytestmark: Any = [] if EMULATED else pytest.mark.gpu
needs_gpu = pytest.mark.gpu  # of tests that no emulator serves

Shape = tuple[int, int, int, int]
BATCH = 256
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SIZES = [(64, 112), (256, 56), (64, 56), (512, 28), (1024, 14), (2048, 7), (512, 7)]
RESIDUALS = ["none", "tensor", "normalized"]
WINDOW = (3, 2, 1)  # of the stem's pool
EPS = 1e-5


def shape_of(c: int, size: int, batch: int = BATCH) -> Shape:
    """[N, C, H, W]; small in the emulator."""
    if EMULATED:
        return 2, c // 8, max(3, size // 8), max(3, size // 8)
    return batch, c, size, size


def cases() -> list[Any]:
    """(shape, dtype, layout): fp64, whose truth is as wide as itself, at a small batch; one NCHW
    case of every dtype.
    """
    found = [
        (shape_of(*size, 8 if dtype == torch.float64 else BATCH), dtype, CHANNELS_LAST)
        for size in SIZES
        for dtype in DTYPES
    ]
    found += [(shape_of(64, 56, 8), dtype, CONTIGUOUS) for dtype in DTYPES]
    return [pytest.param(*case, id=described(*case)) for case in found]


def described(shape: Shape, dtype: torch.dtype, layout: torch.memory_format) -> str:
    order = "NHWC" if layout == CHANNELS_LAST else "NCHW"
    return f"{'x'.join(map(str, shape))}-{dtype}-{order}".replace("torch.", "")


every_case = pytest.mark.parametrize(("shape", "dtype", "layout"), cases())


@pytest.fixture(autouse=True)
def _as_it_says() -> Iterator[None]:
    """fp32 is fp32; memory of one test is not kept for the next."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    if not EMULATED:
        torch.cuda.empty_cache()


class Make:
    """Random tensors of one case, made where they are used: the CPU would take minutes."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        layout: torch.memory_format = CHANNELS_LAST,
        seed: int = 0,
        device: str = DEVICE,
    ) -> None:
        self.shape, self.dtype, self.layout = tuple(shape), dtype, layout
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def full(self, shape: Sequence[int] | None = None, offset: float = 0.25) -> Tensor:
        values = torch.randn(
            tuple(shape or self.shape), generator=self.generator, device=self.device
        )
        return (values + offset).to(self.dtype).contiguous(memory_format=self.layout)

    def integers(self, low: int, high: int, shape: Sequence[int] | None = None) -> Tensor:
        """From [low, high)."""
        size = tuple(shape or self.shape)
        values = torch.randint(
            low, high, size, generator=self.generator, device=self.device, dtype=torch.int8
        )
        return values.to(self.dtype).contiguous(memory_format=self.layout)

    def vector(self, low: float = -0.5, high: float = 0.5) -> Tensor:
        values = torch.rand(self.shape[1], generator=self.generator, device=self.device)
        return (values * (high - low) + low).to(stat_dtype(self.dtype))

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        """mean, scale, bias."""
        return self.vector(), self.vector(0.5, 1.5), self.vector()


def check_everywhere(
    name: str, dtype: torch.dtype, ours: Tensor, peer: Tensor, truth: Tensor, like: Tensor
) -> None:
    """The three-way rule, and every element within a rounding of the truth: in the norm of so many
    a row that was left out would not show.
    """
    check(name, dtype, ours, peer, truth, like)
    slack = 128 * torch.finfo(stat_dtype(dtype)).eps  # of the arithmetic before it is rounded
    off = (ours.double() - truth).abs_().sub_(truth.abs().mul_(torch.finfo(dtype).eps))
    worst = float(off.max())
    assert worst <= slack, f"{name}: an element is {worst:.1e} beyond a rounding of the truth"


# --- every kernel against fp64 --------------------------------------------------------------------


@pytest.mark.parametrize("kind", RESIDUALS)
@every_case
def test_bn_act_fwd(
    shape: Shape, dtype: torch.dtype, layout: torch.memory_format, kind: str
) -> None:
    make = Make(shape, dtype, layout)
    y, own = make.full(), make.affine()
    residual = None if kind == "none" else make.full()
    joined = make.affine() if kind == "normalized" else (None, None, None)
    arguments: Any = (y, *own, residual, *joined)
    for relu in (True, False):
        a = bn_act.bn_act_fwd(*arguments, relu)
        peer = reference_bn_act(*arguments, relu)
        check_everywhere(
            f"a, relu {relu}", dtype, a, peer, reference_bn_act(*wide(*arguments), relu), y
        )


# with the mask, with a second gradient, with a normalised residual, where g goes
BACKWARDS = [
    (True, False, False, "new"),
    (True, True, False, "new"),
    (True, False, True, "grad"),
    (False, True, True, "given"),
    (False, False, False, "new"),
]


@pytest.mark.parametrize(("mask", "extra", "residual", "where"), BACKWARDS)
@every_case
def test_bn_act_bwd(
    shape: Shape,
    dtype: torch.dtype,
    layout: torch.memory_format,
    mask: bool,
    extra: bool,
    residual: bool,
    where: str,
) -> None:
    make = Make(shape, dtype, layout)
    grad, y, mean = make.full(), make.full(), make.vector()
    a = make.full().relu_() if mask else None
    more = make.full() if extra else None
    res_y, res_mean = (make.full(), make.vector()) if residual else (None, None)
    out = {"new": None, "grad": grad, "given": torch.empty_like(grad)}[where]
    expected, peer = gradient(grad, more, a, y, mean)
    expected = expected.clone(memory_format=torch.preserve_format)  # grad may be overwritten
    g, sums, res_sums = bn_act.bn_act_bwd(grad, more, a, y, mean, res_y, res_mean, out)
    if out is not None:
        assert g is out
    assert torch.equal(g, expected)
    check_stored_like(y, g)
    # of g as it was rounded: what rounds in `gradient` has rounded already
    found = [("sums", sums, peer, y, mean)]
    if res_y is not None and res_mean is not None and res_sums is not None:
        res_peer = gradient(g, None, None, res_y, res_mean)[1]
        found.append(("res_sums", res_sums, res_peer, res_y, res_mean))
    for name, ours, theirs, other, center in found:
        truth = gradient(g.double(), None, None, other.double(), center.double())[1]
        check(name, stat_dtype(dtype), ours, theirs, truth, y)


@every_case
def test_masks_that_follow_from_y(
    shape: Shape, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """To the bit those of the activation that the forward wrote."""
    make = Make(shape, dtype, layout)
    grad, y, (mean, scale, bias) = make.full(), make.full(), make.affine()
    a = bn_act.bn_act_fwd(y, mean, scale, bias, None, None, None, None, True)
    g, sums, _ = bn_act.bn_act_bwd(grad, None, a, y, mean, None, None)
    found = bn_act.bn_act_bwd(grad, None, a, y, mean, None, None, affine=(scale, bias))
    assert torch.equal(found[0], g) and torch.equal(found[1], sums)
    assert torch.equal(bn_act.masked_sums(grad, y, mean, scale, bias), sums)
    rest = (y, mean, scale, make.vector(0.5, 1.5), sums, True, None, None)
    dy, _, _ = batch_norm.batch_norm_bwd(g, *rest)
    masked, _, _ = batch_norm.batch_norm_bwd(grad, *rest, mask_bias=bias)
    assert torch.equal(masked, dy)


# in training with a number or a tensor as momentum, or with frozen statistics
MODES = ["number", "tensor", "frozen"]


@pytest.mark.parametrize("mode", MODES)
@every_case
def test_batch_norm_fwd(
    shape: Shape, dtype: torch.dtype, layout: torch.memory_format, mode: str
) -> None:
    make = Make(shape, dtype, layout)
    y = make.full(offset=20.0 if mode == "tensor" else 0.25)  # E[x^2] - E[x]^2 would cancel
    weight, bias = make.vector(0.5, 1.5), make.vector()
    running = (make.vector(), make.vector(0.5, 1.5))
    before = tuple(r.double().clone() for r in running)
    momentum: Any = torch.tensor(0.25, device=DEVICE) if mode == "tensor" else 0.25
    training = mode != "frozen"
    results = batch_norm.batch_norm_fwd(y, weight, bias, *running, training, momentum, EPS)
    truths, peers = (
        plain_statistics(t, weight, bias, before, training, EPS) for t in (y.double(), y)
    )
    names = ("mean", "var", "rstd", "scale", "bias")
    for name, ours, peer, truth in zip(names, results, peers, truths, strict=True):
        check(name, stat_dtype(dtype), ours, peer, truth, y)
    moved: Any = [b.clone() for b in before]
    if training:
        _norm.update_running(*moved, truths[0], truths[1], 0.25, elements_per_channel(y))
    for name, ours, truth in zip(("running_mean", "running_var"), running, moved, strict=True):
        check(name, stat_dtype(dtype), ours, truth.to(ours.dtype), truth, y)


def plain_batch_norm_bwd(
    g: Tensor, y: Tensor, mean: Tensor, scale: Tensor, rstd: Tensor, sums: Tensor, training: bool
) -> Tensor:
    x = g.to(mean.dtype) * per_channel(scale)
    if training:
        slope = per_channel(rstd * rstd * sums[1]) * (y.to(mean.dtype) - per_channel(mean))
        x = x - per_channel(scale) * (per_channel(sums[0]) + slope) / elements_per_channel(y)
    return x.to(g.dtype)


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@every_case
def test_batch_norm_bwd(
    shape: Shape, dtype: torch.dtype, layout: torch.memory_format, training: bool
) -> None:
    make = Make(shape, dtype, layout)
    g, y = make.full(), make.full()
    mean, scale, rstd = make.vector(), make.vector(0.5, 1.5), make.vector(0.5, 1.5)
    sums = torch.stack([make.vector(), make.vector()]) * elements_per_channel(y)
    kinds = (mean.dtype, torch.bfloat16)
    dy, dweight, dbias = batch_norm.batch_norm_bwd(g, y, mean, scale, rstd, sums, training, *kinds)
    vectors: Any = (mean, scale, rstd, sums)
    peer = plain_batch_norm_bwd(g, y, *vectors, training)
    check_everywhere(
        "dy", dtype, dy, peer, plain_batch_norm_bwd(*wide(g, y, *vectors), training), y
    )
    for ours, truth, kind in ((dweight, sums[1] * rstd, kinds[0]), (dbias, sums[0], kinds[1])):
        assert ours is not None
        torch.testing.assert_close(ours, truth.to(kind), rtol=1e-6, atol=0)


def chip() -> tuple[int, int]:
    """Multiprocessors, and the shared memory a block may ask for on one."""
    if EMULATED:
        return 3, 48 * 1024
    properties = torch.cuda.get_device_properties(DEVICE)
    shared = properties.shared_memory_per_multiprocessor - 1024  # which the system keeps a block
    return properties.multi_processor_count, shared


def fits_on_chip(y: Tensor) -> bool | None:
    """None where it is close; rounding and room for the statistics then decide."""
    multiprocessors, shared = chip()
    size, scratch = y.numel() * y.element_size(), 36 * 1024
    vectors = -(-y.size(1) * y.element_size() // 16)
    if not y.is_contiguous(memory_format=CHANNELS_LAST) or size > multiprocessors * shared:
        return False
    if -(-vectors // 32) > multiprocessors // 2:
        return None
    return True if 1.3 * size < multiprocessors * (shared - scratch) else None


ON_CHIP = [(512, 28), (1024, 14), (256, 14), (2048, 7), (512, 7)]  # stages 3 to 5 at batch 32
NORM_ACTS = (
    [(shape_of(*size, 32), dtype, CHANNELS_LAST) for size in ON_CHIP for dtype in DTYPES]
    + [(shape_of(256, 56), dtype, CHANNELS_LAST) for dtype in DTYPES[:3]]
    + [(shape_of(256, 14, 32), torch.bfloat16, CONTIGUOUS)]
)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(
    ("shape", "dtype", "layout"), [pytest.param(*c, id=described(*c)) for c in NORM_ACTS]
)
def test_batch_norm_act_fwd(
    shape: Shape,
    dtype: torch.dtype,
    layout: torch.memory_format,
    with_residual: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = Make(shape, dtype, layout)
    y, weight, bias = make.full(), make.vector(0.5, 1.5), make.vector()
    residual = make.full() if with_residual else None
    start = make.vector(), make.vector(0.5, 1.5)
    twice, two_passes = [], batch_norm.batch_norm_fwd

    def noted(*arguments: Any) -> Any:
        twice.append(arguments)
        return two_passes(*arguments)

    monkeypatch.setattr(batch_norm, "batch_norm_fwd", noted)
    running: Any = [r.clone() for r in start]
    a, statistics = batch_norm.batch_norm_act_fwd(
        y, weight, bias, *running, True, 0.1, EPS, residual, True
    )
    fits = fits_on_chip(y)
    if fits is not None:
        assert fits == (not twice), f"{len(twice)} reads beyond the first"
    again: Any = [r.clone() for r in start]
    expected = two_passes(y, weight, bias, *again, True, 0.1, EPS)
    truths, peers = (plain_statistics(t, weight, bias, (), True, EPS) for t in (y.double(), y))
    for ours, peer, truth, other in zip(statistics, peers, truths, expected, strict=True):
        check("statistics", stat_dtype(dtype), ours, peer, truth, y)
        torch.testing.assert_close(ours, other)
    for ours, other in zip(running, again, strict=True):
        torch.testing.assert_close(ours, other)
    mean, _, _, scale, shift = statistics
    arguments: Any = (y, mean, scale, shift, residual, None, None, None)
    peer = reference_bn_act(*arguments, True)
    check_everywhere("a", dtype, a, peer, reference_bn_act(*wide(*arguments), True), y)


POOLED = [
    (shape_of(64, 112, 8 if dtype == torch.float64 else BATCH), dtype, CHANNELS_LAST)
    for dtype in DTYPES
] + [(shape_of(64, 112, 8), dtype, CONTIGUOUS) for dtype in DTYPES[:3]]
every_pool = pytest.mark.parametrize(
    ("shape", "dtype", "layout"), [pytest.param(*c, id=described(*c)) for c in POOLED]
)


@every_pool
def test_bn_relu_maxpool_fwd(shape: Shape, dtype: torch.dtype, layout: torch.memory_format) -> None:
    make = Make(shape, dtype, layout)
    y, affine = make.full(), make.affine()
    p = bn_relu_maxpool.bn_relu_maxpool_fwd(y, *affine, *WINDOW)

    def plain(y: Tensor, *affine: Any) -> Tensor:
        a = reference_bn_act(y, *affine, None, None, None, None, True)
        return F.max_pool2d(a, *WINDOW)

    check_everywhere("p", dtype, p, plain(y, *affine), plain(*wide(y, *affine)), p)
    check_stored_like(y, p)


@every_pool
def test_bn_relu_maxpool_with_ties(
    shape: Shape, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """On small integers, which nothing rounds: to the bit, whichever of many maxima wins."""
    make = Make(shape, dtype, layout)
    y = make.integers(-3, 4)
    y[:, ::3, ::7, ::5] = float("nan")
    c = y.size(1)
    mean, scale = torch.zeros(c, device=DEVICE), torch.full((c,), 0.5, device=DEVICE)
    bias = (torch.arange(c, device=DEVICE) % 5 - 2) * 0.25
    mean, scale, bias = (v.to(stat_dtype(dtype)) for v in (mean, scale, bias))
    p = bn_relu_maxpool.bn_relu_maxpool_fwd(y, mean, scale, bias, *WINDOW)
    leaf = reference_bn_act(y, mean, scale, bias, None, None, None, None, False).requires_grad_()
    plain = F.max_pool2d(leaf.relu(), *WINDOW)
    torch.testing.assert_close(p, plain.detach(), rtol=0, atol=0, equal_nan=True)
    grad = make.integers(1, 5, p.shape)
    g, sums = bn_relu_maxpool.bn_relu_maxpool_bwd(grad, y, mean, scale, bias, *WINDOW)
    (expected,) = torch.autograd.grad(plain, leaf, grad)
    assert torch.equal(g, expected)
    check_stored_like(y, g)
    finite = torch.arange(c, device=DEVICE) % 3 > 0
    y = y.nan_to_num()
    peer = gradient(g, None, None, y, mean)[1]
    truth = gradient(g.double(), None, None, y.double(), mean.double())[1]
    sums, peer, truth = (s[:, finite] for s in (sums, peer, truth))
    check("sums", stat_dtype(dtype), sums, peer, truth, y)


@every_case
def test_add_relu(shape: Shape, dtype: torch.dtype, layout: torch.memory_format) -> None:
    make = Make(shape, dtype, layout)
    x, residual = make.full(), make.full(offset=-0.25)
    out = add_relu.add_relu_fwd(x, residual)
    assert torch.equal(out, (x + residual).relu())
    truth = (x.double() + residual.double()).relu()
    assert_three_way("out", [out], [(x + residual).relu()], [truth], dtype)
    dx = add_relu.add_relu_bwd(x, out)
    assert torch.equal(dx, torch.where(out <= 0, torch.zeros_like(x), x))
    check_stored_like(x, out)
    check_stored_like(x, dx)


def resnet50_weights(layout: torch.memory_format, device: str = DEVICE) -> list[Tensor]:
    """Of its 53 convolutions."""
    torch.manual_seed(0)
    weights = [w.detach() for w in FusedResNet50().parameters() if w.dim() == 4]
    assert len(weights) == 53
    if EMULATED:
        weights = [w[: max(1, w.size(0) // 32)] for w in weights]
    return [w.to(device).contiguous(memory_format=layout) for w in weights]


@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_pack(dtype: torch.dtype, layout: torch.memory_format) -> None:
    weights = resnet50_weights(layout)
    for cast, w in zip(_pack.pack(weights, dtype), weights, strict=True):
        assert torch.equal(cast, w.to(dtype))
        assert cast.is_contiguous(memory_format=CHANNELS_LAST) and cast.data_ptr() % 16 == 0


# --- ops through autograd -------------------------------------------------------------------------

CHOSEN = [LAYERS[i] for i in (0, 2, 3, 5, 6, 8, 12, 16, 19, 20)]
if EMULATED:
    CHOSEN = [replace(layer, batch=2, size=5) for layer in CHOSEN[-2:]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", CHOSEN, ids=str)
def test_conv_bn_by_the_split_plan(layer: Layer, dtype: torch.dtype) -> None:
    """The three-way rule, in half types without ReLU, whose mask flips there by chance."""
    if dtype in HALF_TYPES:
        layer = replace(layer, relu=False)
    check_case(layer, "cuda", dtype, CHANNELS_LAST, DEVICE, plan="split")


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("layer", CHOSEN[:4], ids=str)
def test_masks_in_half_types(layer: Layer, dtype: torch.dtype) -> None:
    check_case(layer, "cuda", dtype, CHANNELS_LAST, DEVICE, trim=0.01, plan="split")


# --- streams, graphs, devices ---------------------------------------------------------------------


@dataclass
class Op:
    """One op with inputs of its own."""

    inputs: list[Tensor]
    run: Callable[[], list[Tensor]]

    def refill(self, values: Sequence[Tensor]) -> None:
        for t, value in zip(self.inputs, values, strict=True):
            t.copy_(value)


def op_named(name: str, dtype: torch.dtype, seed: int = 0, device: str = DEVICE) -> Op:
    """An op on random inputs; `run` starts from the same running statistics each time."""
    shape = shape_of(64, 112, 8) if "maxpool" in name else shape_of(256, 14, 32)
    if name == "batch_norm_act_fwd, two passes":
        shape = shape_of(512, 28, 256)
    make = Make(shape, dtype, seed=seed, device=device)
    x, other = make.full(), make.full()
    mean, scale, bias = make.affine()
    rstd, sums = make.vector(0.5, 1.5), torch.stack([make.vector(), make.vector()])
    running, start = [mean.clone(), rstd.clone()], [mean.clone(), rstd.clone()]
    window = (mean, scale, bias, *WINDOW)
    norm: Any = (scale, bias, *running, True, 0.1, EPS)

    def reset() -> None:
        for r, s in zip(running, start, strict=True):
            r.copy_(s)

    def statistics() -> list[Tensor]:
        reset()
        return [*batch_norm.batch_norm_fwd(x, *norm), *running]

    def norm_act() -> list[Tensor]:
        reset()
        a, found = batch_norm.batch_norm_act_fwd(x, *norm, other, True)
        return [a, *found, *running]

    def joined() -> list[Tensor]:
        return [bn_act.bn_act_fwd(x, mean, scale, bias, other, mean, scale, bias, True)]

    def backward() -> list[Tensor]:
        g, *both = bn_act.bn_act_bwd(x, None, other, other, mean, x, rstd)
        return [g, *both]  # type: ignore[list-item]

    def norm_backward() -> list[Tensor]:
        found = batch_norm.batch_norm_bwd(
            x, other, mean, scale, rstd, sums, True, scale.dtype, scale.dtype
        )
        return list(found)  # type: ignore[arg-type]

    if name == "bn_relu_maxpool_bwd":
        pooled = bn_relu_maxpool.bn_relu_maxpool_fwd(x, *window)
        other = make.full(pooled.shape)
    if name == "pack":
        weights = [w + seed for w in resnet50_weights(CHANNELS_LAST, device)]
        half = dtype if dtype in HALF_TYPES else torch.bfloat16
        return Op(weights, lambda: _pack.pack(weights, half))
    runs: dict[str, Callable[[], list[Tensor]]] = {
        "bn_act_fwd": joined,
        "bn_act_bwd": backward,
        "batch_norm_fwd": statistics,
        "batch_norm_bwd": norm_backward,
        "batch_norm_act_fwd": norm_act,
        "batch_norm_act_fwd, two passes": norm_act,
        "bn_relu_maxpool_fwd": lambda: [bn_relu_maxpool.bn_relu_maxpool_fwd(x, *window)],
        "bn_relu_maxpool_bwd": lambda: [*bn_relu_maxpool.bn_relu_maxpool_bwd(other, x, *window)],
        "add_relu_fwd": lambda: [add_relu.add_relu_fwd(x, other)],
        "add_relu_bwd": lambda: [add_relu.add_relu_bwd(x, other)],
    }
    return Op([x, other, mean, scale, bias], runs[name])


OPS = [
    "bn_act_fwd",
    "bn_act_bwd",
    "batch_norm_fwd",
    "batch_norm_bwd",
    "batch_norm_act_fwd",
    "batch_norm_act_fwd, two passes",
    "bn_relu_maxpool_fwd",
    "bn_relu_maxpool_bwd",
    "add_relu_fwd",
    "add_relu_bwd",
    "pack",
]
every_op = pytest.mark.parametrize("name", OPS)
LONG = 100_000_000  # clock ticks: some 50 ms


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone(memory_format=torch.preserve_format) for t in tensors]


def assert_same_bits(name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.any(), f"{name}: result {i} is all zero"
        assert torch.equal(a, b), f"{name}: result {i} differs"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_op
def test_the_same_input_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    op = op_named(name, dtype)
    first = copies(op.run())
    for _ in range(3):
        assert_same_bits(name, op.run(), first)


@needs_gpu
@every_op
def test_runs_on_the_current_stream(name: str) -> None:
    """After a long kernel there and the change of the inputs behind it; and nobody waits."""
    op, other = op_named(name, torch.bfloat16), op_named(name, torch.bfloat16, seed=1)
    before, after = copies(op.inputs), copies(other.inputs)
    op.refill(after)
    expected = copies(op.run())
    op.refill(before)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op.run()  # for its memory on this stream, which may have to wait
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        op.refill(after)
        results = op.run()
        assert not stream.query(), "the op waited for the GPU"
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(name, results, expected)


@needs_gpu
@every_op
def test_two_streams_at_once(name: str) -> None:
    ops = [op_named(name, torch.bfloat16, seed=seed) for seed in (0, 1)]
    expected = [copies(op.run()) for op in ops]
    streams = [torch.cuda.Stream() for _ in ops]
    results: list[list[list[Tensor]]] = [[], []]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG // 10)  # so that both queues fill
    for _ in range(5):
        for op, stream, found in zip(ops, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(copies(op.run()))
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    for found, right in zip(results, expected, strict=True):
        for once in found:
            assert_same_bits(name, once, right)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_op
def test_a_cuda_graph_replays_it(name: str, dtype: torch.dtype) -> None:
    op, other = op_named(name, dtype), op_named(name, dtype, seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            op.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = op.run()
    for values in (copies(op.inputs), copies(other.inputs)):
        op.refill(values)
        graph.replay()
        replayed = copies(results)
        assert_same_bits(name, replayed, op.run())


@needs_gpu
@every_op
def test_a_device_that_is_not_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = (op_named(name, torch.bfloat16, device=f"cuda:{i}") for i in range(2))
    assert torch.cuda.current_device() == 0
    there.refill([t.to("cuda:1") for t in here.inputs])
    results = there.run()
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in results)
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_same_bits(name, [t.to("cuda:0") for t in results], here.run())


def test_an_error_names_the_op_and_what_was_launched() -> None:
    make = Make(shape_of(64, 56, 1), torch.float32)
    y, (mean, scale, bias) = make.full(), make.affine()
    addresses = [t.data_ptr() for t in (y, mean, scale, bias)]
    sizes = tuple(y.shape)
    absurd = (0, sizes, 0, 63, 0)  # float32, NHWC, on a 64th device
    error = r"bn_act_fwd: .*cudaErrorInvalidDevice.* on device 63, last launch: no kernel with 0 "
    error += "blocks of 0 threads"
    with pytest.raises(RuntimeError, match=error):
        require().bn_act_fwd(absurd, True, (*addresses, 0, 0, 0, 0, y.data_ptr()))
    here = (0, sizes, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"bn_act_fwd: .*cudaErrorInvalidValue.* on device 0"):
        require().bn_act_fwd(here, True, (*addresses, 0, 0, 0, 0, 0))
    # nothing of it sticks
    a = bn_act.bn_act_fwd(y, mean, scale, bias, None, None, None, None, True)
    assert math.isfinite(float(a.sum()))
