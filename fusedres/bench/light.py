"""Light passes at ResNet-50's sizes: inputs and bytes, who else can do them, and the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import backends
from fusedres._tensors import per_channel, stat_dtype
from fusedres.bench.measure import own_backends
from fusedres.bench.ops import Candidate, Inputs, OpCase, wide
from fusedres.models import FusedResNet50
from fusedres.native import _pack
from fusedres.reference.bn_act import bn_act as plain_bn_act

aten = torch.ops.aten
SIZES = [(64, 112), (256, 56), (64, 56), (512, 28), (1024, 14), (2048, 7), (512, 7)]
WINDOW = (3, 2, 1)
EPS = 1e-5

Results = Sequence[Tensor]


@dataclass
class Pass:
    """One light pass.

    Attributes:
        tensors: activations read and written, of y's size.
        inputs: makes them.
        ours: calls the kernels of a backend: (kernels by op, inputs).
        torch: torch's own, named; torch_on_cpu says whether it has that there too.
        truth: in fp64.
        pooled: activations of the pool's output among what is read and written.
    """

    name: str
    tensors: int
    inputs: Callable[[Make], Inputs]
    ours: Callable[[Mapping[str, Any], Inputs], Results]
    torch_name: str
    torch: Callable[[Inputs], Results]
    truth: Callable[[Inputs], Results]
    pooled: int = 0
    torch_on_cpu: bool = True
    sizes: list[tuple[int, int]] = field(default_factory=lambda: list(SIZES))

    def bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Read and written by the contract; vectors of channels do not count."""
        plane = shape[2] * shape[3]
        pooled = pooled_size(shape[2]) * pooled_size(shape[3])
        return (self.tensors * plane + self.pooled * pooled) * shape[0] * shape[1] * itemsize


def pooled_size(extent: int) -> int:
    size, stride, padding = WINDOW
    return (extent + 2 * padding - size) // stride + 1


class Make:
    """Random inputs on the device, channels_last."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: str, seed: int) -> None:
        self.shape, self.dtype, self.device = tuple(shape), dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def full(self, shape: Sequence[int] | None = None) -> Tensor:
        size = tuple(shape or self.shape)
        values = torch.randn(size, generator=self.generator, device=self.device) + 0.25
        return values.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def vector(self, low: float = -0.5, high: float = 0.5) -> Tensor:
        values = torch.rand(self.shape[1], generator=self.generator, device=self.device)
        return (values * (high - low) + low).to(stat_dtype(self.dtype))

    def norm(self, suffix: str = "") -> Inputs:
        """A BatchNorm: its parameters, its statistics and what follows from them."""
        weight, var = self.vector(0.5, 1.5), self.vector(0.5, 1.5)
        rstd = torch.rsqrt(var + EPS)
        made = {"mean": self.vector(), "var": var, "rstd": rstd, "weight": weight}
        made |= {"scale": weight * rstd, "bias": self.vector()}
        return {name + suffix: v for name, v in made.items()}


# --- the passes -----------------------------------------------------------------------------------


def eval_norm(t: Inputs, y: str = "y", suffix: str = "") -> Tensor:
    """torch's BatchNorm by given statistics: normalise only."""
    mean, var, weight, bias = (t[name + suffix] for name in ("mean", "var", "weight", "bias"))
    return F.batch_norm(t[y], mean, var, weight, bias, False, 0.0, EPS)


def forward_pass(name: str, tensors: int, residual: str) -> Pass:
    def inputs(make: Make) -> Inputs:
        t = {"y": make.full()} | make.norm()
        if residual:
            t["r"] = make.full()
        return t | make.norm("_r") if residual == "normalized" else t

    def arguments(t: Inputs) -> Any:
        joined = (t.get(f"{n}_r") for n in ("mean", "scale", "bias"))
        return t["y"], t["mean"], t["scale"], t["bias"], t.get("r"), *joined, True

    def eager(t: Inputs) -> Results:
        a = eval_norm(t)
        if residual == "tensor":
            a += t["r"]
        if residual == "normalized":
            a += eval_norm(t, "r", "_r")
        return [a.relu_()]

    joins = {"": "", "tensor": ", add_", "normalized": ", batch_norm(eval), add_"}[residual]
    return Pass(
        name,
        tensors,
        inputs,
        lambda k, t: [k["bn_act"].bn_act_fwd(*arguments(t))],
        f"batch_norm(eval){joins}, relu_",
        eager,
        lambda t: [plain_bn_act(*arguments(t))],
    )


