"""conv_bn by the products of the backend "cuda": every prologue with every epilogue against fp64.

On a GPU; in the emulator (test_cuda_kernels.py), whose GPU is the CPU; and, for the Python around
the kernels, on what tests/plain_extension.py has in their place.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import plain_ops
import pytest
import torch
from plain_extension import Extension, installed
from test_conv_bn import Chain
from torch import Tensor

from fusedres import _conv, backends, use_backend, use_plan
from fusedres._conv import Conv, Source, Upstream
from fusedres._plans import PRODUCTS
from fusedres.library import conv_bn as library
from fusedres.native import _tensor_cores
from fusedres.native import conv_bn as kernels
from fusedres.ops import _self_check, conv_bn
from fusedres.ops._self_check import Case
from fusedres.testing import (
    CHANNELS_LAST,
    HALF_TYPES,
    Maker,
    assert_three_way,
    check_case,
    norm_arguments,
)

EMULATED = "FUSEDRES_EMULATED" in os.environ
POINT = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)
Results = dict[str, Tensor]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """One that the backend "cuda" runs on."""
    with ExitStack() as stack:
        if request.param == "cpu" and not EMULATED:
            stack.enter_context(installed(Extension()))
        yield torch.device(request.param, 0 if request.param == "cuda" else None)


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest, device: torch.device) -> str:
    """One that the device runs."""
    problem = backends.product_problem(request.param, device.index)
    if problem is not None:
        pytest.skip(problem)
    name: str = request.param
    return name


# --- both directions, as registered ---------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A case of the self-check, and what is wanted of its backward."""

    case: Case
    dtype: torch.dtype
    need_input: bool = True
    need_weight: bool = True
    packed: bool = False  # the weight is cast already, from fp32
    types: tuple[torch.dtype | None, torch.dtype | None] = (torch.float32, torch.float32)

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), str(self.case).replace(" ", "")]
        words += [] if self.need_input else ["no input"]
        words += [] if self.need_weight else ["no weight"]
        return ",".join(words + ["packed"] * self.packed)


def sized(rows: int, channels: int) -> tuple[int, int, int, int]:
    """[N, C, H, W] of so many pixels."""
    sizes = {300: (3, 10, 10), 127: (1, 1, 127), 129: (3, 43, 1), 63: (7, 3, 3), 1: (1, 1, 1)}
    sizes |= {1001: (7, 13, 11), 385: (5, 77, 1)}
    n, height, width = sizes[rows]
    return n, channels, height, width


def runs() -> Iterator[Run]:
    """Every kind of input with every kind of result; sizes and the other choices take turns."""
    sizes = itertools.cycle(
        (rows, channels, filters)
        for rows in (300, 127, 129, 63)
        for channels, filters in ((64, 64), (320, 128), (128, 192), (192, 256), (256, 512))
    )
    dtypes = itertools.cycle(HALF_TYPES)
    kinds = ("plain", "", "tensor", "normalised")
    for kind, relu, emit, training in itertools.product(kinds, *[(True, False)] * 3):
        if kind == "plain" and not relu:
            continue
        for step in (1, 2) if emit else (1,):
            rows, channels, filters = next(sizes)
            case = Case(
                sized(rows, channels), filters, "" if kind == "plain" else kind, kind != "plain",
                relu, emit, training, masked=rows in (300, 63), step=step,
            )  # fmt: skip
            yield Run(case, next(dtypes))
    for dtype, kind in itertools.product(HALF_TYPES, kinds[1:]):
        case = Case(sized(1, 64), 128, kind, emit=True, training=False)
        yield Run(case, dtype)
        case = Case(sized(129, 64), 64, kind, masked=kind == "")
        yield Run(case, dtype, need_input=False)
        yield Run(case, dtype, need_weight=False, types=(None, torch.float16))
        yield Run(case._replace(shape=sized(63, 128)), dtype, packed=True, types=(dtype, None))
    yield Run(Case(sized(1, 64), 64, deferred=False, training=False), torch.bfloat16)


