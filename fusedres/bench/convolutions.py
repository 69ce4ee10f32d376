"""conv_bn at the layers of a ResNet-50: one convolution as it stands in the network.

What runs is the op's contract, in parts: "fwd" takes the input as the layer before left it and
gives y with its statistics, and the joined activation where a shortcut needs it; "dgrad" and
"wgrad" take g of the layer's output and give g of its input with its sums, or dw; "bwd" is both.
"eager" is what an unfused network runs for the same: BatchNorm by given statistics, add, ReLU,
convolution, statistics; and backward. "convolution" is the library's convolution alone, which the
split plan cannot be faster than.

Values of activations are multiples of an eighth and none comes near ReLU's kink, so that the masks
of all providers agree and errors are of arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import backends
from fusedres._conv import Conv
from fusedres._plan_table import Shape
from fusedres._plans import PRODUCTS, has
from fusedres._tensors import stat_dtype
from fusedres.bench import roofline
from fusedres.bench.light import norm_gradient, sums_of
from fusedres.bench.measure import own_backends
from fusedres.bench.ops import Candidate, Inputs, OpCase, wide
from fusedres.bench.roofline import Layer

aten = torch.ops.aten
DIRECTIONS = ("fwd", "dgrad", "wgrad", "bwd")
EPS = 1e-5
HALF_TYPES = (torch.float16, torch.bfloat16)
Results = list[Tensor]


def conv_cases(
    device: torch.device,
    dtype: torch.dtype,
    batches: Sequence[int],
    directions: Sequence[str] = DIRECTIONS,
    image: int = 224,
) -> list[OpCase]:
    """Every distinct layer of a ResNet-50 in every direction."""
    return [
        Site(layer, batch, dtype, device).case(direction, count)
        for direction in directions
        for batch in batches
        for layer, count in roofline.distinct(roofline.layers(image))
        if has_dgrad(layer) or direction in ("fwd", "wgrad")
    ]


def has_dgrad(layer: Layer) -> bool:
    """Whether anybody wants the gradient of its input: of the image nobody does."""
    return layer.role != "stem"


def conv_of(layer: Layer) -> Conv:
    """Its geometry."""
    padding = layer.kernel // 2
    return Conv((layer.stride, layer.stride), (padding,) * 4, (1, 1), 1)


def plans_of(
    layer: Layer,
    backend: str,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> tuple[str, ...]:
    """The plans of a backend that are worth timing for a layer (in a dtype; None: any); none that
    holds more memory, and none that the device cannot run (None: those that any device runs).
    """
    kernel = (layer.kernel, layer.kernel)
    fuses = "conv_bn" in backends.BACKENDS[backend].fuses
    if not fuses or not conv_of(layer).has_fused_kernel(kernel):
        return ("split",)
    shape = torch.Size((layer.out_channels, layer.in_channels, *kernel))
    if backend == "cuda":
        found = []
        if dtype in HALF_TYPES and device is not None and device.type == "cuda":
            index, conv = device.index or 0, conv_of(layer)
            mine = [p for p in PRODUCTS if conv.has_tensor_core_kernel(shape, p)]
            found = [p for p in mine if backends.product_problem(p, index) is None]
        return *(f"fused+{product}" for product in found), "split"
    if backend == "cpp":
        multiplies = backends.kernels("cpp", "conv_bn").multiplies
        served = conv_of(layer).has_cpu_kernel(shape) and (dtype is None or multiplies(dtype))
        return ("fused", "split") if served else ("split",)
    if layer.kernel > 1:
        return ("fused", "split") if layer.role == "stem" else ("fused", "epilogue", "split")
    return "fused", "split", *_with_options(layer)


def _with_options(layer: Layer) -> list[str]:
    """Plans of a 1x1 convolution with something added."""
    from fusedres.triton_kernels._merged import MOST_CHANNELS  # which needs Triton

    found = ["fused+masks"] if joins(layer) else []
    if layer.stride == 1 and layer.in_channels <= MOST_CHANNELS.get(layer.out_channels, 0):
        found.append("fused+merged")
    return found


def joins(layer: Layer) -> bool:
    """Whether a residual joins in its input, and the joined activation is written."""
    return layer.role == "conv1" and layer.name != "layer1.0.conv1"


class Tuned(NamedTuple):
    """A kernel whose block sizes are to be chosen, and where it is timed: the plan that launches
    it, in the direction in which a training step does.
    """

    kernel: str  # as _configs.candidates knows it
    plan: str
    direction: str


def kernels_of(layer: Layer, backend: str) -> tuple[Tuned, ...]:
    """The kernels that a backend has for a layer, where they have block sizes to choose. Those of
    backward run together, for dgrad writes dy only where a wgrad follows.
    """
    if backend != "triton" or "fused" not in plans_of(layer, backend):
        return ()
    if not has_dgrad(layer):
        return Tuned("fwd", "fused", "fwd"), Tuned("wgrad", "fused", "wgrad")
    found = [Tuned("fwd", "fused", "fwd"), Tuned("dgrad", "fused", "bwd")]
    found.append(Tuned("wgrad", "fused", "bwd"))
    if "epilogue" in plans_of(layer, backend):
        found.append(Tuned("fwd_plain", "epilogue", "fwd"))
    if "fused+merged" in plans_of(layer, backend):
        found.append(Tuned("bwd", "fused+merged", "bwd"))
    return tuple(found)


@dataclass(frozen=True)
class Site:
    """A layer of the network, with the batch that comes by."""

    layer: Layer
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def conv(self) -> Conv:
        """Its geometry."""
        return conv_of(self.layer)

    @property
    def shape(self) -> Shape:
        """As the plan table knows it."""
        layer, pixels = self.layer, self.batch * self.layer.out_size**2
        kernel, stride = (layer.kernel, layer.kernel), (layer.stride, layer.stride)
        return Shape(layer.in_channels, layer.out_channels, kernel, stride, pixels)

    @property
    def training(self) -> tuple[str, str]:
        """The two cases that make up its part of a training step."""
        return "fwd", "bwd" if has_dgrad(self.layer) else "wgrad"

    @property
    def deferred(self) -> bool:
        """Whether its input is the raw output of the layer before, not a Tensor in memory."""
        plain = self.layer.role in ("stem", "downsample") or self.layer.name == "layer1.0.conv1"
        return not plain

    @property
    def joins(self) -> bool:
        """Whether a residual joins in its input, and the joined activation is written."""
        return joins(self.layer)

    def case(self, direction: str, count: int) -> OpCase:
        """The layer in one direction; it stands `count` times in the network."""
        layer, need_input, need_weight = self.layer, direction != "wgrad", direction != "dgrad"
        forward = direction == "fwd"
        ours = self._forward if forward else partial(self._backward, need_input, need_weight)
        eager = (
            self._eager_forward
            if forward
            else partial(self._eager_backward, need_input, need_weight)
        )
        candidates = [
            Candidate(f"fusedres-{backend}", partial(ours, backend, plan), backend, plan)
            for backend in own_backends("conv_bn", self.device, self.dtype)
            for plan in plans_of(layer, backend, self.dtype, self.device)
        ]
        candidates.append(Candidate("eager", eager, note="BatchNorm, add, ReLU, convolution"))
        library = partial(self._library, direction)
        note = "the library's, without what is around it"
        candidates.append(Candidate("convolution", library, note=note, judged=False))
        truth = (
            self._true_forward if forward else partial(self._true_backward, need_input, need_weight)
        )
        shape = [self.batch, layer.size, layer.in_channels, layer.out_channels]
        times = 2 if direction == "bwd" else 1
        return OpCase(
            {
                "section": "conv_bn",
                "case": direction,
                "shape": [*shape, layer.kernel, layer.stride],
                "batch": self.batch,
                "count": count,
            },
            self.dtype,
            self._bytes(direction),
            float(times * layer.flops * self.batch),
            self.inputs,
            tuple(candidates),
            truth,
        )

    def _bytes(self, direction: str) -> float:
        """What has to be read and written once."""
        size = self.dtype.itemsize
        read, whole = self.layer.read(size), self.layer.input(size)
        output, weight = self.layer.output(size), self.layer.weights * size
        if direction == "fwd":
            joined = 2 * whole if self.joins else 0  # the residual, and what is written
            return self.batch * (read + joined + output) + weight
        incoming = 2 * output  # g, y
        if direction == "wgrad":
            return self.batch * (incoming + read) + weight
        given = whole if self.joins or self.layer.name == "layer1.0.conv1" else 0  # of the shortcut
        mask = (2 if self.joins else 1) * whole if self.deferred else 0  # x for sums, a for ReLU
        one = incoming + mask + given + whole
        if direction == "dgrad":
            return self.batch * one + weight
        return self.batch * (one + (0 if self.deferred else read)) + 2 * weight

    # --- inputs ---

    def inputs(self, seed: int) -> Inputs:
        """The tensors of the layer in both directions, channels_last."""
        generator = torch.Generator(self.device).manual_seed(seed)
        layer, stat = self.layer, stat_dtype(self.dtype)

        def full(channels: int, size: int) -> Tensor:
            shape = (self.batch, channels, size, size)
            values = torch.randn(shape, generator=generator, device=self.device)
            values = values.mul_(8).round_().clamp_(-24, 24).div_(8).to(self.dtype)
            return values.contiguous(memory_format=torch.channels_last)

        def vector(channels: int, low: float, high: float) -> Tensor:
            values = torch.rand(channels, generator=generator, device=self.device)
            return (values * (high - low) + low).to(stat)

        c, k = layer.in_channels, layer.out_channels
        fan = c * layer.kernel**2
        weight = torch.randn(
            k, c, layer.kernel, layer.kernel, generator=generator, device=self.device
        )
        weight = (weight * (2.0 / fan) ** 0.5).to(stat, memory_format=torch.channels_last)
        t: Inputs = {"x": full(c, layer.size), "weight": weight, "packed": weight.to(self.dtype)}
        if self.deferred:
            mean = (vector(c, -0.5, 0.5) * 8).round() / 8
            bias = ((vector(c, -0.5, 0.5) * 8).round() + 0.5) / 8  # between the eighths
            t |= {"mean": mean, "scale": torch.ones_like(mean), "bias": bias}
        if self.joins:
            t["residual"] = full(c, layer.size)
        a = t["a"] = self._activation(t)  # ours read it where it was emitted, eager always
        if self.joins and c % 8 == 0:
            eight = (a > 0).permute(0, 2, 3, 1).reshape(-1, c // 8, 8).byte()
            places = torch.arange(8, dtype=torch.uint8, device=self.device)
            t["bits"] = (eight << places).sum(2, dtype=torch.uint8)
        # y as the convolution left it; running statistics to be moved
        y = self._convolve(a, t["packed"])
        in_stat = y.to(stat)
        mean, var = in_stat.mean((0, 2, 3)), in_stat.var((0, 2, 3), correction=0)
        rstd = torch.rsqrt(var + EPS)
        bn_weight = vector(k, 0.5, 1.5)
        t |= {"bn_weight": bn_weight, "bn_bias": vector(k, -0.5, 0.5)}
        t |= {"running_mean": torch.zeros_like(mean), "running_var": torch.ones_like(mean)}
        t |= {"y": y, "y_mean": mean, "y_scale": bn_weight * rstd, "y_rstd": rstd}
        g = full(k, layer.out_size)
        t["g"] = g
        t["count"] = torch.tensor([y.numel() // k], dtype=torch.int32, device=self.device)
        t["sums"] = sums_of(g.to(stat), in_stat, mean)
        if self.joins or layer.name == "layer1.0.conv1":
            t["grad_a"] = full(c, layer.size)
        return t

    def _activation(self, t: Inputs) -> Tensor:
        """What the input stands for, as an unfused network computes it."""
        if not self.deferred:
            return t["x"]
        one = torch.full_like(t["mean"], 1 - EPS)  # of the variance: rstd is 1
        a = F.batch_norm(t["x"], t["mean"], one, t["scale"], t["bias"], False, 0.0, EPS)
        if self.joins:
            a += t["residual"]
        return a.relu_()

    def _convolve(self, a: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(a, weight, None, self.layer.stride, self.layer.kernel // 2)

    # --- ours ---

    def _source(self, t: Inputs) -> tuple[Any, ...]:
        vectors = (t.get(name) for name in ("mean", "scale", "bias"))
        return t["x"], *vectors, t.get("residual"), None, None, None, self.deferred

    def _forward(self, backend: str, plan: str, t: Inputs) -> Results:
        norm = (t["bn_weight"], t["bn_bias"], t["running_mean"], t["running_var"])
        y, mean, _, rstd, *_, a, _ = torch.ops.fusedres.conv_bn_fwd(
            *self._source(t), t["weight"], t["packed"], *self.conv, self.joins, *norm, True, 0.1,
            None, EPS, backend, plan,
        )  # fmt: skip
        return [y, mean, rstd, a] if self.joins else [y, mean, rstd]

    def _backward(
        self, need_input: bool, need_weight: bool, backend: str, plan: str, t: Inputs
    ) -> Results:
        source = self._source(t)
        if self.joins:  # the activation was emitted: the residual is not kept
            source = (*source[:4], None, *source[5:])
        own = (t["y"], t["y_mean"], t["y_scale"], t["y_rstd"])
        grad_a = t.get("grad_a") if need_input else None
        stat = t["y_mean"].dtype
        g_in, sums, _, dw, *_ = torch.ops.fusedres.conv_bn_bwd(
            *source, t["weight"], t["packed"], *self.conv, t["a"] if self.joins else None,
            t["bits"] if has(plan, "masks") else None, t["g"], t["sums"], grad_a, *own, None, True,
            need_input, need_weight, stat, stat, backend, plan,
        )  # fmt: skip
        found = [g_in, sums] if need_input and self.deferred else [g_in] * need_input
        return [dw] * need_weight + found

    # --- the peers ---

    def _eager_forward(self, t: Inputs) -> Results:
        y = self._convolve(self._activation(t), t["packed"])
        return [y, aten.batch_norm_update_stats(y, t["running_mean"], t["running_var"], 0.1)[0]]

    def _eager_backward(self, need_input: bool, need_weight: bool, t: Inputs) -> Results:
        if (self.deferred and need_input) or not t["y"].is_cuda:
            # it makes its own sums, ours those of the layer before: as many passes
            norm = (t["bn_weight"], None, None, t["y_mean"], t["y_rstd"], True, EPS, [True] * 3)
            dy = aten.native_batch_norm_backward(t["g"], t["y"], *norm)[0]
        else:
            own = (t["y_mean"], t["y_rstd"], t["bn_weight"], *t["sums"], t["count"])
            dy = aten.batch_norm_backward_elemt(t["g"], t["y"], *own)
        da, dw = self._convolution_backward(dy, t["a"], t, need_input, need_weight)
        found = [dw.to(t["weight"].dtype)] if need_weight else []
        if da is None:
            return found
        if "grad_a" in t:
            da += t["grad_a"]
        return [*found, aten.threshold_backward(da, t["a"], 0) if self.deferred else da]

    def _library(self, direction: str, t: Inputs) -> Results:
        if direction == "fwd":
            return [self._convolve(t["a"], t["packed"])]
        self._convolution_backward(t["g"], t["a"], t, direction != "wgrad", direction != "dgrad")
        return []

    def _convolution_backward(
        self, dy: Tensor, a: Tensor, t: Inputs, need_input: bool, need_weight: bool
    ) -> tuple[Any, Any]:
        padding = self.layer.kernel // 2
        geometry = ([self.layer.stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
        needs = [need_input, need_weight, False]
        da, dw, _ = aten.convolution_backward(dy, a, t["packed"], None, *geometry, needs)
        return da, dw

    # --- the truth, in fp64 ---

    def _true_forward(self, t: Inputs) -> Results:
        t = wide(t)
        a = self._activation(t)
        y = self._convolve(a, t["packed"])
        rstd = torch.rsqrt(y.var((0, 2, 3), correction=0) + EPS)
        return [y, y.mean((0, 2, 3)), rstd, a]

    def _true_backward(self, need_input: bool, need_weight: bool, t: Inputs) -> Results:
        t = wide(t)
        own = {name: t[f"y_{name}"] for name in ("mean", "scale", "rstd")} | {"y": t["y"]}
        dy = norm_gradient(own, t["g"], t["sums"])
        a = t["a"]
        da, dw = self._convolution_backward(dy, a, t, need_input, need_weight)
        found = [dw] * need_weight
        if da is None:
            return found
        if "grad_a" in t:
            da += t["grad_a"]
        if not self.deferred:
            return [*found, da]
        g = torch.where(a <= 0, 0.0, da)
        return [*found, g, sums_of(g, t["x"], t["mean"])]
