"""What a frozen module runs: its Program, bound to the weights and to one shape of input at a time.

The first call with a shape goes through the steps one by one and binds each to what it found there:
kernel, packed weights, pads. Later ones run what was bound. Anything that could make it wrong (a
weight changed, a hook, another backend) is looked at in every call, by some hundred comparisons.
"""

from __future__ import annotations

import threading
from abc import ABCMeta
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fusedres import backends
from fusedres._conv import output_shape
from fusedres._tensors import stat_dtype, stored_format
from fusedres.library.conv_act import finite
from fusedres.nn.graphs import Graphs
from fusedres.nn.layers import geometry
from fusedres.nn.program import Add, Call, ConvBN, Program, at
from fusedres.nn.tracing import trace
from fusedres.ops._contract import autocast_on, compute_dtype, exporting
from fusedres.ops.conv_act import bind

KEPT = 8  # shapes of input
Values = list[Any]
Bound = Callable[[Values], None]


class Normalization(NamedTuple):
    """From uint8 images to what a model was trained on: u/255 less mean, over std, a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, mean: object, std: object) -> Self | None:
        """Checked; None where neither is given."""
        if mean is None and std is None:
            return None
        values: dict[str, Any] = {"mean": mean, "std": std}
        for name, given in values.items():
            if not isinstance(given, Sequence) or not all(
                isinstance(v, int | float) and not isinstance(v, bool) for v in given
            ):
                raise TypeError(
                    f"freeze: {name} must be a number for each channel, got {given!r}"
                    + ("; mean and std come together" if given is None else "")
                )
        means, stds = (tuple(map(float, given)) for given in values.values())
        if len(means) != len(stds) or not means:
            raise ValueError(
                f"freeze: mean and std must be of as many channels, got {len(means)} and "
                f"{len(stds)}"
            )
        if not all(0 < s < float("inf") for s in stds) or not all(abs(m) < 1e6 for m in means):
            raise ValueError(
                f"freeze: mean must be finite, std above 0, got {list(means)} and {list(stds)}"
            )
        return cls(means, stds)

    def vectors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[C] each, for images to be of that dtype: what u is multiplied by, and what is added."""
        options = {"dtype": stat_dtype(dtype), "device": device}
        scale = torch.tensor([1 / (255 * s) for s in self.std], **options)  # type: ignore[arg-type]
        shift = [-m / s for m, s in zip(self.mean, self.std, strict=True)]
        return scale, torch.tensor(shift, **options)  # type: ignore[arg-type]


