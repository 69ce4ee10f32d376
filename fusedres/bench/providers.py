"""The ways of running a network that are timed against each other, by name.

A name says whose model it is and how it is run:

- "eager" is the network of plain torch.nn modules, channels_last, under autocast for half types
  (inference: its weights cast instead), with ReLU and the residual add in place as torchvision has
  them; "eager-nchw" is the same in torch's default memory format;
- "torchvision", "timm": theirs, where they are installed, else as "eager";
- "fusedres-auto", "fusedres-cpp", "fusedres-cuda", "fusedres-triton", "fusedres-reference": ours by
  that backend; "fusedres-triton-split", "fusedres-triton-masks" by that plan or dataflow;
  "fusedres" by what is in force where it runs; "-frozen" behind the backend is inference by the
  model that `fusedres.freeze` makes: "fusedres-cpp-frozen", "fusedres-triton-frozen-split";
- a suffix says how: "-graph" in a CUDA graph; "-compile" by torch.compile, "-compile-graph" in its
  mode reduce-overhead, "-compile-max" in max-autotune, "-compile-max-nograph" in
  max-autotune-no-cudagraphs, "-compile-freeze" with weights frozen (inference). Of "eager" the
  suffix stands alone: "graph", "compile", "compile-max", ..;
- "cudnn-fused", "cudnn-fused-graph": inference by cuDNN's convolution + bias + (add +) ReLU on
  weights with BatchNorm folded in.

All start from the same weights and see the same images.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fusedres import backends
from fusedres._plans import is_plan
from fusedres._tensors import autocast
from fusedres.bench.harness import captured
from fusedres.bench.measure import name_of, own_backends
from fusedres.models import FusedResNet50
from fusedres.nn import ConvBlock, IdentityBlock, freeze, report, unfuse

COMPILED: dict[str, dict[str, Any]] = {
    "compile": {},
    "compile-graph": {"mode": "reduce-overhead"},
    "compile-max": {"mode": "max-autotune"},
    "compile-max-nograph": {"mode": "max-autotune-no-cudagraphs"},
    "compile-freeze": {},  # its weights are frozen in _inference
}
SLOW_TO_COMPILE = ("compile-max", "compile-max-nograph")  # by default in jobs of their own
FOREIGN = ("torchvision", "timm")
CUDNN = "cudnn-fused"
PLAIN = ("eager", "eager-nchw", *FOREIGN, CUDNN)
aten = torch.ops.aten


@dataclass(frozen=True)
class Workload:
    """What a provider runs on.

    Attributes:
        batch, size: images [batch, 3, size, size]; for a block its input's height and width.
        dtype: of the computation; float32 and float64 are the parameters' dtype too, float16 and
            bfloat16 run under autocast over float32 parameters, but in inference.
        device: as torch.device takes it.
        num_classes: outputs of the last layer.
        seed: of the weights, the images and the labels.
        block: None for a ResNet-50, else "ConvBlock 1" to "ConvBlock 4" or "IdentityBlock 1" ..:
            a block as it stands in that stage.
        training: forward, backward and, for the network, an optimizer's step; else inference.
    """

    batch: int
    size: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    num_classes: int = 1000
    seed: int = 0
    block: str | None = None
    training: bool = True

    def __str__(self) -> str:
        size = f"{self.size}x{self.size}"
        return f"batch {self.batch}, {size}, {name_of(self.dtype)}, {self.device}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the input."""
        return (
            self.batch,
            3 if self.block is None else _block_shape(self.block)[1],
            *((self.size,) * 2),
        )


