"""Nothing in a training step waits for the GPU or asks it anything, so that a CUDA graph can hold
the whole of it.

Seen without a GPU: which ops run on a CPU, within ours too; the host code of every backend of a GPU
on fake tensors, where what depends on values raises, with a stub in place of what launches; and
what the sources call. The last tests need a GPU and capture.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dispatched import Dispatched
from plain_resnet import PlainBottleneck
from test_fuse import Small
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

import fusedres
from fusedres import _plan_table, backends, fuse, native, use_backend
from fusedres.native import _args, _pack
from fusedres.testing import CHANNELS_LAST, error, serving_backends

SOURCE = Path(__file__).resolve().parent.parent
PACKAGE = Path(fusedres.__file__).resolve().parent
BACKENDS = serving_backends()


class Net(nn.Module):
    """Our own blocks behind a fused stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = fuse(
            nn.Sequential(
                nn.Conv2d(3, 32, 7, 2, 3, bias=False),
                nn.BatchNorm2d(32),
                nn.ReLU(),
                nn.MaxPool2d(3, 2, 1),
            )
        )
        self.stage = fusedres.nn.Stage(
            fusedres.ConvBlock(32, (32, 32, 64)),
            fusedres.IdentityBlock(64, (32, 32, 64)),
            fusedres.nn.BasicBlock(64, 32, 2),
        )
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage(self.stem(x)).mean((2, 3)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "blocks": Net,
    "fused": lambda: fuse(Small()),
    "recompute": lambda: fuse(Small(), memory="recompute"),
}
MODES = ["train", "eval", "frozen", "momentum=None", "autocast"]


def set_mode(model: nn.Module, mode: str) -> None:
    model.train(mode != "eval")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(mode not in ("eval", "frozen"))
            module.momentum = None if mode == "momentum=None" else 0.1


def prepared(name: str, mode: str) -> nn.Module:
    model = MODELS[name]().to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
    set_mode(model, mode)
    return model