def sums_of(g: Tensor, y: Tensor, mean: Tensor) -> Tensor:
    return torch.stack([g.sum((0, 2, 3)), (g * (y - per_channel(mean))).sum((0, 2, 3))])


def reduced(g: Tensor, y: Tensor, t: Inputs, suffix: str = "") -> Tensor:
    """torch's sums, as SyncBatchNorm takes them: sum g, sum g*(y - mean)."""
    mean, rstd, weight = (t[n + suffix] for n in ("mean", "rstd", "weight"))
    sums = aten.batch_norm_backward_reduce(g, y, mean, rstd, weight, True, False, False)
    return torch.stack([sums[0], sums[1]])


def backward_pass(name: str, tensors: int, extra: bool, residual: bool) -> Pass:
    def inputs(make: Make) -> Inputs:
        t = {"grad": make.full(), "a": make.full().relu_(), "y": make.full()} | make.norm()
        if extra:
            t["extra"] = make.full()
        return t | {"r": make.full()} | make.norm("_r") if residual else t

    def ours(k: Mapping[str, Any], t: Inputs) -> Results:
        g, *sums = k["bn_act"].bn_act_bwd(
            t["grad"], t.get("extra"), t["a"], t["y"], t["mean"], t.get("r"), t.get("mean_r")
        )
        return [g, *sums] if residual else [g, sums[0]]

    def eager(t: Inputs) -> Results:
        da = t["grad"] + t["extra"] if extra else t["grad"]
        g = aten.threshold_backward(da, t["a"], 0)
        sums = reduced(g, t["y"], t)
        return [g, sums, reduced(g, t["r"], t, "_r")] if residual else [g, sums]

    def truth(t: Inputs) -> Results:
        da = t["grad"] + t["extra"] if extra else t["grad"]
        g = torch.where(t["a"] <= 0, 0.0, da)
        sums = sums_of(g, t["y"], t["mean"])
        return [g, sums, sums_of(g, t["r"], t["mean_r"])] if residual else [g, sums]

    pieces = ["add"] * extra + ["threshold_backward"]
    pieces += ["batch_norm_backward_reduce"] * (2 if residual else 1)
    return Pass(name, tensors, inputs, ours, ", ".join(pieces), eager, truth, torch_on_cpu=False)


def statistics_pass() -> Pass:
    def inputs(make: Make) -> Inputs:
        state = {"running_mean": make.vector(), "running_var": make.vector(0.5, 1.5)}
        return {"y": make.full(), "weight": make.vector(0.5, 1.5), "bias": make.vector()} | state

    def ours(k: Mapping[str, Any], t: Inputs) -> Results:
        running = (t["running_mean"], t["running_var"])
        norm = (t["weight"], t["bias"], *running, True, 0.1, EPS)
        return k["batch_norm"].batch_norm_fwd(t["y"], *norm)[:2]

    return Pass(
        "batch_norm_fwd",
        1,
        inputs,
        ours,
        "batch_norm_update_stats",
        lambda t: aten.batch_norm_update_stats(t["y"], t["running_mean"], t["running_var"], 0.1),
        lambda t: torch.var_mean(t["y"], (0, 2, 3), correction=0)[::-1],
    )


def norm_gradient(t: Inputs, g: Tensor, sums: Tensor) -> Tensor:
    count = g.numel() // g.size(1)
    slope = per_channel(t["rstd"].square() * sums[1]) * (t["y"] - per_channel(t["mean"]))
    return per_channel(t["scale"]) * (g - (per_channel(sums[0]) + slope) / count)