class Way:
    """A provider's name taken apart.

    Attributes:
        name: without the plan.
        model: "eager", "eager-nchw", "torchvision", "timm", "fusedres" or "cudnn-fused".
        backend, plan: of fusedres; None for the others.
        frozen: whether it is a frozen model.
        mode: "", "graph" or one of COMPILED.

    Raises:
        ValueError: no provider has such a name.
    """

    def __init__(self, name: str) -> None:
        self.backend: str | None = None
        self.plan: str | None = None
        self.frozen = False
        head, self.mode = _split_mode(name)
        self.name, self.model = name, head or "eager"
        if head == "fusedres":
            self.plan = "auto"
            return
        if head.startswith("fusedres-"):
            self.model, (self.backend, *plan) = "fusedres", head.split("-")[1:]
            self.frozen = plan[:1] == ["frozen"]
            plan = plan[self.frozen :]
            self.plan = plan[0] if plan else "auto"
            parts = ("fusedres", self.backend, "frozen" if self.frozen else "", self.mode)
            self.name = "-".join(part for part in parts if part)
            named = self.plan in backends.PLANS or is_plan(self.plan)
            known = self.backend in backends.NAMES and named
            if known and len(plan) < 2:
                return
        elif self.model in PLAIN:
            return
        raise ValueError(
            f"provider: got {name!r}, accepted: {', '.join(PLAIN)}, fusedres, "
            f"fusedres-BACKEND[-frozen][-PLAN] (BACKEND: {', '.join(backends.NAMES)}; PLAN: "
            f"{', '.join(backends.PLANS)}), each as it is or with -graph, "
            f"{', '.join(f'-{mode}' for mode in COMPILED)}; for eager the suffix alone"
        )

    def unavailable(self, work: Workload) -> str | None:
        """Why it cannot run a workload here, where that is known before trying; None if it can."""
        on_gpu = torch.device(work.device).type == "cuda"
        if not on_gpu and (self.model == CUDNN or self.mode in ("graph", "compile-graph")):
            return f"{self.name} needs a GPU"
        infers = self.frozen or self.model == CUDNN or self.mode == "compile-freeze"
        if work.training and infers:
            return f"{self.name} is for inference"
        if self.model in (*FOREIGN, CUDNN) and work.block is not None:
            return f"{self.name} runs whole networks"
        if self.model in FOREIGN and importlib.util.find_spec(self.model) is None:
            return f"{self.model} is not installed; `pip install {self.model}`"
        if self.backend not in (None, "auto"):
            return backends.unavailable(self.backend, "conv_bn", work.device, work.dtype)
        return None


def default_names(work: Workload, quick: bool = False) -> list[str]:
    """Those worth comparing on a workload here, "eager" first."""
    device = torch.device(work.device)
    own = own_backends("conv_bn", device, work.dtype)
    names = ["eager", "eager-nchw"]
    if device.type == "cuda":
        ours = [f"fusedres-{backend}" for backend in ("auto", *own)]
        if "triton" in own:
            ours.append("fusedres-triton-split")
        frozen = [f"fusedres-{backend}-frozen" for backend in ("auto", *own)]
        ours = ours if work.training else frozen
        names += [name + suffix for name in ours for suffix in ("", "-graph")]
        names += ["graph", CUDNN, f"{CUDNN}-graph", "compile-graph"]
        names += [] if quick else ["compile"]
    else:
        names += [] if quick else ["compile", "compile-freeze"]
        names += [f"fusedres-{backend}" for backend in own]
        names += [f"fusedres-{backend}-frozen" for backend in own]
        names += [] if quick else ["fusedres-reference"]
    names += FOREIGN
    return [name for name in names if Way(name).unavailable(work) is None]


@dataclass
class Provider:
    """One way of running a workload, built.

    Attributes:
        name, plan: as in a row.
        backend: what runs its convolutions and BatchNorms: a backend's name, or "torch".
        run: does it once; returns the loss (training; for a block the output) or the output.
        model: the network.
        leaves: what takes gradients: its parameters; for a block its input, too.
        output: of the last run; set before it returns.
        is_graph: whether a run is a replay of a CUDA graph of ours.
    """

    name: str
    backend: str
    plan: str | None
    run: Callable[[], Tensor]
    model: nn.Module
    leaves: list[Tensor]
    output: list[Tensor]
    is_graph: bool = False