class Step:
    """Forward, backward, SGD."""

    def __init__(self, model: nn.Module, x: Tensor, labels: Tensor, foreach: bool) -> None:
        self.model, self.x, self.labels = model, x, labels
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, foreach=foreach)

    def run(self, autocast: torch.dtype | None = None) -> Tensor:
        device = self.x.device.type
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(self.model(self.x).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


# --- what runs ------------------------------------------------------------------------------------

ASKING = {  # the host for a value, or for a shape that follows from values
    "item", "_local_scalar_dense", "is_nonzero", "nonzero", "nonzero_numpy", "argwhere", "equal",
    "allclose", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "repeat_interleave", "_linalg_check_errors", "_pin_memory", "_is_all_true", "_is_any_true",
}  # fmt: skip


class Waiting(Dispatched):
    """Lists what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ran: set[str] = set()

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = func.name().partition("::")[2].partition(".")[0]
        self.ran.add(name)
        tensors = (t for t in pytree.tree_leaves(args) if isinstance(t, Tensor))
        by_mask = name == "index" and any(t.dtype == torch.bool for t in tensors)
        if name in ASKING or by_mask:
            self.found.append(func.name())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_no_op_of_a_step_asks_for_a_value(name: str, backend: str) -> None:
    x, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 1])
    model = prepared(name, "train")
    for mode in MODES:
        set_mode(model, mode)
        for foreach in (True, False):
            step = Step(model, x, labels, foreach)
            with use_backend(backend), Waiting() as waiting:
                for _ in range(2):
                    step.run(torch.bfloat16 if mode == "autocast" else None)
            assert not waiting.found, (mode, waiting.found)
            assert ("conv_bn_bwd" in waiting.ran) == (backend != "reference")
            assert "convolution_backward" in waiting.ran  # so ours were looked into
            assert ("_foreach_add_" in waiting.ran) == foreach


def test_what_asks_is_found() -> None:
    x = torch.ones(3)
    for ask in (
        x.sum().item,
        lambda: bool(x[0]),
        x.nonzero,
        lambda: torch.equal(x, x),
        lambda: x[x > 0],
    ):  # type: ignore[var-annotated]
        with Waiting() as waiting:
            ask()
        assert waiting.found


# --- a GPU that is not there ----------------------------------------------------------------------

STREAM = 7


class Extension:
    """fusedres._C, launching nothing; notes the stream of each launch."""

    cuda_built = True

    def __init__(self) -> None:
        self.launches: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def called(*args: Any) -> int:
            if name == "pack":
                assert args[1:3] == (0, STREAM)
            elif not isinstance(args[0], int):
                _, _, _, device, stream = args[0]
                assert (device, stream) == (0, STREAM), name
            self.launches.append(name)
            return 64  # bytes, where it is asked how many

        return called


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Extension]:
    """An H100 to everything that asks: fake tensors are there, of whatever device."""
    extension = Extension()

    def address(t: Tensor) -> int:
        return t.untyped_storage()._cdata + t.storage_offset() * t.element_size()

    monkeypatch.setattr(FakeTensor, "data_ptr", address, raising=False)
    monkeypatch.setattr(backends, "not_ready", lambda name: None)
    for name, served in backends.BACKENDS.items():
        devices = {"cuda": ("cuda", "cpu"), "triton": ("cuda", "cpu")}.get(name, ("none",))
        monkeypatch.setitem(backends.BACKENDS, name, replace(served, devices=devices))
    monkeypatch.setattr(_plan_table, "_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(_args, "where", lambda t: (0, STREAM))
    for room in (native, _pack, *(backends.kernels("cuda", op) for op in LIGHT)):
        monkeypatch.setattr(room, "require", lambda: extension)
    with contextlib.suppress(ImportError):
        from fusedres.triton_kernels import _args as triton_args

        monkeypatch.setitem(triton_args.check.keywords, "devices", ("cuda", "cpu"))
        for op in backends.OPS:  # all of them import what is replaced here
            backends.kernels("triton", op)
        for name, module in list(sys.modules.items()):
            if name.startswith("fusedres.triton_kernels"):
                for asked, answer in (("arch_of", 90), ("multiprocessors", 132)):
                    if hasattr(module, asked):
                        monkeypatch.setattr(module, asked, lambda _, answer=answer: answer)
    backends._choose.cache_clear()
    yield extension
    backends._choose.cache_clear()


LIGHT = ["bn_act", "batch_norm", "bn_relu_maxpool", "add_relu"]


@contextlib.contextmanager
def launches_of_triton() -> Iterator[list[Any]]:
    """Instead of launching; empty where there is no Triton."""
    try:
        from fusedres.triton_kernels._launch import recording
    except ImportError:
        yield []
        return
    with recording(run=False) as launches:
        yield launches


def faked(model: nn.Module) -> nn.Module:
    """With fake parameters and buffers."""

    def moved(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)

    for module in model.modules():
        for n, p in module.named_parameters(recurse=False):
            setattr(module, n, nn.Parameter(moved(p)))
        for n, b in module.named_buffers(recurse=False):
            setattr(module, n, moved(b))
    return model


@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
@pytest.mark.parametrize("name", ["blocks", "fused"])
def test_host_code_asks_a_gpu_nothing(name: str, backend: str, gpu: Extension) -> None:
    """On fake tensors, which have no values to give, and the library's convolutions on them."""
    if backend != "cuda":
        pytest.importorskip("triton")
    model = prepared(name, "train")
    for mode in MODES:
        set_mode(model, mode)
        gpu.launches.clear()
        with FakeTensorMode(), launches_of_triton() as launches, Waiting() as waiting:
            x = torch.empty(4, 3, 32, 32).to(memory_format=CHANNELS_LAST)
            step = Step(faked(model), x, torch.empty(4, dtype=torch.int64), True)
            with use_backend(backend):
                for _ in range(2):
                    step.run(torch.bfloat16 if mode == "autocast" else None)
        assert not waiting.found, (mode, waiting.found)
        assert {"conv_bn_fwd", "conv_bn_bwd", "conv_bn_relu_maxpool_bwd"} <= waiting.ran
        assert bool(gpu.launches) == (backend != "triton")
        assert bool(launches) == (backend != "cuda")


# --- what is written ------------------------------------------------------------------------------

needs_source = pytest.mark.skipif(not (SOURCE / "csrc").is_dir(), reason="needs the source tree")
# what a capture forbids, or a graph would not do again; a kernel's own memory and output
FORBIDDEN = re.compile(
    r"\bcuda(Malloc|Free|Memcpy|Memset|HostAlloc|HostRegister|DeviceSynchronize|StreamSynchronize"
    r"|StreamQuery|StreamCreate|EventSynchronize|EventQuery|EventCreate|DeviceReset|DeviceSetLimit)\w*"
    r"|\b(printf|malloc|calloc|realloc|free|new|cout|cerr)\b|<<<"
)


def code_of(path: Path) -> str:
    """Without comments and strings."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)
    text = re.sub(r"void device_check_failed\(.*?\n}", "", text, flags=re.S)  # of debug builds
    return re.sub(r'"(\\.|[^"\\])*"', '""', text)


def cuda_files() -> list[Path]:
    return sorted(p for p in (SOURCE / "csrc" / "cuda").iterdir() if p.suffix in (".cu", ".h"))


@needs_source
@pytest.mark.parametrize(
    "path", cuda_files() if (SOURCE / "csrc").is_dir() else [], ids=lambda p: p.name
)
def test_cuda_sources_neither_wait_nor_allocate(path: Path) -> None:
    assert not [m.group() for m in FORBIDDEN.finditer(code_of(path))]


@needs_source
def test_every_launch_is_on_the_stream_that_was_given() -> None:
    launches = 0
    for path in cuda_files():
        code = code_of(path)
        if path.name == "launch.h":
            assert "how.stream = stream;" in code and code.count("cudaLaunchKernelEx") == 1
            continue
        assert "cudaLaunch" not in code, path.name
        for call in re.finditer(r"\blaunch\(([^;]*?);", code, re.S):
            stream = call.group(1).split(",")[2].strip()
            assert stream in ("target.stream", "stream"), f"{path.name}: {call.group()}"
            launches += 1
    assert launches >= 10


WORDS = ["cudaMallocAsync(&p, n, s)", "cudaMemcpy(a, b, n)", "cudaDeviceSynchronize()"]
WORDS += ["int* p = new int[3]", "k<<<1, 2>>>()", "printf(format)", "free(p)"]


@pytest.mark.parametrize("word", WORDS)
def test_words_that_are_forbidden_are_found(word: str, tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text(f"// {word}\nvoid f() {{ {word}; }}\n")
    assert len(list(FORBIDDEN.finditer(code_of(tmp_path / "a.cu")))) == 1


ROOMS = ("native", "triton_kernels", "library", "ops", "reference", "nn", "models")
METHODS = {"item", "cpu", "tolist", "numpy", "synchronize", "nonzero", "is_nonzero", "pin_memory"}
MAKERS = {"tensor", "as_tensor", "from_numpy"}  # of torch: from the host's memory to a device's


def asked(path: Path, source: str) -> list[str]:
    """Calls in a Python file that wait for a device, or bring values to one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, ast.unparse(node.func.value)
        made = owner == "torch" and name in MAKERS
        to_host = name == "to" and any("cpu" in ast.unparse(a) for a in node.args)
        if name in METHODS or made or to_host:
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]}")
    return found