def registered(run: Run, t: dict[str, Any], backend: str, plan: str) -> Results:
    """By torch.ops; of the backend "plain" as tests/plain_ops.py has it."""
    case, plain = run.case, backend == "plain"
    source = _self_check._source(case, t)
    running = t["running_mean"].clone(), t["running_var"].clone()
    norm = (t["y_scale"], t["y_bias"], *running, case.training, 0.25, None, 1e-5)
    weight = t["parameter"] if run.packed else t["weight"]
    conv = (weight, t["weight"] if run.packed else None, *POINT)
    op = plain_ops.conv_bn_fwd if plain else torch.ops.fusedres.conv_bn_fwd
    found = op(*source, *conv, case.emit and case.deferred, *norm, backend, plan)
    names = ("y", "mean", "variance", "rstd", "scale", "bias", "activation")
    results = dict(zip(names, found, strict=False))
    results |= {"running mean": running[0], "running variance": running[1]}
    if "a" in t and case.residual == "tensor":
        source = source._replace(residual=None)
    g, grad_a, y_bias = t["g"], t.get("grad_a"), None if case.masked else t["y_bias"]
    if plain and y_bias is not None:
        affine = (t["y_mean"], t["y_scale"], t["y_bias"])
        g = torch.where(plain_ops.bn_act_fwd(t["y"], *affine, *(None,) * 4, True) <= 0, 0, g)
    if plain and grad_a is not None:
        grad_a = library.spread(grad_a, t["x"]) if grad_a.shape != t["x"].shape else grad_a
    own = (t["y"], t["y_mean"], t["y_scale"], t["y_rstd"], y_bias)
    op = plain_ops.conv_bn_bwd if plain else torch.ops.fusedres.conv_bn_bwd
    found = op(
        *source, *conv, t.get("a"), None, g, t["sums"], grad_a, *own, case.training,
        run.need_input, run.need_weight, *run.types, backend, plan,
    )  # fmt: skip
    names = ("g_in", "sums", "residual's sums", "dw", "dweight", "dbias")
    results |= zip(names, found, strict=True)
    return {name: v for name, v in results.items() if v is not None and v.numel() > 0}


def inputs(run: Run, device: torch.device, seed: int) -> dict[str, Any]:
    """Those of the self-check, and the weight in fp32 that theirs is the cast of."""
    t = _self_check._inputs(run.case, run.dtype, device, seed)
    return t | {"parameter": t["weight"].float()}


def wide(t: dict[str, Any]) -> dict[str, Any]:
    return {name: v.double() for name, v in t.items()}