def norm_backward_pass() -> Pass:
    def inputs(make: Make) -> Inputs:
        t = {"g": make.full(), "y": make.full()} | make.norm()
        count = t["y"].numel() // t["y"].size(1)
        t["sums"] = torch.stack([make.vector(), make.vector()]) * count
        t["count"] = torch.tensor([count], dtype=torch.int32, device=make.device)
        return t

    def ours(k: Mapping[str, Any], t: Inputs) -> Results:
        given = (t[name] for name in ("g", "y", "mean", "scale", "rstd", "sums"))
        kinds = (t["mean"].dtype, t["mean"].dtype)
        return k["batch_norm"].batch_norm_bwd(*given, True, *kinds)[:1]

    def eager(t: Inputs) -> Results:
        given = (t[name] for name in ("g", "y", "mean", "rstd", "weight"))
        return [aten.batch_norm_backward_elemt(*given, t["sums"][0], t["sums"][1], t["count"])]

    return Pass(
        "batch_norm_bwd",
        3,
        inputs,
        ours,
        "batch_norm_backward_elemt",
        eager,
        lambda t: [norm_gradient(t, t["g"], t["sums"])],
        torch_on_cpu=False,
    )


def both_backward_pass() -> Pass:
    """The two passes of a backward as one row, for torch's BatchNorm is not to be had in parts."""

    def inputs(make: Make) -> Inputs:
        t = {"grad": make.full(), "a": make.full().relu_(), "y": make.full()} | make.norm()
        t["mean"] = t["y"].to(t["mean"].dtype).mean((0, 2, 3))
        return t

    def ours(k: Mapping[str, Any], t: Inputs) -> Results:
        g, sums, _ = k["bn_act"].bn_act_bwd(t["grad"], None, t["a"], t["y"], t["mean"], None, None)
        vectors = (t["mean"], t["scale"], t["rstd"], sums)
        kinds = (t["mean"].dtype, t["mean"].dtype)
        return k["batch_norm"].batch_norm_bwd(g, t["y"], *vectors, True, *kinds)

    def eager(t: Inputs) -> Results:
        g = aten.threshold_backward(t["grad"], t["a"], 0)
        norm = (t["weight"], None, None, t["mean"], t["rstd"], True, EPS, [True, True, True])
        return aten.native_batch_norm_backward(g, t["y"], *norm)

    def truth(t: Inputs) -> Results:
        g = torch.where(t["a"] <= 0, 0.0, t["grad"])
        sums = sums_of(g, t["y"], t["mean"])
        return [norm_gradient(t, g, sums), sums[1] * t["rstd"], sums[0]]

    return Pass(
        "bn_act_bwd + batch_norm_bwd",
        7,  # grad, a, y, g; g, y, dy
        inputs,
        ours,
        "threshold_backward, native_batch_norm_backward",
        eager,
        truth,
    )


def norm_act_pass() -> Pass:
    """By the fewest bytes: y is read once, as on a GPU where it fits on the chip."""

    def inputs(make: Make) -> Inputs:
        t = {"y": make.full(), "r": make.full(), "weight": make.vector(0.5, 1.5)}
        state = {"running_mean": make.vector(), "running_var": make.vector(0.5, 1.5)}
        return t | {"bias": make.vector()} | state

    def norm(t: Inputs) -> tuple[Tensor, ...]:
        return t["weight"], t["bias"], t["running_mean"], t["running_var"]

    def ours(k: Mapping[str, Any], t: Inputs) -> Results:
        norms = (*norm(t), True, 0.1, EPS)
        return [k["batch_norm"].batch_norm_act_fwd(t["y"], *norms, t["r"], True)[0]]

    def eager(t: Inputs) -> Results:
        weight, bias, mean, var = norm(t)
        a = F.batch_norm(t["y"], mean, var, weight, bias, True, 0.1, EPS)
        a += t["r"]
        return [a.relu_()]

    def truth(t: Inputs) -> Results:
        a = F.batch_norm(t["y"], None, None, t["weight"], t["bias"], True, 0.1, EPS)
        return [(a + t["r"]).relu()]

    return Pass(
        "batch_norm_act_fwd, residual", 3, inputs, ours, "batch_norm, add_, relu_", eager, truth
    )


