"""Which kernels a training step launches, and an inference, with what arguments: a list for
triton_compile.py.

Nothing is computed and no GPU is needed: tensors are allocated and never touched, convolutions of
the library return empty ones. Must run with TRITON_INTERPRET=1, where the triton backend takes CPU
tensors; blocks are those of a GPU all the same.

    TRITON_INTERPRET=1 python tests/triton_launches.py launches.json --targets sm_80 sm_90
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fusedres
from fusedres import backends
from fusedres._conv import Conv, Source, Upstream, output_shape
from fusedres._tensors import stat_dtype
from fusedres.library import conv_bn as split
from fusedres.ops import batch_norm, bn_act, conv_bn, conv_bn_relu_maxpool
from fusedres.triton_kernels import (
    _configs,
    _gemm,
    _launch,
    _merged,
    _spatial,
    _spatial_dgrad,
    _stem,
)
from fusedres.triton_kernels import bn_act as bn_act_host
from fusedres.triton_kernels._launch import Launch

_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


def arch_of(target: str) -> int:
    """As _configs has it."""
    return int(target.removeprefix("sm_")) if target.startswith("sm_") else _configs.HIP


@contextlib.contextmanager
def dry(
    target: str = "sm_90", multiprocessors: int = 132, library: list[float] | None = None
) -> Iterator[list[Launch]]:
    """Records the launches for a target, all dtypes accepted, with nothing computed; `library`
    receives the bytes of activations that each convolution of the library moves.
    """
    moved = [] if library is None else library
    arch = arch_of(target)
    serves_all = replace(backends.BACKENDS["triton"], dtypes=tuple(_TYPES))

    def convolution(a: Tensor, weight: Tensor, conv: Any, memory_format: Any) -> Tensor:
        shape = output_shape(a.shape, weight.shape, conv)
        y = torch.empty(shape, dtype=a.dtype, memory_format=memory_format)
        moved.append(_read(a, weight, conv) + y.nbytes)
        return y

    def convolution_backward(
        dy: Tensor,
        a: Tensor,
        weight: Tensor,
        conv: Any,
        need_da: bool,
        need_dw: bool,
        compact: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        moved.append(dy.nbytes + a.nbytes if need_da else 0)
        moved.append(dy.nbytes + _read(a, weight, conv) if need_dw else 0)
        da = a[:, :, :: conv.stride[0], :: conv.stride[1]] if compact else a
        return torch.empty_like(da) if need_da else None, torch.empty_like(weight)

    with (
        mock.patch.dict(backends.BACKENDS, triton=serves_all),
        mock.patch.object(split, "convolution", convolution),
        mock.patch.object(split, "convolution_backward", convolution_backward),
        mock.patch.object(_gemm, "multiprocessors", lambda device: multiprocessors),
        mock.patch.object(_gemm, "INTERPRETED", False),
        mock.patch.object(bn_act_host, "INTERPRETED", False),
        mock.patch.object(_gemm, "arch_of", lambda device: arch),
        fusedres.use_backend("triton"),
        _launch.recording(run=False) as launches,
    ):
        backends._choose.cache_clear()
        yield launches
    backends._choose.cache_clear()


def _read(a: Tensor, weight: Tensor, conv: Any) -> float:
    """Bytes of a convolution's input that it reads: of a strided 1x1 one pixel in four."""
    pixels = conv.stride[0] * conv.stride[1] if weight.shape[2:] == (1, 1) else 1
    return a.nbytes / pixels