def check_close(name: str, ours: Tensor, peer: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """The three-way rule, and the same of the element that is furthest off: in the norm a row that
    was left out would not show.
    """
    assert_three_way(name, [ours], [peer], [truth], dtype)
    off, other = (float((r.double() - truth).abs().max()) for r in (ours, peer))
    limit = 2 * other + 1e-2 * float(truth.abs().max())
    assert off <= limit, f"{name}: an element is off by {off:.2e}, allowed {limit:.2e}"


def ring_runs() -> Iterator[Run]:
    """Several tiles of rows a block, with every way that a tile of the input is kept or not: few or
    many channels, one piece of filters or several.
    """
    for dtype, (rows, channels, filters) in zip(
        itertools.cycle(HALF_TYPES),
        ((1001, 64, 64), (1001, 64, 512), (1001, 256, 64), (385, 832, 512), (385, 128, 832)),
        strict=False,
    ):
        yield Run(Case(sized(rows, channels), filters), dtype)
        yield Run(Case(sized(rows, channels), filters, "normalised", emit=True), dtype)
    for dtype, filters in itertools.product(HALF_TYPES, (64, 128, 256)):  # a kernel each
        yield Run(Case(sized(129, 64), filters, deferred=False), dtype)


@pytest.mark.parametrize("run", list(ring_runs()), ids=str)
def test_rings(run: Run, product: str, device: torch.device) -> None:
    test_three_way(run, product, device)


@pytest.mark.parametrize("run", list(runs()), ids=str)
def test_three_way(run: Run, product: str, device: torch.device) -> None:
    t = inputs(run, device, 1)
    ours = registered(run, t, "cuda", f"fused+{product}")
    peer, truth = registered(run, t, "plain", ""), registered(run, wide(t), "plain", "")
    assert ours.keys() == peer.keys()
    for name, result in ours.items():
        check_close(name, result, peer[name], truth[name], run.dtype)
        if name in ("y", "g_in", "activation"):
            assert result.is_contiguous(memory_format=CHANNELS_LAST)
    assert ("g_in" in ours, "dw" in ours) == (run.need_input, run.need_weight)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_the_same_input_gives_the_same_bits(
    dtype: torch.dtype, product: str, device: torch.device
) -> None:
    big = device.type == "cuda"
    shape = (64, 256, 56, 56) if big else (3, 64, 13, 11)
    run = Run(Case(shape, 128, "normalised", emit=True), dtype)
    t = inputs(run, device, 2)
    first, *others = (registered(run, t, "cuda", f"fused+{product}") for _ in range(3))
    for other in others:
        for name, result in first.items():
            assert torch.equal(result, other[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "filters", "size", "kind"),
    [
        (64, 256, 56, ""),
        (256, 64, 56, "tensor"),
        (256, 128, 56, "normalised"),
        (512, 128, 28, "tensor"),
        (256, 1024, 14, ""),
        (1024, 256, 14, "tensor"),
        (512, 2048, 7, ""),
        (2048, 512, 7, "tensor"),
    ],
)
@pytest.mark.parametrize("name", PRODUCTS)
def test_layers_of_a_resnet(
    name: str, channels: int, filters: int, size: int, kind: str, dtype: torch.dtype
) -> None:
    problem = backends.product_problem(name, 0)
    if problem is not None:
        pytest.skip(problem)
    case = Case((256, channels, size, size), filters, kind, emit=bool(kind), masked=bool(kind))
    run = Run(case, dtype)
    t = inputs(run, torch.device("cuda", 0), 3)
    ours = registered(run, t, "cuda", f"fused+{name}")
    peer, truth = (registered(run, v, "cuda", "split") for v in (t, wide(t)))
    for what, result in ours.items():
        check_close(what, result, peer[what], truth[what], dtype)


# --- under autograd -------------------------------------------------------------------------------

CHAINS = [
    Chain("tensor", (3, 64, 7, 5), 128, emit=True),
    Chain("none", (3, 64, 7, 5), 64, relu=False, out_relu=False),
    Chain("none", (2, 64, 9, 7), 192, training=False),
    Chain("tensor_residual", (3, 64, 7, 5), 128, emit=True),
    Chain("deferred_residual", (3, 128, 7, 5), 64),
    Chain("none", (2, 64, 6, 5), 64, kernel=3, padding=1),  # whose reader leaves the mask
]


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_chains(chain: Chain, dtype: torch.dtype, product: str, device: torch.device) -> None:
    check_case(
        chain, "cuda", dtype, CHANNELS_LAST, str(device), trim=0.005, plan=f"fused+{product}"
    )


@pytest.mark.parametrize("also_whole", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 6, 4), (2, 64, 5, 7), (3, 64, 1, 4)])
def test_a_sampled_activation(
    shape: tuple[int, ...], also_whole: bool, product: str, device: torch.device
) -> None:
    def results(plan: str) -> list[Tensor]:
        make = Maker(torch.bfloat16, CHANNELS_LAST, str(device))
        t = Chain("tensor_residual", shape, 64).inputs(make)  # type: ignore[arg-type]
        wd = Maker(torch.bfloat16, CHANNELS_LAST, str(device), seed=1).weight(128, 64, 1, 1)
        with use_backend("cuda"), use_plan(plan):
            d = conv_bn(t["x"], t["w0"], *norm_arguments(t, "n0"), residual=t["r"])
            h, sampled = conv_bn(d, t["w"], *norm_arguments(t, "n"), emit=(2, 2))
            shortcut = conv_bn(sampled, wd, stride=2, relu=False)
            parts = [h.value().sum((2, 3)), shortcut.value().square().sum((2, 3))]
            parts += [sampled.value.sum((2, 3))] if also_whole else []
        sum(p.square().sum() for p in parts).backward()  # type: ignore[union-attr]
        return [*parts, *(x.grad for x in (*t.values(), wd) if x.grad is not None)]

    for ours, theirs in zip(results(f"fused+{product}"), results("split"), strict=True):
        off = torch.linalg.vector_norm((ours - theirs).double())
        assert off <= 0.05 * torch.linalg.vector_norm(theirs.double())


