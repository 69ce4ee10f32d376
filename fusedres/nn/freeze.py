"""freeze: a model for inference, its BatchNorms folded into its convolutions, each of which runs as
one kernel with its residual add and ReLU.

The frozen model is a copy. Its modules are plain torch.nn, with a bias in each convolution and an
nn.Identity where a BatchNorm was, so that it can be trained further, exported, or compiled as any
other; what fusedres runs instead is read off them when an image comes (frozen.py).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fusedres._checks import DTYPES
from fusedres.nn.frames import FromPixels, Normalization
from fusedres.nn.frozen import FrozenModule, convert, thaw
from fusedres.nn.fuse import unfuse
from fusedres.nn.program import Call, Program, at
from fusedres.nn.tracing import trace


def freeze(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    cuda_graph: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A copy of the model for inference, with one kernel for each convolution and the BatchNorm,
    residual add and ReLU behind it.

    BatchNorms are folded in fp64 and rounded once. What is frozen is found as `fuse` finds it; what
    cannot be followed is called as it is. The copy is in evaluation mode, wants no gradients, and
    has a state_dict of its own (folded weights; no BatchNorms), which another frozen model of the
    same architecture loads. Weights may change in place (not through `.data`, which nothing tells),
    by load_state_dict, `.to(dtype)` or `.to(device)`: they are packed anew at the next call. Calls
    from several threads are safe.

    Where a gradient is wanted, under torch.compile, torch.export or torch.func, in training mode,
    with a hook on a module inside, or for NaN in the input on a CPU, its modules run one by one.

    Args:
        model: any module that `fuse` takes: FusedResNet50, ResNets of torchvision, timm and Hugging
            Face, blocks of one's own; fused or not. It stays as it is.
        dtype: of the copy: fp32, fp16, bf16 or fp64. None: as it is.
        cuda_graph: record a CUDA graph for each of the last 8 shapes of input, on a GPU; a replay
            costs one launch. Weights that change are recorded anew.
        mean, std: of each channel of the images that the model was trained on, of values from 0 to
            1, as torchvision's Normalize takes them. Given, uint8 images [N, H, W, C] are taken as
            well as what the model takes. A model that takes pixels, by a FromPixels, takes
            uint8 images without.

    Returns:
        The copy: an instance of the model's class.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named; a model on the meta
            device.
        RuntimeError: cuda_graph without a CUDA device.

    Calling it raises TypeError or ValueError for images of another dtype, number of channels or
    dimensions, or too small, named.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be an nn.Module, got {type(model).__name__}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"freeze: dtype must be float32, float16, bfloat16, float64 or None, got {dtype!r}"
        )
    if not isinstance(cuda_graph, bool):
        raise TypeError(f"freeze: cuda_graph must be a bool, got {cuda_graph!r}")
    if cuda_graph and not torch.cuda.is_available():
        raise RuntimeError("freeze: cuda_graph=True needs a CUDA device, torch finds none")
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError("freeze: model is on the meta device, which has no weights to fold")
    normalization = Normalization.of(mean, std)
    with torch.inference_mode(False), torch.no_grad():
        model = copy.deepcopy(unfuse(model)).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, FrozenModule):
                thaw(module)
        _untie(model)
        for path, found in list(_Visit().roots(model)):
            root = at(model, path) if path else model
            frames = normalization if root is model else None
            pixels = _from_pixels(root, found.program)
            if pixels is not None:
                if frames is not None:
                    raise ValueError(
                        f"freeze: mean and std: {type(model).__name__} takes pixels already, by "
                        "its from_pixels; leave them out"
                    )
                frames = pixels.normalization()
            elif frames is not None:
                _check_channels(root, found.program, frames)
            _fold(root, found.program, dtype)
            convert(root, found.inside, cuda_graph, frames)
        if dtype is not None:
            model.to(dtype)
    if normalization is not None and not isinstance(model, FrozenModule):
        raise ValueError(
            f"freeze: mean and std are for a model of one image tensor, {type(model).__name__} "
            "cannot be followed from its input on"
        )
    return model


def _untie(model: nn.Module) -> None:
    """A module of two places becomes two, for it may get another BatchNorm in each."""
    seen: set[int] = set()
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in seen and path:
            owner, _, name = path.rpartition(".")
            module = copy.deepcopy(module)
            (at(model, owner) if owner else model)._modules[name] = module
        seen.add(id(module))


def _from_pixels(root: nn.Module, program: Program) -> FromPixels | None:
    """The step that takes pixels, where the input goes into one."""
    for step in program.steps:
        if isinstance(step, Call) and step.kind == "module" and 0 in step.reads():
            module = at(root, step.target)
            if isinstance(module, FromPixels):
                return module
    return None


def _check_channels(root: nn.Module, program: Program, normalization: Normalization) -> None:
    for step in program.pairs():
        wanted, given = at(root, step.conv).in_channels, len(normalization.mean)
        if step.input == 0 and wanted != given:
            raise ValueError(
                f"freeze: mean and std must be of the model's {wanted} channels, got {given}"
            )


def _fold(root: nn.Module, program: Program, dtype: torch.dtype | None) -> None:
    for step in program.pairs():
        if not step.bn:
            continue
        conv, bn = at(root, step.conv), at(root, step.bn)
        weight, bias = folded(conv, bn)
        given = {"dtype": dtype or conv.weight.dtype, "device": conv.weight.device}
        order = (
            torch.channels_last
            if conv.weight.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format
        )
        conv.weight = nn.Parameter(weight.to(**given, memory_format=order), requires_grad=False)
        conv.bias = nn.Parameter(bias.to(**given), requires_grad=False)
        bn.__class__ = nn.Identity  # the object stays: a list or a closure may hold it
        vars(bn).clear()
        vars(bn).update(vars(nn.Identity().eval()))


def folded(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight [K, C / groups, R, S] and bias [K] in fp64 on the CPU, of both together."""
    vectors = (conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    own, gamma, beta, mean, var = (None if v is None else _wide(v) for v in vectors)
    assert mean is not None and var is not None
    scale = (var + bn.eps).rsqrt()
    scale = scale if gamma is None else scale * gamma
    bias = (-mean if own is None else own - mean) * scale
    return _wide(conv.weight) * scale.view(-1, 1, 1, 1), bias if beta is None else bias + beta


def _wide(t: Tensor) -> Tensor:
    return t.detach().cpu().to(torch.float64)


@contextlib.contextmanager
def _autocast_turned() -> Iterator[None]:
    """Autocast off where it is on, and on where it is off."""
    kinds = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(kind) for kind in kinds]
    try:
        for kind, on in zip(kinds, before, strict=True):
            torch.set_autocast_enabled(kind, not on)
        yield
    finally:
        for kind, on in zip(kinds, before, strict=True):
            torch.set_autocast_enabled(kind, on)


