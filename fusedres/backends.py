"""Which implementation runs: the registry of backends, the scopes that choose one, and the reasons.

A backend is asked for by `use_backend`, by the environment variable FUSEDRES_BACKEND, or left to
"auto", which takes the fastest one that serves the tensors at hand and falls back to "reference". A
backend asked for by name that cannot serve raises and says why.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import threading
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fusedres import _plan_table
from fusedres._conv import Conv
from fusedres._plans import DATAFLOWS, base_of, is_plan, product_of
from fusedres._tensors import INTERPRETED, conv_allows_tf32

# ops that may be fused, maybe by another backend
TWO_PLANS = ("conv_bn", "conv_bn_relu_maxpool", "conv_act")
OPS = (*TWO_PLANS, "batch_norm", "bn_act", "bn_relu_maxpool", "add_relu")
PLANS = ("auto", "fused", "epilogue", "split", *DATAFLOWS)  # and what _plans adds to a plan


@dataclass(frozen=True)
class Backend:
    """What one backend serves, as data."""

    name: str
    room: str  # the module that holds its kernels
    devices: tuple[str, ...]  # device types; () means any
    dtypes: tuple[torch.dtype, ...]
    ops: tuple[str, ...]
    plans: tuple[str, ...]  # of conv_bn, as _plans.base_of names them
    fuses: tuple[str, ...] = ()  # which of TWO_PLANS have the plan "fused"


_ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTERPRETED_DTYPES = (torch.float32, torch.float16, torch.float64)  # its bf16 is silently wrong
BACKENDS = {
    b.name: b
    for b in (
        Backend("reference", "fusedres.reference", (), _ALL_DTYPES, OPS, ("split",)),
        Backend(
            "cpp",
            "fusedres.native",
            ("cpu",),
            (torch.float32, torch.bfloat16, torch.float64),
            OPS,
            ("fused", "split"),
            ("conv_bn",),
        ),
        Backend(
            "triton",
            "fusedres.triton_kernels",
            ("cpu",) if INTERPRETED else ("cuda",),
            _INTERPRETED_DTYPES if INTERPRETED else _ALL_DTYPES,
            OPS,
            ("fused", "epilogue", "split"),
            TWO_PLANS,
        ),
        Backend(
            "cuda",
            "fusedres.native",
            ("cuda",),
            _ALL_DTYPES,
            OPS,
            ("fused", "split"),  # of these "fused" with one of _plans.PRODUCTS
            ("conv_bn",),
        ),
    )
}
# fastest first; then "reference". The interpreter is asked for by name only
_AUTO_ORDER = ("cuda", "cpp") if INTERPRETED else ("cuda", "triton", "cpp")
NAMES = (*BACKENDS, "auto")
_TRITON = (3, 6)  # the oldest that compiles the kernels
_CAPABILITY = (8, 0)  # below, bf16 has no tensor cores
_HALF_TYPES = (torch.float16, torch.bfloat16)
_WGMMA_CAPABILITY = (9, 0)  # neither older nor newer GPUs have these instructions
_wgmma_checked: dict[int, str | None] = {}  # by device, what the self-check found
_wgmma_lock = threading.Lock()


@dataclass(frozen=True)
class Choice:
    """The outcome of a look-up: a backend, the plan asked for, and why nothing faster runs ("" if
    nothing is). `light` runs light passes, unless the table has measured another one as faster; ""
    where a backend was asked for by name, which then runs everything.
    """

    backend: str
    plan: str
    reason: str
    light: str = ""


_backend_scope: ContextVar[str] = ContextVar("fusedres_backend", default="")
_plan_scope: ContextVar[str] = ContextVar("fusedres_plan", default="auto")
# What the scopes hold, once more, where torch.compile sees it: Dynamo can neither trace nor guard a
# ContextVar, but recompiles when a value of this dict changes.
_traced = {"backend": "", "plan": "auto"}


def _checked(name: str, accepted: tuple[str, ...], what: str) -> str:
    if name not in accepted:
        raise ValueError(f"{what}: got {name!r}, accepted: {', '.join(map(repr, accepted))}")
    return name


class _Scope(contextlib.ContextDecorator):
    """Sets a variable within a `with` block or a decorated function; may be entered again."""

    def __init__(self, variable: ContextVar[str], key: str, value: str) -> None:
        self._variable, self._key, self._value = variable, key, value
        self._tokens: list[Token[str]] = []

    def __enter__(self) -> None:
        self._tokens.append(self._variable.set(self._value))
        _traced[self._key] = self._value

    def __exit__(self, *_: object) -> None:
        self._variable.reset(self._tokens.pop())
        _traced[self._key] = self._variable.get()


def use_backend(name: str) -> _Scope:
    """Choose the backend within a `with` block (or a decorated function) of this thread or task.

    Args:
        name: "reference", "cpp", "triton", "cuda" or "auto".

    Backward runs what its forward chose. Around a function compiled by torch.compile the scope
    counts as it does in eager mode; inside one that is compiled with fullgraph=True it cannot be
    opened.

    Raises:
        ValueError: another name. An op raises RuntimeError where the backend cannot serve its
            tensors.
    """
    return _Scope(_backend_scope, "backend", _checked(name, NAMES, "use_backend: name"))


def use_plan(name: str) -> _Scope:
    """Choose how conv_bn runs within a `with` block.

    "auto" leaves it to the table of measurements. "fused" is one kernel for the convolution with
    its prologue and epilogue, where the backend has one: for convolutions of one group. "split",
    which all others take, materialises the activation with one light kernel and calls the library's
    convolution. "epilogue" lies between: a materialised input, statistics and sums in epilogues.
    These may have options, as in "split+keep"; fusedres/_plans.py explains them. "fused+mma" and
    "fused+wgmma" are of the backend "cuda", which runs 1x1 convolutions of stride 1 by them, in
    fp16 and bf16, whose channels and filters are multiples of 64; all others are split then.

    Beside these stand dataflows of a whole network: "fused_1x1", "compact", "masks", "merged_1x1",
    "fused_3x3", "fused_stem", "ideal"; the byte model (`fusedres.bench.roofline`) says what they
    move.

    Raises:
        ValueError: another name. conv_bn raises RuntimeError where the backend has no such plan,
            or the GPU cannot run it.
    """
    if not is_plan(name):
        _checked(name, PLANS, "use_plan: name")
    return _Scope(_plan_scope, "plan", name)


def requested_backend() -> str:
    """The name in force here: the innermost use_backend, else FUSEDRES_BACKEND, else "auto"."""
    return _backend_scope.get() or _checked(
        os.environ.get("FUSEDRES_BACKEND") or "auto", NAMES, "FUSEDRES_BACKEND"
    )


def requested_plan() -> str:
    """The name in force here: the innermost use_plan, else "auto"."""
    return _plan_scope.get()


def unavailable(name: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot run `op` on such tensors; None if it can."""
    b = BACKENDS[name]
    if op not in b.ops:
        return f"backend {name!r} has no {op} kernel in this version of fusedres"
    if b.devices and device not in b.devices:
        return f"backend {name!r} serves {'/'.join(b.devices)} tensors, not {device}"
    if dtype not in b.dtypes:
        served = ", ".join(str(d).removeprefix("torch.") for d in b.dtypes)
        return f"backend {name!r} serves {served}, not {str(dtype).removeprefix('torch.')}"
    return not_ready(name)