def pool_inputs(make: Make) -> Inputs:
    """Eighths, which nothing rounds, so that every provider sees the same maxima."""
    y = make.full().mul_(8).round_().clamp_(-24, 24).div_(8)
    mean, var = torch.zeros_like(make.vector()), torch.full_like(make.vector(), 1 - EPS)
    rstd = weight = torch.ones_like(mean)
    bias = (make.vector() * 8).round() / 8
    t = {"y": y, "mean": mean, "var": var, "rstd": rstd, "weight": weight, "scale": weight}
    return t | {"bias": bias}


def pool_activation(t: Inputs) -> Tensor:
    own = (t["y"], t["mean"], t["scale"], t["bias"])
    return plain_bn_act(*own, None, None, None, None, True)


def pool_pass() -> Pass:
    def ours(k: Mapping[str, Any], t: Inputs) -> Results:
        vectors = (t["mean"], t["scale"], t["bias"])
        return [k["bn_relu_maxpool"].bn_relu_maxpool_fwd(t["y"], *vectors, *WINDOW)]

    return Pass(
        "bn_relu_maxpool_fwd",
        1,
        pool_inputs,
        ours,
        "batch_norm(eval), relu_, max_pool2d",
        lambda t: [F.max_pool2d(eval_norm(t).relu_(), *WINDOW)],
        lambda t: [F.max_pool2d(pool_activation(t), *WINDOW)],
        pooled=1,
        sizes=SIZES[:1],
    )


def pool_backward_pass() -> Pass:
    def inputs(make: Make) -> Inputs:
        t = pool_inputs(make)
        t["a"] = pool_activation(t)  # which torch keeps, as it does the indices
        p, t["indices"] = aten.max_pool2d_with_indices(t["a"], *([n, n] for n in WINDOW))
        t["grad"] = make.full(p.shape)
        return t

    def ours(k: Mapping[str, Any], t: Inputs) -> Results:
        given = (t[name] for name in ("grad", "y", "mean", "scale", "bias"))
        return k["bn_relu_maxpool"].bn_relu_maxpool_bwd(*given, *WINDOW)

    def eager(t: Inputs) -> Results:
        window = [[n, n] for n in WINDOW]
        da = aten.max_pool2d_with_indices_backward(
            t["grad"], t["a"], *window, [1, 1], False, t["indices"]
        )
        g = aten.threshold_backward(da, t["a"], 0)
        return [g, reduced(g, t["y"], t)]

    def truth(t: Inputs) -> Results:
        leaf = t["a"].detach().requires_grad_()
        with torch.enable_grad():
            p = F.max_pool2d(leaf, *WINDOW)
        (da,) = torch.autograd.grad(p, leaf, t["grad"])
        g = torch.where(t["a"] <= 0, 0.0, da)
        return [g, sums_of(g, t["y"], t["mean"])]

    return Pass(
        "bn_relu_maxpool_bwd",
        2,
        inputs,
        ours,
        "max_pool2d_with_indices_backward, threshold_backward, batch_norm_backward_reduce",
        eager,
        truth,
        pooled=1,
        torch_on_cpu=False,
        sizes=SIZES[:1],
    )