def normalized(images: Tensor, vectors: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """uint8 [N, H, W, C] -> [N, C, H, W] in channels_last, rounded once."""
    scale, shift = vectors
    return torch.addcmul(shift, images.to(scale.dtype), scale).to(dtype).permute(0, 3, 1, 2)


class FrozenModule(nn.Module):
    """What a module's class is joined with by `freeze`."""

    _frozen: Engine
    _functions: dict[str, Callable[..., Any]]  # that its Program calls by name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's own; of one tensor alone by bound kernels."""
        engine = self._frozen
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return super().forward(*args, **kwargs)
        x = args[0]
        if torch.compiler.is_compiling() or exporting():
            return super().forward(engine.plain_input(self, x))
        return engine(self, x)

    def forward_plainly(self, x: Tensor) -> Any:
        """The class's own forward, of one tensor."""
        return super().forward(x)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._frozen.forget()
        return super()._apply(fn, recurse)

    def __init_subclass__(cls, **_: Any) -> None:
        """Not that of the class, which may keep a list of the classes that users write."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        build, args, *rest = reduced
        cls = own_class(self)  # ours cannot be found by its name
        made_by = tuple(cls if a is type(self) else a for a in (build, *args))
        return (_rebuilt, made_by, *rest)

    def __getstate__(self) -> Any:
        return {**super().__getstate__(), "_functions": {}}


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was frozen."""
    classes = type(module).__mro__
    return classes[classes.index(FrozenModule) + 1]


def _rebuilt(build: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """What copy and pickle begin with: a blank module."""
    module = build(*args)
    cls: Any = type(module)
    module.__class__ = frozen_class(cls)
    return module


@cache
def frozen_class(cls: Any) -> Any:
    """The class of frozen modules of that class."""

    @wraps(cls.forward)  # its signature is read by trainers
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FrozenModule.forward(self, *args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": f"Frozen{cls.__qualname__}"}
    made: Any = ABCMeta(f"Frozen{cls.__name__}", (FrozenModule, cls), names | {"forward": forward})
    return made


def convert(
    module: nn.Module,
    inside: Sequence[str] = (),
    cuda_graph: bool = False,
    normalization: Normalization | None = None,
) -> None:
    """Make it a frozen one; its BatchNorms are folded already.

    Raises:
        TypeError: it is of a class whose objects cannot change theirs.
    """
    cls: Any = type(module)
    module.__class__ = frozen_class(cls)
    module.__dict__["_frozen"] = Engine(tuple(inside), cuda_graph, normalization)
    module.__dict__["_functions"] = {}


def _has(module: nn.Module, path: str) -> bool:
    try:
        return isinstance(at(module, path), nn.Module)
    except AttributeError:
        return False


def thaw(module: nn.Module) -> None:
    """Make it one of its own class again; its BatchNorms stay folded."""
    for name in ("_frozen", "_functions"):
        module.__dict__.pop(name)
    module.__class__ = own_class(module)


class Engine:
    """Binds and runs; one for each frozen module, which it is called with."""

    def __init__(
        self, inside: tuple[str, ...], cuda_graph: bool, normalization: Normalization | None
    ) -> None:
        self._inside, self._cuda_graph, self._normalization = inside, cuda_graph, normalization
        self._lock = threading.RLock()
        self._graphs = Graphs(KEPT)
        self.forget()

    def forget(self) -> None:
        """All that was bound."""
        with self._lock:
            self._program: Program | str = ""
            self._watch: Watch | None = None
            self._bound: OrderedDict[Any, Runner] = OrderedDict()
            self._packs: OrderedDict[Any, dict[Any, Any]] = OrderedDict()
            self._graphs.forget()

    def __reduce__(self) -> Any:
        return Engine, (self._inside, self._cuda_graph, self._normalization)

    def __deepcopy__(self, memo: Any) -> Engine:
        return Engine(self._inside, self._cuda_graph, self._normalization)

    # --- a call

    def __call__(self, owner: FrozenModule, x: Tensor) -> Any:
        watch = self._watch
        if not owner.training and (watch is None or watch.changed()):
            watch = self._look(owner)
        if owner.training or watch is None or watch.touched() or self._differentiates(watch, x):
            return owner.forward_plainly(self.plain_input(owner, x))
        dtype = self._checked(owner, watch, x)
        with torch.no_grad():
            key = (
                x.shape, x.dtype, dtype, x.device, backends.requested_backend(),
                backends.requested_plan(),
            )  # fmt: skip
            runner = self._bound.get(key)
            if runner is None:
                runner = self._bind(owner, watch, key, x, dtype)
            if not runner.keeps_nan and (runner.makes_nan or not _clean(x)):
                return owner.forward_plainly(self.plain_input(owner, x))
            if self._cuda_graph and x.is_cuda and not torch.cuda.is_current_stream_capturing():
                return self._graphs.run(key, runner, x)
            return runner(x)

    def _differentiates(self, watch: Watch, x: Tensor) -> bool:
        """Whether a gradient is wanted, or a tensor is of a kind that kernels do not know."""
        if type(x) not in (Tensor, nn.Parameter) or backends.transforming():
            return True
        return torch.is_grad_enabled() and (x.requires_grad or watch.requires_grad())

    def plain_input(self, owner: nn.Module, x: Tensor) -> Tensor:
        """What the module's own forward takes: images of uint8 normalised."""
        if self._normalization is None or x.dtype != torch.uint8:
            return x
        dtype = next((p.dtype for p in owner.parameters() if p.is_floating_point()), torch.float32)
        self._check_frames(owner, x, self._normalization)
        return normalized(x, self._normalization.vectors(x.device, dtype), dtype)

    # --- what it looks at

    def _look(self, owner: FrozenModule) -> Watch | None:
        """What to watch; None where its forward, changed since, cannot be followed any more."""
        with self._lock:
            if self._watch is not None and not self._watch.changed():
                return self._watch  # by another thread, meanwhile
            if isinstance(self._program, str) and self._program:
                return None
            self.forget()
            inside = [(p, at(owner, p)) for p in self._inside if _has(owner, p)]
            program = trace(owner, inside, owner._functions, folds=True).program
            if isinstance(program, Program) and not any(program.pairs()):
                program = "no convolution is left in it"
            self._program = program
            if isinstance(program, Program):
                self._watch = Watch.of(owner, program)
            return self._watch

    def program(self, owner: FrozenModule) -> Program | str:
        """What runs, or why nothing can."""
        self._look(owner)
        return self._program

    def _checked(self, owner: nn.Module, watch: Watch, x: Tensor) -> torch.dtype:
        """The dtype to compute in.

        Raises:
            TypeError, ValueError: what no convolution of it would take, in one line.
        """
        name, weight = own_class(owner).__name__, watch.first
        if x.dtype == torch.uint8 and self._normalization is not None:
            self._check_frames(owner, x, self._normalization)
            return weight.dtype
        dtype = compute_dtype(x) if x.is_floating_point() else x.dtype
        if dtype != weight.dtype and not (x.is_floating_point() and autocast_on(x)):
            more = " or uint8 [N, H, W, C]" if self._normalization is not None else ""
            raise TypeError(
                f"{name}: the input must be {weight.dtype} as the weights{more}, got {x.dtype}"
            )
        if x.dim() != 4:
            raise ValueError(f"{name}: the input must be [N, C, H, W], got {list(x.shape)}")
        if watch.channels is not None and x.size(1) != watch.channels:
            raise ValueError(
                f"{name}: the input must have {watch.channels} channels, got {list(x.shape)}"
            )
        if x.device != weight.device:
            raise ValueError(f"{name}: the input is on {x.device}, the weights on {weight.device}")
        return dtype

    def _check_frames(self, owner: nn.Module, x: Tensor, normalization: Normalization) -> None:
        name, channels = own_class(owner).__name__, len(normalization.mean)
        if x.dim() != 4 or x.size(3) != channels:
            raise ValueError(
                f"{name}: uint8 images must be [N, H, W, {channels}], got {list(x.shape)}"
            )

    # --- binding

    def _bind(
        self, owner: FrozenModule, watch: Watch, key: Any, x: Tensor, dtype: torch.dtype
    ) -> Runner:
        with self._lock:
            runner = self._bound.get(key)
            if runner is not None:
                return runner
            assert isinstance(self._program, Program)
            size = key[1:] + (x.shape[1:], min(2, x.size(0)))
            packs = self._packs.setdefault(size, {})
            normalization = self._normalization if x.dtype == torch.uint8 else None
            runner = Runner(owner, self._program, packs, x, dtype, normalization)
            self._bound[key] = runner
            for kept in (self._bound, self._packs):
                while len(kept) > KEPT:
                    kept.popitem(last=False)
            return runner


class Watch:
    """What a Program was bound to, and whether it is still so."""

    def __init__(
        self,
        places: list[tuple[dict[str, Any], str, nn.Module]],
        weights: list[tuple[dict[str, Any], str, Tensor, int]],
        channels: int | None,
    ) -> None:
        modules = [m for _, _, m in places]
        self._places = places  # children of a module, name, which is there
        self._weights = weights  # parameters of a module, name, which is there, its version
        self._own = [m.__dict__ for m in modules]
        self._hooks = [
            hooks
            for m in modules
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        ]
        self.first: Tensor = weights[0][2]
        self.channels = channels  # of the input

    @classmethod
    def of(cls, owner: nn.Module, program: Program) -> Watch:
        """As it is now."""
        paths, weights, channels = list(program.watched), [], None
        for step in program.pairs():
            paths += [path for path in (step.conv, step.bn, step.pool) if path]
            conv = at(owner, step.conv)
            for name in ("weight", "bias"):
                t = conv._parameters[name]
                if t is not None:
                    weights.append(
                        (conv._parameters, name, t, 0 if t.is_inference() else t._version)
                    )
            if step.input == 0 and channels is None:
                channels = conv.in_channels
        places: list[Any] = []
        for path in paths:
            parent, _, name = path.rpartition(".")
            held = (at(owner, parent) if parent else owner)._modules
            places.append((held, name, held[name]))
        return cls(places, weights, channels)

    def changed(self) -> bool:
        """Whether a weight or a module is another, or a weight was written to."""
        for held, name, t, version in self._weights:
            if held[name] is not t or (not t.is_inference() and t._version != version):
                return True
        return any(held.get(name) is not module for held, name, module in self._places)

    def touched(self) -> bool:
        """Whether a hook, or a forward of its own, sits on a module that no step calls."""
        everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        return bool(everywhere or any(self._hooks) or any("forward" in own for own in self._own))

    def requires_grad(self) -> bool:
        """Whether a weight does."""
        return any(t.requires_grad for _, _, t, _ in self._weights)


class Runner:
    """A Program bound to weights and to one shape of input; made by its first run.

    Attributes:
        keeps_nan: whether NaN in the input comes out as it does of plain modules.
        makes_nan: whether a weight is infinite or NaN.
        ways: (path of a convolution, backend, plan).
    """

    def __init__(
        self,
        owner: FrozenModule,
        program: Program,
        packs: dict[Any, Any],
        x: Tensor,
        dtype: torch.dtype,
        normalization: Normalization | None,
    ) -> None:
        self.keeps_nan, self.makes_nan = True, False
        self.ways = list[tuple[str, str, str]]()
        self._owner, self._packs = owner, packs
        self._output, self._length = program.output, len(program.steps) + 1
        self._dtype = dtype
        self._vectors = None if normalization is None else normalization.vectors(x.device, dtype)
        self._own = {0} if normalization is not None else set[int]()  # values that are ours alone
        self._of_frames = False  # value 0 is the uint8 image
        private = _private(program)
        values = self._start(x)
        self._steps: list[Bound] = []
        for step in program.steps:
            if isinstance(step, ConvBN):
                run = self._convolution(step, values, step.residual in private and _ends(step))
                if self._of_frames and step.input == 0:
                    values[0] = x.contiguous()
            else:
                run = self._other(step)
            run(values)
            self._steps.append(run)
        del self._owner

    def __call__(self, x: Tensor) -> Any:
        values = self._start(x)
        for run in self._steps:
            run(values)
        return self._finished(values, x)

    def _start(self, x: Tensor) -> Values:
        values: Values = [None] * self._length
        if self._of_frames:
            values[0] = x.contiguous()
        elif self._vectors is not None:
            values[0] = normalized(x, self._vectors, self._dtype)
        else:
            values[0] = x if x.dtype == self._dtype else x.to(self._dtype)
        return values

    def _finished(self, values: Values, x: Tensor) -> Any:
        out = values[self._output]
        map_to_map = isinstance(out, Tensor) and out.dim() == 4 and self._vectors is None
        return out.contiguous(memory_format=stored_format(x)) if map_to_map else out

    def _other(self, step: Add | Call) -> Bound:
        owner, out, frees = self._owner, step.out, step.frees

        def other(values: Values) -> None:
            values[out] = step.run(owner, values, False)  # type: ignore[arg-type]
            for i in frees:
                values[i] = None

        return other

    def _convolution(self, step: ConvBN, values: Values, into: bool) -> Bound:
        owner, x = self._owner, values[step.input]
        residual = None if step.residual is None else values[step.residual]
        conv = at(owner, step.conv)
        if not _is_image(x, self._dtype, conv.weight) or not _joins(residual, x, conv):
            return _plainly(owner, step)
        _check_size(owner, step, x)
        x = x.contiguous(memory_format=torch.channels_last)
        relu = step.relu and step.pool is None
        alone = step.input == 0 and 0 in step.frees and step.residual != 0
        one = bind(
            x, conv.weight, geometry(conv), conv.bias, joined=residual is not None, relu=relu,
            into=into, packs=self._packs, frames=self._vectors if alone else None,
        )  # fmt: skip
        self._of_frames |= one.of_frames
        self.keeps_nan &= one.keeps_nan
        self.makes_nan |= one.makes_nan
        self.ways.append((step.conv, one.backend, one.plan))
        pool = _pool(owner, step, x, conv)
        run, at_x, at_r, out, frees = one.run, step.input, step.residual, step.out, step.frees
        stored = {step.input in self._own, step.residual is None or step.residual in self._own}
        dense = stored == {True}
        self._own.add(out)

        def convolution(values: Values) -> None:
            x = values[at_x]
            r = None if at_r is None else values[at_r]
            if not dense:
                x = x.contiguous(memory_format=torch.channels_last)
                r = None if r is None else r.contiguous(memory_format=torch.channels_last)
            y = run(x, r)
            values[out] = y if pool is None else pool(y)
            for i in frees:
                values[i] = None

        return convolution


def _clean(x: Tensor) -> bool:
    return x.dtype == torch.uint8 or finite(x)


def _private(program: Program) -> set[int]:
    """Values that only convolutions and adds read: no call can have kept them, or be a view."""
    made = {step.out for step in program.steps if isinstance(step, ConvBN | Add)}
    shown = {program.output}
    for step in program.steps:
        if isinstance(step, Call):
            shown.update(step.reads())
    return made - shown


def _ends(step: ConvBN) -> bool:
    return step.residual in step.frees and step.residual != step.input


def _is_image(x: object, dtype: torch.dtype, weight: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.dim() == 4
        and x.dtype == dtype
        and x.device == weight.device
        and x.layout is torch.strided
    )


def _joins(residual: object, x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether there is none, or one that is added without broadcasting or promotion."""
    if residual is None:
        return True
    shape = output_shape(x.shape, conv.weight.shape, geometry(conv))
    alike = _is_image(residual, x.dtype, conv.weight)
    return alike and tuple(residual.shape) == shape  # type: ignore[attr-defined]


def _check_size(owner: nn.Module, step: ConvBN, x: Tensor) -> None:
    conv = at(owner, step.conv)
    out = output_shape(x.shape, conv.weight.shape, geometry(conv))
    if step.pool is not None and min(out[2:]) > 0:
        pool = at(owner, step.pool)
        shrunk = 2 * pool.padding - pool.kernel_size
        out = (*out[:2], *((s + shrunk) // pool.stride + 1 for s in out[2:]))
    if min(out[2:]) < 1:
        raise ValueError(
            f"{own_class(owner).__name__}: the input is too small: nothing is left of it behind "
            f"{step.pool or step.conv}, where it is {list(x.shape)}"
        )


def _pool(
    owner: nn.Module, step: ConvBN, x: Tensor, conv: nn.Conv2d
) -> Callable[[Tensor], Tensor] | None:
    """The ReLU and the max pool behind a convolution."""
    if step.pool is None:
        return None
    pool = at(owner, step.pool)
    window = pool.kernel_size, pool.stride, pool.padding
    backend = backends.backend_for("bn_relu_maxpool", x)
    if backend == "reference":
        return lambda y: F.max_pool2d(y.relu_(), *window)
    kernel = backends.kernels(backend, "bn_relu_maxpool").bn_relu_maxpool_fwd
    zeros = torch.zeros(conv.out_channels, dtype=stat_dtype(x.dtype), device=x.device)
    ones = torch.ones_like(zeros)

    def pooled(y: Tensor) -> Tensor:
        p: Tensor = kernel(y, zeros, ones, zeros, *window)
        return p

    return pooled


def _plainly(owner: nn.Module, step: ConvBN) -> Bound:
    """The modules of a step one by one, where what comes is nothing that kernels take."""
    modules = [at(owner, path) for path in (step.conv, step.bn) if path]
    pool = None if step.pool is None else at(owner, step.pool)

    def plainly(values: Values) -> None:
        y = values[step.input]
        for module in modules:
            y = module(y)
        y = y if step.residual is None else y + values[step.residual]
        y = F.relu(y) if step.relu else y
        values[step.out] = y if pool is None else pool(y)
        for i in step.frees:
            values[i] = None

    return plainly