@cache
def not_ready(name: str) -> str | None:
    """Why the backend as a whole is off on this machine, with the command that turns it on; None if
    ready.
    """
    if name in ("cpp", "cuda"):
        from fusedres import native

        extension = native.load()
        if extension is None:
            return native.unavailable_reason()
        if name == "cuda" and not extension.cuda_built:
            return (
                "fusedres._C was built without CUDA; install nvcc and reinstall with "
                "FUSEDRES_CUDA=1, or with FUSEDRES_CUDA=wheel, which brings nvcc along"
            )
        if name == "cuda":
            return extension.cuda_driver_status() or _cuda_without_code(extension.cuda_archs)
    if name == "triton":
        return _triton_not_ready()
    return None


def _cuda_without_code(archs: list[str]) -> str | None:
    """Which GPU the extension holds no code for: machine code serves its generation from its own
    minor version on, the PTX of the newest architecture whatever comes after it.
    """
    if torch.cuda.device_count() == 0:
        return None
    built = [(int(a.rstrip("af")[:-1]), int(a.rstrip("af")[-1]), a) for a in archs]
    newest = max((b[:2] for b in built if b[2].isdigit()), default=(99, 0))
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if (major, minor) < newest and not any(major == b[0] and minor >= b[1] for b in built):
            return (
                f"{torch.cuda.get_device_name(i)} has compute capability {major}.{minor}, "
                f"fusedres._C was built for {' '.join(archs)}; reinstall with "
                f"FUSEDRES_CUDA_ARCHS={major}{minor}"
            )
    return None