# by what they are for: state dicts and files they come from, pictures of weights and traces of a
# model are no step's
ASIDE = {"weights.py", "arrays.py", "summary.py", "tracing.py", "matching.py", "init.py"}
# nor what freeze does once, vectors that are made before a graph is recorded, and the recording
ASIDE |= {"freeze.py", "frames.py", "graphs.py"}
ON_A_CPU = ("s.isfinite().item()",)  # asked where oneDNN runs


@pytest.mark.parametrize("room", ROOMS)
def test_python_asks_a_device_for_no_value(room: str) -> None:
    paths = [p for p in (PACKAGE / room).rglob("*.py") if p.name not in ASIDE]
    calls = [call for p in paths for call in asked(p, p.read_text())]
    assert paths and not [call for call in calls if not call.endswith(ON_A_CPU)]
    assert len(asked(Path("a.py"), "x.item()\ntorch.tensor(1.0)\nx.to('cpu')\nx.to(d)")) == 3


# --- on a GPU -------------------------------------------------------------------------------------


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (16,), generator=generator)
    x = torch.randn(16, 3, 64, 64, generator=generator)
    x[torch.arange(16), labels % 3] += labels[:, None, None]  # which can be learnt
    return x.cuda().contiguous(memory_format=CHANNELS_LAST), labels.cuda()