def model_step(batch: int, size: int, **options: Any) -> None:
    """One training step of a FusedResNet50 under bf16 autocast, with no value ever looked at."""
    model = fusedres.FusedResNet50(1000, **options).to(memory_format=torch.channels_last)
    x = torch.empty(batch, 3, size, size, memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.backward(torch.empty_like(out))


_3X3 = (  # channels (in and out), map, stride of the 3x3 layers of a ResNet-50
    *((64, 56, 1), (128, 56, 2), (128, 28, 1), (256, 28, 2), (256, 14, 1), (512, 14, 2)),
    (512, 7, 1),
)


def spatial_step(
    batch: int, dtype: torch.dtype, layers: Sequence[tuple[int, int, int]], kinds: Sequence[str]
) -> None:
    """Forward and wgrad of 3x3 layers by their own kernels, from sources of these kinds."""
    for channels, side, stride in layers:
        conv = Conv((stride, stride), (1, 1, 1, 1), (1, 1), 1)
        x = torch.empty(batch, channels, side, side, dtype=dtype).to(
            memory_format=torch.channels_last
        )
        weight = torch.empty(channels, channels, 3, 3, dtype=dtype)
        shape = output_shape(x.shape, weight.shape, conv)
        y = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        three = (torch.empty(channels),) * 3
        for kind in kinds:
            norm = three if kind != "tensor" else (None,) * 3
            residual = torch.empty_like(x) if "residual" in kind else None
            joined = three if kind == "deferred_residual" else (None,) * 3
            source = Source(x, *norm, residual, *joined, kind != "tensor")
            _spatial.fwd(source, weight, conv, y, None, True)
            _spatial.wgrad(source, y, weight, conv)


def stem_step(batch: int, size: int) -> None:
    """The stem of a ResNet by its fused plan in bf16, and the kernel that takes dy as it is."""
    x = torch.empty(batch, 3, size, size, dtype=torch.bfloat16, memory_format=torch.channels_last)
    weight = torch.empty(64, 3, 7, 7, dtype=torch.bfloat16, requires_grad=True)
    norm = [torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)]
    with fusedres.use_plan("fused"):
        p = conv_bn_relu_maxpool(x, weight, *norm, stride=2, padding=3)
        p.backward(torch.empty_like(p))
    dy = torch.empty(batch, 64, size // 2, size // 2, dtype=torch.bfloat16)
    dy = dy.to(memory_format=torch.channels_last)
    conv = Conv((2, 2), (3, 3, 3, 3), (1, 1), 1)
    _stem.wgrad(Source.plain(x), dy, weight.detach(), conv)


def rare_variants(dtype: torch.dtype) -> None:
    """What no ResNet-50 launches but a caller of the ops may: odd sizes, residuals not emitted."""
    for shape, outs in (((8, 64, 56, 56), 64), ((8, 256, 28, 28), 128), ((3, 5, 7, 7), 11)):
        c = shape[1]
        x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last, requires_grad=True)
        r = torch.empty_like(x).requires_grad_()
        weight = torch.empty(c, c, 1, 1, dtype=dtype, requires_grad=True)
        last = torch.empty(outs, c, 1, 1, dtype=dtype, requires_grad=True)
        norm = [torch.ones(c, requires_grad=True), torch.zeros(c, requires_grad=True)]
        for join in (None, r, conv_bn(r, weight, *norm, relu=False)):
            for relu, stride in ((True, 1), (False, 1), (True, 2)):
                d = conv_bn(x, weight, *norm, residual=join, relu=relu)
                h_ = conv_bn(d, last, stride=stride)
                value = h_.value()
                value.backward(torch.empty_like(value), retain_graph=True)
        frozen = conv_bn(x, weight, *norm, torch.zeros(c), torch.ones(c), training=False)
        bn_act(frozen).backward(torch.empty_like(x))
        d = batch_norm(x, *norm, residual=r)
        d.value().backward(torch.empty_like(x))
        fusedres.add_relu(x, r).backward(torch.empty_like(x))
    for channels, outs, window in ((1, 11, (3, 2, 0)), (3, 64, (2, 2, 0)), (4, 64, (3, 2, 1))):
        x = torch.empty(8, channels, 65, 63, dtype=dtype, memory_format=torch.channels_last)
        weight = torch.empty(outs, channels, 5, 3, dtype=dtype, requires_grad=True)
        with fusedres.use_plan("fused"):
            p = conv_bn_relu_maxpool(
                x, weight, kernel_size=window[0], pool_stride=window[1], pool_padding=window[2]
            )
            p.backward(torch.empty_like(p))


# C, H and stride of ResNet-50's 3x3 convolutions, all of as many channels out as in
SPATIAL = ((64, 56, 1), (128, 28, 1), (256, 14, 1), (512, 7, 1))
SPATIAL += ((128, 56, 2), (256, 28, 2), (512, 14, 2))