class Found:
    """A module that can be followed: its Program, and the paths of what was looked into."""

    def __init__(self, program: Program, inside: list[str]) -> None:
        self.program, self.inside = program, inside


class _Visit:
    """A walk over a model, children first, for the largest parts that can be followed."""

    def roots(self, module: nn.Module, path: str = "") -> Iterator[tuple[str, Found]]:
        """(path, what was found) of parts with a convolution, none within another."""
        found = self._found(module)
        if found is not None and any(found.program.pairs()):
            yield path, found
            return
        for name, child in module.named_children():
            yield from self.roots(child, f"{path}.{name}".lstrip("."))

    def __init__(self) -> None:
        self._known: dict[int, Found | None] = {}

    def _found(self, module: nn.Module) -> Found | None:
        if id(module) not in self._known:
            self._known[id(module)] = self._followed(module)
        return self._known[id(module)]

    def _followed(self, module: nn.Module) -> Found | None:
        inside = list(self._inside(module))
        cls = type(module)
        own = cls.__module__.partition(".")[0] == "torch" and cls is not nn.Sequential
        if own or "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
            return None
        try:
            convert(module)
        except TypeError:  # a class whose objects cannot change theirs
            return None
        parts = [(p, at(module, p)) for p in inside]
        found = trace(module, parts, {}, folds=True)
        if isinstance(found.program, Program):  # an autocast within is seen from one of two outside
            with _autocast_turned():
                found = trace(module, parts, {}, folds=True)
        thaw(module)
        return None if isinstance(found.program, str) else Found(found.program, inside)

    def _inside(self, module: nn.Module) -> Iterator[str]:
        """Paths of what can be followed below a module, where a caller may call it directly."""
        for name, child in module.named_children():
            found = self._found(child)
            if found is not None:
                yield name
                yield from (f"{name}.{path}" for path in found.inside)
            elif type(child) in (nn.ModuleList, nn.ModuleDict):
                yield from (f"{name}.{path}" for path in self._inside(child))