@pytest.fixture
def exactly() -> Iterator[None]:
    """The library's kernels are the same ones at each call, and fp32 is fp32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = True, False, False
    yield
    cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before


def warmed_up(run: Callable[[], object], times: int = 3) -> None:
    """On a stream of its own, as a capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(stream)


def assert_close(
    ours: dict[str, Tensor], truth: dict[str, Tensor], limit: float, what: object = ""
) -> None:
    for name, true in truth.items():
        off = error(ours[name].double().cpu(), true.double().cpu())
        assert off <= limit, f"{what} {name}: {off:.1e}"


@pytest.mark.gpu
@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize(
    ("mode", "backend"), [*((m, "auto") for m in MODES), ("train", "cuda"), ("train", "triton")]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_step_is_captured(name: str, mode: str, backend: str) -> None:
    """Forward, backward and SGD in one graph; replayed three times on other images."""
    model = prepared(name, mode).cuda()
    eager = copy.deepcopy(model)
    half = torch.bfloat16 if mode == "autocast" else None
    x, labels = data(0)
    step, other = (Step(m, x.clone(), labels.clone(), True) for m in (model, eager))
    with use_backend(backend):
        for s in (step, other):
            warmed_up(lambda s=s: s.run(half))  # type: ignore[misc]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step.run(half)
        for seed in range(1, 4):
            x, labels = data(seed)
            for s in (step, other):
                s.x.copy_(x)
                s.labels.copy_(labels)
            graph.replay()
            expected = other.run(half)
            limit = 1e-4 if half is None else 3e-2
            assert_close({"loss": loss.detach()}, {"loss": expected.detach()}, limit, seed)
    assert_close(model.state_dict(), eager.state_dict(), limit)


@pytest.mark.gpu
@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
@pytest.mark.parametrize("kind", ["ConvBlock", "BasicBlock", "fused"])
def test_a_block_as_a_graphed_callable(kind: str, backend: str) -> None:
    """By torch.cuda.make_graphed_callables: output, gradients and running statistics."""
    block: nn.Module = {
        "ConvBlock": lambda: fusedres.ConvBlock(64, (32, 32, 64)),
        "BasicBlock": lambda: fusedres.nn.BasicBlock(64, 64),
        "fused": lambda: fuse(PlainBottleneck(64, 16, 1, False, 1e-5, 0.1)),
    }[kind]()
    block = block.cuda().to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
    eager = copy.deepcopy(block)

    def images(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 64, 14, 14, generator=generator).cuda()
        return x.contiguous(memory_format=CHANNELS_LAST).requires_grad_()

    with use_backend(backend):
        graphed: Any = torch.cuda.make_graphed_callables(block, (images(0),))
        block.load_state_dict(eager.state_dict())  # which its warm-up has moved
        for seed in range(1, 4):
            found = []
            for m in (graphed, eager):
                x = images(seed)
                m.zero_grad()
                out = m(x)
                out.square().sum().backward()
                grads = {n: p.grad.clone() for n, p in m.named_parameters()}
                found.append({"out": out.detach().clone(), "x": x.grad, **grads})
            assert_close(*found, limit=1e-5, what=seed)  # type: ignore[misc]
    assert_close(dict(block.named_buffers()), dict(eager.named_buffers()), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loss_curves_under_a_grad_scaler(dtype: torch.dtype) -> None:
    """50 steps of a fused model of plain modules beside that model: two correct implementations
    part in half types, by little at first, and both learn.
    """
    plain = Small().cuda().to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
    curves, scales = [], []
    for model in (fuse(copy.deepcopy(plain)), plain):
        optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
        losses = []
        for i in range(50):
            x, labels = data(i % 4)
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                loss = F.cross_entropy(model(x), labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        curves.append(torch.stack(losses).cpu())
        scales.append(scaler.get_scale())
    ours, theirs = curves
    assert ours.isfinite().all() and scales == [2.0**12] * 2
    assert float((ours[:5] / theirs[:5] - 1).abs().max()) < 0.05
    for curve in curves:
        assert float(curve[-8:].mean()) < 0.7 * float(curve[:4].mean())
    assert abs(float(ours[-8:].mean() - theirs[-8:].mean())) < 0.2