def spatial_dgrad_step(batch: int = 256, dtype: torch.dtype = torch.bfloat16) -> None:
    """dgrad of ResNet-50's 3x3 convolutions, with the prologue that masks too, and plain."""
    for c, size, stride in SPATIAL:
        spatial_dgrad((batch, c, size, size), stride, dtype)


def spatial_dgrad(
    shape: tuple[int, int, int, int],
    stride: int,
    dtype: torch.dtype,
    residual: int = 0,
    emitted: bool = False,
) -> None:
    """dgrad of one 3x3 convolution of as many channels out as in, whose input is a Deferred."""
    conv = Conv((stride, stride), (1, 1, 1, 1), (1, 1), 1)
    x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    r = torch.empty_like(x) if residual else None
    a = torch.empty_like(x) if emitted else None
    vector = torch.empty(shape[1], dtype=stat_dtype(dtype))
    weight = torch.empty(shape[1], shape[1], 3, 3, dtype=dtype)
    out = output_shape(shape, weight.shape, conv)
    y = torch.empty(out, dtype=dtype, memory_format=torch.channels_last)
    joined = (vector if residual == 2 else None,) * 3
    source = Source(x, vector, vector, vector, r, *joined, True)
    up = Upstream(y, torch.stack([vector, vector]), y, vector, vector, vector, vector, True)
    for up_, dy in ((up, None), (up._replace(bias=None), up.g)):
        _spatial_dgrad.dgrad(up_, source, a, a, weight, conv, True, dy)


def rare_spatial_dgrad(dtype: torch.dtype) -> None:
    """What no ResNet-50 launches: residuals, emitted activations, odd sizes."""
    for stride in (1, 2):
        for residual in (0, 1, 2):
            spatial_dgrad((8, 64, 28, 28), stride, dtype, residual, residual == 0)
            spatial_dgrad((8, 256, 14, 14), stride, dtype, residual, residual == 0)
        spatial_dgrad((3, 5, 7, 7), stride, dtype, 2)


# 1x1 convolutions of stride 1 of a ResNet-50 with dgrad and wgrad in one kernel: C, K, the side of
# the map; what the input is; whether the activation was emitted and its gradient joins; whether g
# arrives unmasked, as behind a library's 3x3
_MERGED = [
    *((64, 64, 56, "tensor", True, gmask) for gmask in (False, True)),  # the first conv1
    (64, 256, 56, "tensor", False, False),  # the first projection shortcut
    (64, 256, 56, "none", False, False),  # conv3
    *(
        (c, k, side, source, True, gmask)  # conv1 of the other blocks
        for c, k, side in ((256, 64, 56), (256, 128, 56), (512, 128, 28))
        for source in ("tensor_residual", "deferred_residual")
        for gmask in (False, True)
    ),
]
_MERGED_RARE = [
    (c, k, side, source, emit, False)  # no ResNet-50 has these
    for c, k, side in ((64, 64, 28), (64, 256, 28), (256, 64, 28), (512, 128, 28))
    for source, emit in (
        ("none", False),
        ("none", True),
        ("tensor_residual", False),
        ("deferred_residual", False),
        ("deferred_residual", True),
    )
]


def merged_backward(batch: int, dtype: torch.dtype, *, rare: bool = False) -> int:
    """Backward of these convolutions in one kernel each, where it serves them: how many it does."""
    conv, served = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1), 0
    for c, k, side, kind, emit, gmask in _MERGED_RARE if rare else _MERGED:
        options = {"dtype": dtype, "memory_format": torch.channels_last}
        x = torch.empty(batch, c, side, side, **options)
        vectors, outs = [torch.empty(c)] * 3, [torch.empty(k)] * 4
        deferred, joins = (
            kind != "tensor",
            kind.endswith("residual")
            and not (
                emit and kind == "tensor_residual"  # which is not saved then
            ),
        )
        joined = vectors if kind == "deferred_residual" else [None] * 3
        own = vectors if deferred else [None] * 3
        source = Source(x, *own, x if joins else None, *joined, deferred)
        weight = torch.empty(k, c, 1, 1, dtype=dtype)
        if not _merged.serves(x, weight, conv, source):
            continue
        y = torch.empty(batch, k, side, side, **options)
        bias = outs[3] if gmask else None
        for training in (True, False) if rare else (True,):
            up = Upstream(y, torch.empty(2, k), y, *outs[:3], bias, training)
            a = x if emit and deferred else None
            _merged.bwd(up, source, a, x if emit else None, weight, conv)
        served += 1
    return served