def _triton_not_ready() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton`"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no GPU; with TRITON_INTERPRET=1 Triton takes CPU tensors, slowly"
    if not INTERPRETED and torch.version.hip is None:
        count = torch.cuda.device_count()
        oldest = min((torch.cuda.get_device_capability(i), i) for i in range(count))
        if oldest[0] < _CAPABILITY:
            name = torch.cuda.get_device_name(oldest[1])
            return f"{name} has compute capability {oldest[0]}, the kernels need {_CAPABILITY}"
    found: str = importlib.import_module("triton").__version__
    if tuple(map(int, found.split(".")[:2])) < _TRITON:
        needed = ".".join(map(str, _TRITON))
        return f"Triton {found} is too old; {needed} or later comes with torch 2.11 or later"
    return None


@cache
def _choose(op: str, device: str, dtype: torch.dtype, backend: str, plan: str) -> Choice:
    light, product = "", product_of(plan)
    if product and op != "conv_bn":
        plan = "split"
    named = backend != "auto"
    if not named:
        why = {n: unavailable(n, op, device, dtype) for n in _AUTO_ORDER if op in BACKENDS[n].ops}
        serving = [name for name, reason in why.items() if reason is None]
        light = backend = serving[0] if serving else "reference"
        if op in TWO_PLANS and base_of(plan) != "split":  # `light` runs what is not fused
            own = [n for n in serving if op in BACKENDS[n].fuses and (n == "cuda") == bool(product)]
            backend = own[0] if own else backend
        passed_over = list(why)
        if serving and op not in TWO_PLANS:
            passed_over = passed_over[: passed_over.index(light)]
        reasons = (why[n] for n in passed_over if device in BACKENDS[n].devices)
        reason = "; ".join(filter(None, reasons))
        if backend == "reference" and not reason:
            reason = f"no backend of this version has a {op} kernel for {device} tensors"
    else:
        reason = unavailable(backend, op, device, dtype) or ""
        if reason:
            raise RuntimeError(
                f"{op}: {reason} (asked for by use_backend or FUSEDRES_BACKEND; 'auto' falls back)"
            )
    base = "fused" if plan in DATAFLOWS else base_of(plan)
    known = base == "auto" or base in BACKENDS[backend].plans
    if product:
        known = backend == "cuda"
    elif backend == "cuda" and not named:  # its products are asked for by their own names
        known = base in ("auto", "split")
    if op == "conv_bn" and not known:
        if product:
            reason = unavailable("cuda", op, device, dtype) or reason
        because = f" ({reason})" if reason else ""
        raise RuntimeError(
            f"conv_bn: backend {backend!r} has no {plan!r} plan{because}; use_plan('auto')"
        )
    return Choice(backend, plan, reason, light)


def plan_of(
    choice: Choice,
    dtype: torch.dtype,
    weight: Tensor,
    conv: Conv,
    out_shape: tuple[int, ...] | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> str:
    """How conv_bn runs one convolution, as _plans.Plan writes it.

    Args:
        choice: what `choose` gave; its plan "auto" leaves the decision to the table and, where that
            is silent, to a heuristic.
        dtype: of the computation.
        weight: [K, C / groups, R, S] on the device that computes.
        conv: the geometry.
        out_shape: [N, K, OH, OW]; None where it is not known yet: taken as large.
        memory_format: of the input.
    """
    kernel = (weight.size(2), weight.size(3))
    pointwise = conv.is_pointwise(kernel)
    fusable = "conv_bn" in BACKENDS[choice.backend].fuses and conv.has_fused_kernel(kernel)
    fusable = fusable and choice.backend != "cuda"  # which has products, by their own names
    if fusable and choice.backend == "cpp":
        served = memory_format is torch.channels_last and conv.has_cpu_kernel(weight.shape)
        fusable = served and _cpu_multiplies(dtype)
    if choice.plan == "auto":
        if choice.backend == "cpp":
            return "fused" if fusable else "split"  # nowhere slower
        known, _ = _planned(choice, dtype, weight, conv, out_shape, memory_format)
        if not fusable:
            return known if known is not None and product_of(known) else "split"
        return _likely_plan(dtype, pointwise) if known is None else known
    if choice.plan in DATAFLOWS:
        flow = DATAFLOWS[choice.plan]
        plan = flow.pointwise if pointwise else flow.spatial
    else:
        plan = choice.plan
    if base_of(plan) == "split":
        return plan
    product = product_of(plan) or "mma"
    if choice.backend == "cuda" and _multiplies(product, dtype, weight, conv, memory_format):
        _require(product, weight.device.index)
        return f"fused+{product}"
    if not fusable:
        return "split"
    return "fused" if choice.backend == "cpp" else plan  # it has no options


def _planned(
    choice: Choice,
    dtype: torch.dtype,
    weight: Tensor,
    conv: Conv,
    out_shape: tuple[int, ...] | None,
    memory_format: torch.memory_format,
) -> tuple[str | None, str]:
    """What the table says of one convolution, None where it is silent or names a product that
    cannot run; and why that cannot, where it is the GPU.
    """
    known = _measured("plan", dtype, weight, conv, out_shape)
    product = "" if known is None else product_of(known)
    if not product:
        return known, ""
    serves = "cuda" in (choice.backend, choice.light)
    if not serves or not _multiplies(product, dtype, weight, conv, memory_format):
        return None, ""
    problem = product_problem(product, weight.device.index)
    return (known, "") if problem is None else (None, f"{known!r} of the plan table: {problem}")


def passed_over(choice: Choice, dtype: torch.dtype, weight: Tensor, conv: Conv) -> str:
    """Why the table's plan of one convolution does not run, where the GPU cannot; else ""."""
    if choice.plan != "auto" or choice.backend in ("cpp", "reference"):
        return ""
    return _planned(choice, dtype, weight, conv, None, torch.channels_last)[1]


def _multiplies(
    product: str,
    dtype: torch.dtype,
    weight: Tensor,
    conv: Conv,
    memory_format: torch.memory_format,
) -> bool:
    """Whether a product of the backend "cuda" is for this convolution."""
    stored = dtype in _HALF_TYPES and memory_format is torch.channels_last
    return stored and conv.has_tensor_core_kernel(weight.shape, product)


@torch.compiler.assume_constant_result
def _require(product: str, index: int | None) -> None:
    problem = product_problem(product, index)
    if problem is not None:
        raise RuntimeError(
            f"conv_bn: plan 'fused+{product}' cannot run: {problem} (asked for by use_plan or "
            "use_backend; 'auto' falls back)"
        )


@torch.compiler.assume_constant_result
def product_problem(product: str, index: int | None) -> str | None:
    """Why the GPU of this index cannot run the plans with one of _plans.PRODUCTS; None if it can.
    Without an index it is asked of all GPUs here, of which one is enough.
    """
    if product == "wgmma":
        return wgmma_problem(index)
    reason = not_ready("cuda")
    if reason is not None or index is None:
        return reason
    return _other_capability(index, torch.cuda.get_device_capability(index) >= _CAPABILITY, "8.0")


def wgmma_problem(index: int | None, check: bool = True) -> str | None:
    """Why plans with "+wgmma" are off on the GPU of this index; None where they are on. Without an
    index it is asked of all GPUs here, of which one is enough.

    Args:
        index: of the device.
        check: run the self-check, which they have to pass first, where that was not done yet in
            this process.
    """
    if index is None:
        found = [wgmma_problem(i, check) for i in range(torch.cuda.device_count())]
        if not found:
            return "no GPU of compute capability 9.0 has been seen here"
        return None if None in found else found[0]
    reason = not_ready("cuda")
    if reason is None:
        capability = torch.cuda.get_device_capability(index)
        reason = _other_capability(index, capability == _WGMMA_CAPABILITY, "9.0 and no other")
    if reason is not None:
        return reason
    from fusedres import native

    if not native.require().wgmma_built:
        return (
            "fusedres._C was built without code for sm_90a; reinstall with FUSEDRES_CUDA_ARCHS=90"
        )
    with _wgmma_lock:
        if index in _wgmma_checked:
            return _wgmma_checked[index]
        if not check:
            return "its self-check has not run yet; it runs where the plan is first asked for"
        with torch.cuda.device(index):
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            return "its self-check cannot run while a CUDA graph is captured; run once before that"
        ops = importlib.import_module("fusedres.ops._self_check")  # which stands above
        try:
            _wgmma_checked[index] = ops.problem(torch.device("cuda", index))
        except torch.OutOfMemoryError:
            return "its self-check found too little memory free; it runs again when asked for"
        return _wgmma_checked[index]


def wgmma_note(index: int | None) -> str:
    """In a line, where plans with "+wgmma" stand: on the GPU of this index, or on any of them. It
    runs no self-check.
    """
    reason = wgmma_problem(index, check=False)
    if reason is None:
        return (
            "plan 'fused+wgmma' has passed its self-check: it runs where use_plan or a table says"
        )
    return f"plan 'fused+wgmma' is off: {reason}"


def _other_capability(index: int, serves: bool, needed: str) -> str | None:
    if serves:
        return None
    found = ".".join(map(str, torch.cuda.get_device_capability(index)))
    name = torch.cuda.get_device_name(index)
    return f"{name} has compute capability {found}, the kernels need {needed}"


def _measured(
    field: str, dtype: torch.dtype, weight: Tensor, conv: Conv, out_shape: tuple[int, ...] | None
) -> str | None:
    """What the table says of one convolution; None where it is silent."""
    rows = None if out_shape is None else out_shape[0] * out_shape[2] * out_shape[3]
    kernel = (weight.size(2), weight.size(3))
    for known in _plan_table.plans(_plan_table.device_name(weight.device), dtype, field):
        if weight.size(1) != known.in_channels or weight.size(0) != known.out_channels:
            continue
        same = kernel == known.kernel and conv.stride == known.stride
        if same and _plan_table.fits(rows, known.least, known.most):
            return known.plan
    return None


def inference_plan_of(
    choice: Choice,
    dtype: torch.dtype,
    weight: Tensor,
    conv: Conv,
    out_shape: tuple[int, ...] | None,
    library_fuses: bool,
) -> str:
    """How conv_act runs one convolution: "fused", our kernel, or "split", the library's.

    Args:
        choice, dtype, weight, conv, out_shape: as `plan_of` takes them.
        library_fuses: whether the library's epilogue has it all; where the table is silent it is
            taken then.
    """
    kernel = (weight.size(2), weight.size(3))
    fusable = "conv_act" in BACKENDS[choice.backend].fuses and conv.has_fused_kernel(kernel)
    if not fusable:
        return "split"
    if choice.plan == "auto":
        known = _measured("inference", dtype, weight, conv, out_shape)
        named = choice.light == ""  # then it is to run its own
        return known or ("split" if library_fuses and not named else "fused")
    flow = DATAFLOWS.get(choice.plan)
    plan = choice.plan if flow is None else flow.spatial if max(kernel) > 1 else flow.pointwise
    return "split" if base_of(plan) == "split" else "fused"


@torch.compiler.assume_constant_result
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    multiplies: Callable[[torch.dtype], bool] = kernels("cpp", "conv_bn").multiplies
    return multiplies(dtype)


def samples_shortcuts(choice: Choice) -> bool:
    """Whether a strided shortcut is to give no gradient for the pixels that it does not read."""
    if choice.plan in DATAFLOWS:
        return DATAFLOWS[choice.plan].compact
    return choice.backend == "cpp"


def light_backend(
    choice: Choice, op: str, device: torch.device, dtype: torch.dtype, size: int | None
) -> str:
    """Who runs a light pass over a tensor of `size` bytes (None: not known yet, taken as large)."""
    if choice.light in ("", "reference"):
        return choice.backend
    for least, most, name in _plan_table.light(_plan_table.device_name(device), op, dtype):
        if (
            _plan_table.fits(size, least, most)
            and unavailable(name, op, device.type, dtype) is None
        ):
            return name
    return choice.light


def way_of(
    choice: Choice,
    dtype: torch.dtype,
    weight: Tensor,
    conv: Conv,
    out_shape: tuple[int, ...] | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> tuple[str, str]:
    """Backend and plan of one convolution with its BatchNorm; the arguments of `plan_of`."""
    plan = plan_of(choice, dtype, weight, conv, out_shape, memory_format)
    if product_of(plan):
        return "cuda", plan
    if base_of(plan) != "split":
        return choice.backend, plan
    size = None if out_shape is None else math.prod(out_shape) * dtype.itemsize
    return light_backend(choice, "bn_act", weight.device, dtype, size), plan


def _likely_plan(dtype: torch.dtype, pointwise: bool) -> str:
    """By bytes moved the fused plan; but only where tensor cores serve Triton's products, and for
    1x1 kernels: a larger one repeats its prologue for every tap, and has to be measured.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    tf32 = dtype == torch.float32 and conv_allows_tf32()
    return "fused" if pointwise and (half or tf32) else "split"


def backend_for(op: str, x: Tensor) -> str:
    """The backend of a light pass over x, in its dtype.

    Raises:
        RuntimeError: a backend asked for by name cannot serve x.
    """
    choice = choose(op, x.device.type, x.dtype)
    return light_backend(choice, op, x.device, x.dtype, x.numel() * x.element_size())


def choose(op: str, device: str, dtype: torch.dtype) -> Choice:
    """Backend and plan for one call, resolved in forward and kept for its backward.

    Raises:
        RuntimeError: a backend or plan asked for by name cannot serve these tensors; or one that
            torch.func cannot look into is to run within its transforms.
    """
    choice = _choose_here(op, device, dtype, _traced["backend"], _traced["plan"])
    if choice.backend != "reference" and transforming():
        raise RuntimeError(
            f"{op}: transforms of torch.func (vmap, grad, jvp, ...) cannot go through backend "
            f"{choice.backend!r}; within them use fusedres.use_backend('reference'), or "
            "fusedres.unfuse(model)"
        )
    return choice


def transforming() -> bool:
    """Whether this runs within a transform of torch.func."""
    interpreter = torch._C._functorch.peek_interpreter_stack
    return not torch.compiler.is_compiling() and interpreter() is not None


@torch.compiler.assume_constant_result
def _choose_here(op: str, device: str, dtype: torch.dtype, *_guarded: str) -> Choice:
    return _choose(op, device, dtype, requested_backend(), _plan_scope.get())


@cache
def kernels(backend: str, op: str) -> ModuleType:
    """The module that holds a backend's kernels of one op: fusedres.native.bn_act, say.

    Raises:
        ValueError: there is no such backend, or it has no such kernels.
    """
    known = backend != "reference" and backend in BACKENDS and op in BACKENDS[backend].ops
    if not known or (op in TWO_PLANS and op not in BACKENDS[backend].fuses):
        raise ValueError(f"{op}: no kernels of a backend {backend!r}")
    return importlib.import_module(f"{BACKENDS[backend].room}.{op}")