def build(name: str, work: Workload, pool: Any = None) -> Provider:
    """A provider, ready to run; one in a CUDA graph has run and is captured.

    Args:
        name: see the head of this module.
        work: what it runs on.
        pool: memory that CUDA graphs share, see harness.captured.

    Raises:
        ValueError: no provider has such a name.
        RuntimeError: it cannot run the workload here.
    """
    way = Way(name)
    reason = way.unavailable(work)
    if reason is not None:
        raise RuntimeError(reason)
    model, inputs, target = _build(way, work)
    if way.frozen:
        model = freeze(model, dtype=work.dtype)
    net: Callable[[Tensor], Tensor] = model
    if way.model == CUDNN:
        net = _cudnn_fused(model, work.dtype)
    elif way.mode in COMPILED:
        net = torch.compile(model, **COMPILED[way.mode])
    output: list[Tensor] = []
    leaves: list[Tensor] = list(model.parameters())
    if work.block is not None:
        leaves.append(inputs.requires_grad_())
    make = _training if work.training else _inference
    run = make(way, net, model, inputs, target, work, output)
    if way.mode == "graph":
        run = _graphed(run, output, pool)
    backend, is_graph = _backends_of(way, model, work), way.mode == "graph"
    return Provider(way.name, backend, way.plan, run, model, leaves, output, is_graph)


def _split_mode(name: str) -> tuple[str, str]:
    """Whose model, and how it is run; the head of a name that is a mode alone is ""."""
    for mode in (*sorted(COMPILED, key=len, reverse=True), "graph"):
        if name == mode:
            return "", mode
        if name.endswith(f"-{mode}"):
            return name.removesuffix(f"-{mode}"), mode
    return name, ""


@contextlib.contextmanager
def _scope(way: Way, work: Workload, cast: bool) -> Iterator[None]:
    """The backend and plan that the name asks for, and autocast where the workload has it."""
    with contextlib.ExitStack() as stack:
        if way.backend is not None:
            stack.enter_context(backends.use_backend(way.backend))
            stack.enter_context(backends.use_plan(way.plan or "auto"))
        if cast:
            stack.enter_context(autocast(torch.device(work.device), work.dtype))
        if way.mode == "compile-graph" or way.mode == "compile-max":
            torch.compiler.cudagraph_mark_step_begin()
        yield


def _training(
    way: Way,
    net: Callable[[Tensor], Tensor],
    model: nn.Module,
    inputs: Tensor,
    target: Tensor,
    work: Workload,
    output: list[Tensor],
) -> Callable[[], Tensor]:
    parameters = list(model.parameters())
    if work.block is not None:

        def pass_block() -> Tensor:
            for leaf in (inputs, *parameters):
                leaf.grad = None
            with _scope(way, work, True):
                out = net(inputs)
            out.backward(target)
            output[:] = [out.detach()]
            return out.detach()

        return pass_block
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-5, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()  # to None, in a CUDA graph too: gradients stay in its pool
        with _scope(way, work, True):
            logits = net(inputs)
            loss = F.cross_entropy(logits, target)
        loss.backward()
        optimizer.step()
        output[:] = [logits.detach()]
        return loss.detach()

    return step


def _inference(
    way: Way,
    net: Callable[[Tensor], Tensor],
    model: nn.Module,
    inputs: Tensor,
    _: Tensor,
    work: Workload,
    output: list[Tensor],
) -> Callable[[], Tensor]:
    model.eval()
    inputs = inputs.to(work.dtype)
    if way.model != CUDNN:
        model.to(work.dtype)

    mode: Any = torch.inference_mode
    if way.mode == "compile-freeze":
        # as an option of one compilation, or in inference mode, it packs less and is slower
        mode = torch.no_grad
        with mode(), torch._inductor.config.patch(freezing=True), _scope(way, work, False):
            net(inputs)

    def forward() -> Tensor:
        with mode(), _scope(way, work, False):
            out = net(inputs)
        output[:] = [out]
        return out

    return forward


def _graphed(run: Callable[[], Tensor], output: list[Tensor], pool: Any) -> Callable[[], Tensor]:
    replay = captured(run, pool)
    held = list(output)  # where every replay leaves what it found

    def replayed() -> Tensor:
        replay()
        output[:] = held
        return held[0]

    return replayed