def test_an_empty_batch(product: str, device: torch.device) -> None:
    chain = Chain("deferred_residual", (0, 64, 3, 3), 128, emit=True)
    t = chain.inputs(Maker(torch.bfloat16, CHANNELS_LAST, str(device)))
    with use_backend("cuda"), use_plan(f"fused+{product}"):
        outputs = chain.ours(t)
    sum(o.sum() for o in outputs.values()).backward()  # type: ignore[union-attr]
    assert outputs["value"].shape == (0, 128, 3, 3) and outputs["emitted"].shape == (0, 64, 3, 3)
    for name, x in t.items():
        if x.requires_grad:
            assert x.grad is not None and x.grad.shape == x.shape, name
            assert not name.startswith("w") or not x.grad.any(), name


@pytest.mark.parametrize("odd", ["unaligned", "weight in gaps", "negated weight", "one pixel"])
def test_tensors_may_lie_anyhow(odd: str, product: str, device: torch.device) -> None:
    shape = (1, 64, 1, 1) if odd == "one pixel" else (2, 64, 5, 3)
    x = torch.randn(shape).to(device, torch.bfloat16).contiguous(memory_format=CHANNELS_LAST)
    w = torch.randn(128, 64, 1, 1).to(device, torch.bfloat16)
    expected = torch.nn.functional.conv2d(x.double(), w.double())
    if odd == "unaligned":
        flat = x.new_empty(x.numel() + 1)
        x = flat[1:].as_strided(x.shape, x.stride(), 1).copy_(x)
        assert x.data_ptr() % 16
    if odd == "weight in gaps":
        w = torch.stack((w, w), 2)[:, :, 0]
    if odd == "negated weight":
        w = torch.complex(w.float(), -w.float()).conj().imag.to(torch.bfloat16)
        w = torch._neg_view(-w)
        assert w.is_neg()
    w = w.detach().requires_grad_()
    running = torch.zeros(128, device=device), torch.ones(128, device=device)
    with use_backend("cuda"), use_plan(f"fused+{product}"):
        d = conv_bn(x, w, None, None, *running, training=odd != "one pixel")
        d.value().float().square().sum().backward()
    torch.testing.assert_close(d.y.double(), expected, rtol=1e-2, atol=1e-2)
    assert w.grad is not None and w.grad.isfinite().all()


# --- what no kernel gets to see -------------------------------------------------------------------

WRONG = {
    "dtype": "needs fp16 or bf16 in channels_last",
    "format": "needs fp16 or bf16 in channels_last",
    "channels": "multiples of 64",
    "filters": "multiples of 64",
    "too many": "multiples of 64",
    "kernel": "a 1x1 kernel",
    "stride": "stride 1",
    "padding": "no padding",
    "weight": "got x",
    "weight's dtype": "got x",
    "scale": "scale must be",
    "bias alone": "come together",
    "residual": "a residual only with them",
    "product": "product: got 'imma', accepted: mma, wgmma",
    "masks": "keeps no masks in bits",
    "y": "y does not belong to x",
    "g": "g must be",
    "sums": "sums must be",
    "y_bias": "y_bias must be",
    "grad_a": "grad_a must be",
    "grad_a's rank": "grad_a",
    "a": "a must be",
    "y's format": "must be",
}