def add_relu_passes() -> list[Pass]:
    def inputs(make: Make) -> Inputs:
        return {"x": make.full(), "r": make.full()}

    return [
        Pass(
            "add_relu_fwd",
            3,
            inputs,
            lambda k, t: [k["add_relu"].add_relu_fwd(t["x"], t["r"])],
            "add, relu_",
            lambda t: [(t["x"] + t["r"]).relu_()],
            lambda t: [(t["x"] + t["r"]).relu()],
        ),
        Pass(
            "add_relu_bwd",
            3,
            inputs,
            lambda k, t: [k["add_relu"].add_relu_bwd(t["x"], t["r"])],
            "threshold_backward",
            lambda t: [aten.threshold_backward(t["x"], t["r"], 0)],
            lambda t: [torch.where(t["r"] <= 0, 0.0, t["x"])],
        ),
    ]


PASSES = [
    forward_pass("bn_act_fwd", 2, ""),
    forward_pass("bn_act_fwd, residual", 3, "tensor"),
    forward_pass("bn_act_fwd, normalized residual", 3, "normalized"),
    backward_pass("bn_act_bwd", 4, False, False),
    backward_pass("bn_act_bwd, second gradient", 5, True, False),
    backward_pass("bn_act_bwd, normalized residual", 5, False, True),
    statistics_pass(),
    norm_backward_pass(),
    both_backward_pass(),
    norm_act_pass(),
    pool_pass(),
    pool_backward_pass(),
    *add_relu_passes(),
]


# --- as cases of a suite --------------------------------------------------------------------------


def light_cases(
    device: torch.device, dtype: torch.dtype, batches: Sequence[int], quick: bool = False
) -> list[OpCase]:
    """Every pass at every size of a ResNet-50; `quick`: at two sizes of each at most."""
    cases = []
    for row in PASSES:
        sizes = [s for s in row.sizes if not quick or s in (SIZES[0], SIZES[4])]
        shapes = [(batch, c, s, s) for batch in batches for c, s in sizes]
        cases += [_case(row, shape, dtype, device) for shape in shapes]
    if dtype != torch.float32 and device.type == "cuda":
        cases.append(_pack_case(dtype, device))
    return cases


def _case(row: Pass, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> OpCase:
    candidates = [
        Candidate(f"fusedres-{name}", partial(row.ours, _kernels_of(name)), name)
        for name in own_backends("bn_act", device, dtype)
    ]
    if device.type == "cuda" or row.torch_on_cpu:
        candidates.append(Candidate("eager", row.torch, note=row.torch_name))
    return OpCase(
        {"section": "light", "case": row.name, "shape": list(shape), "batch": shape[0]},
        dtype,
        float(row.bytes(shape, dtype.itemsize)),
        0.0,
        lambda seed: row.inputs(Make(shape, dtype, str(device), seed)),
        tuple(candidates),
        lambda t: row.truth(wide(t)),
    )


def _pack_case(dtype: torch.dtype, device: torch.device) -> OpCase:
    """The cast of all weights of a ResNet-50, which has no activation's size."""
    weights = [w.detach() for w in FusedResNet50().parameters() if w.dim() == 4]
    weights = [w.to(device).contiguous(memory_format=torch.channels_last) for w in weights]
    numel = sum(w.numel() for w in weights)

    def eager(t: Inputs) -> Results:
        casts = [torch.empty_like(w, dtype=dtype) for w in t["weights"]]
        torch._foreach_copy_(casts, t["weights"])
        return casts

    candidates = [Candidate("eager", eager, note="empty_like, _foreach_copy_")]
    if "cuda" in own_backends("bn_act", device, dtype):
        ours = Candidate("fusedres-cuda", lambda t: _pack.pack(t["weights"], dtype), "cuda")
        candidates.insert(0, ours)
    return OpCase(
        {"section": "light", "case": "pack, 53 weights", "shape": [numel], "batch": None},
        dtype,
        float(numel * (4 + dtype.itemsize)),
        0.0,
        lambda seed: {"weights": [w.clone(memory_format=torch.preserve_format) for w in weights]},
        tuple(candidates),
        lambda t: [w.double() for w in t["weights"]],
    )


def _kernels_of(backend: str) -> dict[str, Any]:
    ops = ("bn_act", "batch_norm", "bn_relu_maxpool", "add_relu")
    return {op: backends.kernels(backend, op) for op in ops}