def _build(way: Way, work: Workload) -> tuple[nn.Module, Tensor, Tensor]:
    """Model, input, and what the loss compares with: labels, for a block the upstream gradient."""
    model, inputs, target = copy.deepcopy(
        _start(work.block, work.num_classes, work.seed, work.batch, work.size)
    )
    if way.model in FOREIGN:
        theirs = _foreign(way.model, work.num_classes)
        theirs.load_state_dict(model.state_dict())
        model = theirs
    elif way.model != "fusedres":
        unfuse(model, inplace=True)
    wide = torch.float64 if work.dtype == torch.float64 else torch.float32
    memory_format = torch.contiguous_format if way.model == "eager-nchw" else torch.channels_last
    model = model.to(work.device, wide)
    model.to(memory_format=memory_format)  # type: ignore[call-overload]
    inputs = inputs.to(work.device, wide, memory_format=memory_format)
    if work.block is not None:
        # what reaches a block under autocast has the compute dtype already, and follows a ReLU
        inputs = inputs.relu_().to(work.dtype)
        target = target.to(work.dtype, memory_format=memory_format)
    return model, inputs, target.to(work.device)


@lru_cache(maxsize=1)  # all providers of a workload start from it, and random numbers take a while
def _start(
    block: str | None, num_classes: int, seed: int, batch: int, size: int
) -> tuple[nn.Module, Tensor, Tensor]:
    """What `_build` gives, on the CPU; activations in bf16, for the same numbers in every dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if block is None:
            images = torch.randn(batch, 3, size, size).bfloat16()
            return FusedResNet50(num_classes), images, torch.randint(num_classes, (batch,))
        stride, inputs, outputs = _block_shape(block)
        out = (size - 1) // stride + 1
        x, grad = (torch.randn(batch, c, s, s) for c, s in ((inputs, size), (outputs, out)))
        return _block(block), x.bfloat16(), grad.bfloat16()


def _foreign(name: str, num_classes: int) -> nn.Module:
    if name == "timm":
        import timm

        return timm.create_model("resnet50", num_classes=num_classes)
    from torchvision.models import resnet50

    model: nn.Module = resnet50(num_classes=num_classes)
    return model


def _block_shape(block: str) -> tuple[int, int, int]:
    """(stride, input channels, output channels) of a block of a stage, as named in a Workload."""
    kind, stage = block.split()
    filters = 64 * 2 ** (int(stage) - 1)
    if kind == "IdentityBlock":
        return 1, 4 * filters, 4 * filters
    return (1, 64, 4 * filters) if stage == "1" else (2, 2 * filters, 4 * filters)


def _block(block: str) -> nn.Module:
    stride, inputs, outputs = _block_shape(block)
    filters = (outputs // 4, outputs // 4, outputs)
    if block.startswith("IdentityBlock"):
        return IdentityBlock(inputs, filters)
    return ConvBlock(inputs, filters, stride=stride)


def _cudnn_fused(model: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The unfused ResNet-50 `model` by cuDNN's convolution + bias + ReLU and + add + ReLU."""
    model.eval()

    def folded(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Any, ...]:
        one = fuse_conv_bn_eval(conv, bn).to(dtype)
        assert one.bias is not None
        weight = one.weight.detach().contiguous(memory_format=torch.channels_last)
        return weight, one.bias.detach(), one.stride, one.padding

    def conv_relu(x: Tensor, layer: tuple[Any, ...]) -> Tensor:
        out: Tensor = aten.cudnn_convolution_relu(x, *layer, [1, 1], 1)
        return out

    stem, fc = folded(model.conv1, model.bn1), model.fc.to(dtype)
    blocks: list[Any] = [
        (
            *(folded(getattr(b, f"conv{i}"), getattr(b, f"bn{i}")) for i in (1, 2, 3)),
            None if b.downsample is None else folded(*b.downsample),
        )
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4)
        for b in stage
    ]

    def forward(x: Tensor) -> Tensor:
        h = F.max_pool2d(conv_relu(x, stem), 3, 2, 1)
        for first, second, (weight, *rest), down in blocks:
            shortcut = h if down is None else F.conv2d(h, *down)
            h = conv_relu(conv_relu(h, first), second)
            h = aten.cudnn_convolution_add_relu(h, weight, shortcut, 1.0, *rest, [1, 1], 1)
        out: Tensor = fc(h.mean((2, 3)))
        return out

    return forward


def _backends_of(way: Way, model: nn.Module, work: Workload) -> str:
    if way.model != "fusedres":
        return "torch"
    with _scope(way, work, work.training):
        return "+".join(sorted({row.backend for row in report(model)}))