@pytest.mark.parametrize("change", WRONG)
def test_what_is_wrong_is_refused(change: str, device: torch.device) -> None:
    dtype = torch.float32 if change == "dtype" else torch.bfloat16
    layout = torch.contiguous_format if change == "format" else CHANNELS_LAST
    channels, filters = 72 if change == "channels" else 64, 72 if change == "filters" else 64
    channels = _conv.MOST_TILED["wgmma"] + 64 if change == "too many" else channels
    kernel = 3 if change == "kernel" else 1
    conv = POINT._replace(stride=(2, 2)) if change == "stride" else POINT
    conv = POINT._replace(padding=(1, 1, 1, 1)) if change == "padding" else conv

    def full(count: int, height: int = 4, form: torch.memory_format = layout) -> Tensor:
        values = torch.randn(2, count, height, 4, dtype=dtype, device=device)
        return values.contiguous(memory_format=form)

    weight = torch.randn(filters, channels, kernel, kernel, dtype=dtype, device=device)
    weight = weight[:, :-8] if change == "weight" else weight
    weight = weight.float() if change == "weight's dtype" else weight
    v = torch.ones(channels, device=device)
    source = Source(full(channels), v, v, v, None, None, None, None, True)
    if change == "scale":
        source = source._replace(scale=v[:3])
    if change == "bias alone":
        source = source._replace(mean=None, scale=None)
    if change == "residual":
        source = Source.plain(source.x)._replace(residual=full(channels))
    name = "imma" if change == "product" else "mma"
    backward = change in ("y", "g", "sums", "y_bias", "grad_a", "grad_a's rank", "a", "y's format")
    if not backward:
        norm = (None, None, None, None, True, 0.1, 1e-5)
        with pytest.raises(ValueError, match="conv_bn_fwd") as raised:
            masks = change == "masks"
            kernels.conv_bn_fwd(source, weight, conv, False, masks, *norm, product=name)
        assert WRONG[change] in str(raised.value)
        if change == "masks":
            return
    k = torch.ones(filters, device=device)
    form = torch.contiguous_format if change == "y's format" else layout
    height = 4 if change != "y" else 3
    g, sums = full(filters, 3 if change == "g" else height, form), torch.stack((k, k))
    sums = sums[:1] if change == "sums" else sums
    y, y_bias = full(filters, height, form), k[:9] if change == "y_bias" else None
    up = Upstream(g, sums, y, k, k, k, y_bias, True)
    grad_a = full(channels, 3) if change == "grad_a" else None
    grad_a = full(channels)[0] if change == "grad_a's rank" else grad_a
    a = full(channels, 3) if change == "a" else None
    with pytest.raises(ValueError, match="conv_bn_bwd") as raised:
        kernels.conv_bn_dgrad(source, weight, conv, a, up, grad_a, name, True, None, None)
    assert WRONG[change] in str(raised.value)


def test_only_the_cuda_backend_has_products() -> None:
    x = torch.randn(2, 64, 4, 4).contiguous(memory_format=CHANNELS_LAST)
    w, v = torch.randn(64, 64, 1, 1), torch.ones(64)
    source = (x, *(None,) * 7, False)
    norm = (v, v, None, None, True, 0.1, None, 1e-5)
    for backend in ("cpp", "triton"):
        with pytest.raises(ValueError, match=f"backend '{backend}' has no plan 'fused\\+mma'"):
            torch.ops.fusedres.conv_bn_fwd(
                *source, w, None, *POINT, False, *norm, backend, "fused+mma"
            )


if not EMULATED:  # where the CPU is the GPU

    def test_tensors_of_the_cpu_are_refused() -> None:
        """Also where a process has a GPU."""
        x = torch.randn(2, 64, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=CHANNELS_LAST)
        w = torch.randn(64, 64, 1, 1, dtype=torch.bfloat16)
        norm = (None, None, None, None, True, 0.1, 1e-5)
        with pytest.raises(ValueError, match="in channels_last on a GPU"):
            kernels.conv_bn_fwd(Source.plain(x), w, POINT, False, False, *norm, product="mma")


if EMULATED:  # or what a kernel would read or write wrongly is found on the GPU only

    @pytest.mark.parametrize("which", ["g", "y"])
    def test_dy_is_a_tensor_of_its_own(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Blocks beside each other, and later pieces, still read g and y."""
        run = Run(Case(sized(63, 64), 64), torch.bfloat16)
        t = inputs(run, torch.device("cpu"), 0)
        same = t[which]
        monkeypatch.setattr(
            _tensor_cores, "like", lambda x: same if x is t["y"] else torch.empty_like(x)
        )
        for product in PRODUCTS:
            with pytest.raises(RuntimeError, match="conv_bn_dgrad: invalid argument"):
                registered(run, t, "cuda", f"fused+{product}")

    def test_vectors_lie_on_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
        run = Run(Case(sized(63, 64), 64), torch.bfloat16)
        t = inputs(run, torch.device("cpu"), 0)
        monkeypatch.setattr(_tensor_cores, "_aligned_of", lambda _: {})
        source = _self_check._source(run.case, t)
        off = torch.empty(65)[1:].copy_(source.mean)
        up = Upstream(t["g"], t["sums"], t["y"], t["y_mean"], t["y_scale"], t["y_rstd"], None, True)
        args = (source._replace(mean=off), t["weight"], POINT, None, up, None, "mma", True)
        with pytest.raises(RuntimeError, match="conv_bn_dgrad: misaligned address"):
            kernels.conv_bn_dgrad(*args, None, None)