def described(launch: Launch) -> dict[str, Any]:
    """A launch as triton_compile.py reads it: what a compilation depends on."""
    arguments: list[list[Any]] = []
    general = launch.kernel.kwargs.get("do_not_specialize") or []
    for name, value in launch.arguments().items():
        parameter = launch.kernel.fn.__annotations__.get(name)
        if parameter is not None:  # tl.constexpr
            arguments.append([name, "constexpr", str(value) if hasattr(value, "name") else value])
        elif value is None or (type(value) is int and value == 1 and name not in general):
            arguments.append([name, "constexpr", value])
        elif isinstance(value, Tensor):
            arguments.append([name, _TYPES.get(value.dtype) or f"*{value.dtype}", True])
        elif isinstance(value, float):
            arguments.append([name, "fp32", False])
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            arguments.append([name, kind, value % 16 == 0 and name not in general])
    sizes = launch.arguments()
    depth = {"conv_bn_fwd_kernel": "C", "conv_bn_dgrad_kernel": "K"}.get(launch.name)
    shallow = depth is not None and sizes[depth] <= 128
    if launch.name == "conv_act_kernel":
        shallow = sizes["C"] * (sizes["R"] * sizes["S"] if not sizes["IMAGE"] else 1) <= 128
    if launch.name == "conv_bn_bwd_kernel":  # deeper, and dw leaves no registers for another
        shallow = sizes["K"] <= 64
    return {
        # few steps deep: another program should run beside its epilogue
        "want": 2 if shallow or launch.name == "conv_bn_stem_fwd_kernel" else 1,
        "module": launch.kernel.fn.__module__.rsplit(".", 1)[1],
        "kernel": launch.name,
        "arguments": arguments,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def unique(launches: list[Launch]) -> list[dict[str, Any]]:
    """Launches that need a compilation of their own."""
    return list({json.dumps(described(launch)): described(launch) for launch in launches}.values())


def main() -> None:
    """Writes a list for each target."""
    sys.path.append(str(Path(__file__).parent))  # which python -P leaves out
    from triton_inference import every_configuration, inference_step, rare_inference

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--targets", nargs="+", default=["sm_90"])
    parser.add_argument(
        "--rare", nargs="+", default=[], help="targets that get what no ResNet-50 launches too"
    )
    parser.add_argument(
        "--every", nargs="+", default=[], help="targets that get every configuration of conv_act"
    )
    options = parser.parse_args()
    lists = {}
    for target in options.targets:
        with dry(target) as launches:
            model_step(256, 224)
            with fusedres.use_plan("masks"):
                model_step(256, 224)
            spatial_step(256, torch.bfloat16, _3X3, ("tensor", "none"))
            spatial_dgrad_step()
            stem_step(256, 224)
            merged_backward(256, torch.bfloat16)
            for batch in (256, 8, 1):
                inference_step(batch)
            if target in options.every:
                every_configuration(arch_of(target))
            if target in options.rare:
                for dtype in (torch.bfloat16, torch.float32, torch.float64):
                    rare_spatial_dgrad(dtype)
                merged_backward(8, torch.bfloat16, rare=True)
                model_step(8, 224, variant="keras")
                rare_variants(torch.bfloat16)
                layers = ((64, 56, 1), (128, 28, 2), (13, 9, 1), (24, 9, 1))
                sources = ("tensor", "none", "tensor_residual", "deferred_residual")
                spatial_step(8, torch.bfloat16, layers, sources)
                spatial_step(8, torch.float32, ((64, 56, 1), (13, 9, 1)), sources)
                for dtype in (torch.bfloat16, torch.float32, torch.float64):
                    rare_inference(dtype)
                    inference_step(8, dtype)
                with fusedres.use_plan("fused"):
                    rare_variants(torch.float32)
        lists[target] = unique(launches)
    options.path.parent.mkdir(parents=True, exist_ok=True)
    options.path.write_text(json.dumps(lists, indent=1))
    print({target: len(listed) for target, listed in lists.items()})


if __name__ == "__main__":
    main()
