"""What a ResNet-50 has to move and compute, per image, under different ways of fusing it.

A dataflow is a list of kernels, each of which reads and writes whole activations, and nothing
stays in a cache from one kernel to the next. Weights and what has the size of a channel are left
out: a batch shares them. A kernel takes the longer of the time for its bytes and that for its
arithmetic, an image the sum over the kernels: a bound, but for what a cache may save after all.

In the scripts below "apply backward: gy x -> gx" is a kernel that reads the gradient of y and x,
and writes the gradient of x. Those named forward, dgrad and wgrad convolve; all others only move
data. "& join: .." is what a kernel does on the side, for the join before its layer. The tensors:

- a convolution turns a, of which a strided 1x1 reads only a_read, into x, BatchNorm turns x into
  h and ReLU h into y; gy is the gradient of y, and so on. x_before is the x that a was made from.
- a join computes z = relu(h + s), where s is the block's input or, before its BatchNorm, what the
  shortcut's convolution made of it; d is that same s, but nothing where the block's input is. ga
  and gs are the gradients of z from the next block's conv1 and shortcut, of which a strided
  shortcut needs gs_read; gz is the gradient of h + s. bits says where z is positive.
- in the stem, p is y after the pooling and index, 1 or 8 bytes each, what the pooling chose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import NamedTuple

STAGES = ("stem", "stage 1", "stage 2", "stage 3", "stage 4", "head")


class Layer(NamedTuple):
    """A convolution of the network, with the BatchNorm behind it."""

    stage: str  # "stem", "stage 1" to "stage 4"
    name: str  # torchvision's path of the convolution: "layer1.0.downsample.0"
    role: str  # "stem", "conv1", "conv2", "conv3" or "downsample"
    size: int  # of the input, height = width
    in_channels: int
    out_channels: int
    kernel: int
    stride: int

    @property
    def out_size(self) -> int:
        """Height = width of the output; the padding is kernel // 2."""
        return -(-self.size // self.stride)

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.out_channels * self.in_channels * self.kernel**2

    @property
    def flops(self) -> int:
        """Of the forward pass, per image: two for a multiply-add. dgrad and wgrad take as many."""
        return 2 * self.weights * self.out_size**2

    def input(self, itemsize: int = 2) -> int:
        """Bytes of the input of one image."""
        return self.size**2 * self.in_channels * itemsize

    def output(self, itemsize: int = 2) -> int:
        """Bytes of the output of one image."""
        return self.out_size**2 * self.out_channels * itemsize

    def read(self, itemsize: int = 2) -> int:
        """Bytes of the input that count: a 1x1 of stride 2 touches one pixel in four."""
        return (self.out_size if self.kernel == 1 else self.size) ** 2 * self.in_channels * itemsize


class Kernel(NamedTuple):
    """One launch, per image."""

    stage: str  # of STAGES
    kind: str  # what it does: "dgrad", "statistics", ..
    flops: float  # of its convolution; pointwise arithmetic and reductions count as none
    bytes: float  # read and written


@dataclass(frozen=True)
class Dataflow:
    """A way of dividing the network into kernels.

    Attributes:
        title: one line for a table.
        training: forward and backward pass, without the optimizer; else inference.
        script: kernels by where they belong: "stem", "conv1", "conv2", "conv3", "downsample",
            "join", "last join" or "head".
    """

    name: str
    title: str
    training: bool
    script: Mapping[str, str]


def layers(image: int = 224) -> tuple[Layer, ...]:
    """The 53 convolutions of ResNet-50 v1.5 in order of execution, shortcuts last in their block,
    for images of image x image pixels, at least 32.
    """
    if image < 32:
        raise ValueError(f"layers: image must be at least 32 pixels wide, got {image}")
    found = [Layer("stem", "conv1", "stem", image, 3, 64, 7, 2)]
    size, channels = -(-found[0].out_size // 2), 64  # behind the max-pooling
    for i, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for b in range(blocks):
            stride = 2 if b == 0 and i > 1 else 1
            stage, block = f"stage {i}", f"layer{i}.{b}"
            out, wide = -(-size // stride), 4 * width
            found += [
                Layer(stage, f"{block}.conv1", "conv1", size, channels, width, 1, 1),
                Layer(stage, f"{block}.conv2", "conv2", size, width, width, 3, stride),
                Layer(stage, f"{block}.conv3", "conv3", out, width, wide, 1, 1),
            ]
            if b == 0:
                name = f"{block}.downsample.0"
                found.append(Layer(stage, name, "downsample", size, channels, wide, 1, stride))
            size, channels = out, wide
    return tuple(found)


def distinct(of: Sequence[Layer]) -> tuple[tuple[Layer, int], ...]:
    """The shapes among the layers, in order of appearance, and how many layers have each.

    A shape is (size, in_channels, out_channels, kernel, stride); the first layer of the role that
    most of them play stands for all of them.
    """
    shapes: dict[tuple[object, ...], list[Layer]] = {}
    for layer in of:
        shapes.setdefault(layer[3:], []).append(layer)
    found = []
    for alike in shapes.values():
        role, _ = Counter(layer.role for layer in alike).most_common(1)[0]
        found.append((next(layer for layer in alike if layer.role == role), len(alike)))
    return tuple(found)


def kernels(dataflow: str, image: int = 224, itemsize: int = 2) -> list[Kernel]:
    """The launches of a dataflow, a key of DATAFLOWS, for one image of image x image pixels; layer
    by layer, forward and backward. itemsize is the bytes per element of every activation.
    """
    found = []
    for parts in _launches(dataflow, image, itemsize):
        _, kinds, flops, bytes = zip(*parts, strict=True)
        found.append(Kernel(parts[0].stage, " & ".join(kinds), sum(flops), sum(bytes)))
    return found


def megabytes(dataflow: str, image: int = 224, itemsize: int = 2) -> float:
    """What a dataflow reads and writes per image, in units of 1e6 bytes."""
    return sum(kernel.bytes for kernel in kernels(dataflow, image, itemsize)) / 1e6


def by_stage(dataflow: str, image: int = 224, itemsize: int = 2) -> dict[str, float]:
    """What a dataflow reads and writes per image, in bytes, for each of STAGES. A join counts to
    that of its block, even where a kernel of the next stage does it.
    """
    found = dict.fromkeys(STAGES, 0.0)
    for parts in _launches(dataflow, image, itemsize):
        for part in parts:
            found[part.stage] += part.bytes
    return found


def images_per_second(
    dataflow: str, bandwidth: float, peak: float, image: int = 224, itemsize: int = 2
) -> float:
    """The bound on a dataflow's speed by bandwidth [bytes/s] and peak arithmetic [FLOP/s]."""
    launched = kernels(dataflow, image, itemsize)
    return 1 / sum(seconds(kernel.flops, kernel.bytes, bandwidth, peak) for kernel in launched)


def seconds(flops: float, bytes: float, bandwidth: float, peak: float) -> float:
    """The least time of a kernel: for its bytes [by bytes/s] or its arithmetic [by FLOP/s]."""
    return max(bytes / bandwidth, flops / peak)


def markdown(names: Sequence[str]) -> str:
    """A table of dataflows for a page: what each moves, and what that is less than the first."""
    first = megabytes(names[0])
    head = ["| plan | what it is | MB an image | less |", "|---|---|---:|---:|"]
    rows = [
        f"| `{n}` | {DATAFLOWS[n].title} | {megabytes(n):.1f} | {first - megabytes(n):.1f} |"
        for n in names
    ]
    return "\n".join([*head, *rows])


class _Place:
    """Where a script's names have a meaning: sizes [bytes] by the tensors that share one."""

    def __init__(self, stage: str, flops: float, sizes: Mapping[str, float]) -> None:
        self.stage, self.flops = stage, flops
        self.sizes = {name: float(size) for names, size in sizes.items() for name in names.split()}

    def kernel(self, line: str) -> Kernel:
        kind, passes = line.split(":")
        moved = sum(self.sizes[name] for name in passes.replace("->", " ").split())
        times = sum(kind.split().count(word) for word in ("forward", "dgrad", "wgrad"))
        return Kernel(self.stage, kind.strip(), times * self.flops, moved)


def _stem(net: tuple[Layer, ...], e: int) -> _Place:
    conv, pooled = net[:2]
    sizes = {"image": conv.input(e), "x h y gx gh gy": conv.output(e), "p gp": pooled.input(e)}
    index = {"index1": pooled.input(1), "index8": pooled.input(8)}
    return _Place("stem", conv.flops, sizes | index)


def _conv(layer: Layer, e: int) -> _Place:
    sizes = {"a ga x_before": layer.input(e), "a_read ga_read": layer.read(e)}
    return _Place(layer.stage, layer.flops, sizes | {"x h y s z gx gh gy": layer.output(e)})


def _join(block: tuple[Layer, ...], following: tuple[Layer, ...] | None, e: int) -> _Place:
    """A block has three convolutions, or four: the shortcut's is the last."""
    z, bits = block[2].output(e), block[2].output(1) / 8
    gs_read = following[3].read(e) if following and len(following) == 4 else z
    sizes = {"x h s z ga gs gz": z, "d": z * (len(block) == 4), "gs_read": gs_read, "bits": bits}
    return _Place(block[0].stage, 0, sizes)


def _launches(dataflow: str, image: int, e: int) -> Iterator[tuple[Kernel, ...]]:
    """Each as its parts: what it is there for, and then the join that it does on the side."""
    if dataflow not in DATAFLOWS:
        accepted = ", ".join(map(repr, DATAFLOWS))
        raise ValueError(f"unknown dataflow {dataflow!r}, accepted: {accepted}")
    script, net = DATAFLOWS[dataflow].script, layers(image)
    paths = groupby(net[1:], key=lambda layer: layer.name.split(".")[:2])
    blocks = [tuple(block) for _, block in paths]
    before = None  # the stem's pooling is no join
    yield from _written(script["stem"], _stem(net, e))
    for block, following in zip_longest(blocks, blocks[1:]):
        for layer in block:
            yield from _written(script[layer.role], _conv(layer, e), before)
        before = _join(block, following, e)
        yield from _written(script["join" if following else "last join"], before)
    end, channels = net[-1].output(e), net[-1].out_channels
    head = _Place("head", 2 * channels * 1000, {"z gz": end, "mean": channels * e})
    yield from _written(script["head"], head)


def _written(script: str, at: _Place, before: _Place | None = None) -> Iterator[tuple[Kernel, ...]]:
    for line in filter(str.strip, script.split(";")):
        own, *joins = line.split("&")
        yield (at.kernel(own), *(before.kernel(join) for join in joins if before))


def _script(stem: str, conv: str, joined: str, join: str) -> dict[str, str]:
    """conv: of conv1 and conv2, which a ReLU follows; joined: of conv3 and downsample."""
    convs = {"conv1": conv, "conv2": conv, "conv3": joined, "downsample": joined}
    return {"stem": stem, **convs, "join": join, "last join": join, "head": _HEAD}


def _design(stem: str, mask: str, conv2: str = "", compact: bool = False) -> dict[str, str]:
    """Light work in prologues and epilogues: backward kernels make gx of gy and x, dgrad masks ga
    and reduces it for the BatchNorm before, conv1 does the join before, whose x it reads anyway.

    mask tells the sign of z: itself, or "bits", whose writing is not counted. conv2 may have a
    script of its own. compact: no gradient for the pixels that a strided shortcut does not read.
    """
    gs, ga = ("gs_read", "ga_read") if compact else ("gs", "ga")
    wgrad = "wgrad: gy x a_read ->"
    inner = f"forward: a_read -> x; dgrad: gy x x_before -> ga; {wgrad}"
    conv1 = f"""forward: a_read -> x & join: s -> z;
        dgrad: gy x -> ga & join backward: {gs} {mask} x d ->; {wgrad}"""
    shortcut = f"forward: a_read -> x; dgrad: gy x -> {ga}; {wgrad}"
    convs = {"conv1": conv1, "conv2": conv2 or inner, "conv3": inner, "downsample": shortcut}
    return {"stem": stem, **convs, "join": "", "last join": _LAST_JOIN, "head": _HEAD}


# Backward, the gradient of z is written once and, by the last join, read once. Of the stem's p two
# gradients come back, but one is counted as read.
_HEAD = "forward: z -> mean; dgrad and wgrad: gz -> gz"
_LIBRARY_BACKWARD = "dgrad: gx -> ga; wgrad: gx a_read ->;"
_SPLIT_BACKWARD = f"apply backward: gy x -> gx; {_LIBRARY_BACKWARD}"
_COMPILER_STEM = """forward: image -> x; statistics: x ->; apply: x -> y; pool: y -> p index1;
    pool backward: gp index1 -> gy; reduce backward: gy y x ->; apply backward: gy y x -> gx;
    wgrad: gx image ->"""
_SPLIT_STEM = """forward: image -> x; statistics: x ->; apply and pool: x -> p;
    reduce backward: x gp ->; apply backward: x gp -> gx; wgrad: gx image ->"""
_FUSED_STEM = """forward: image -> x; apply and pool: x -> p;
    reduce backward: x gp ->; wgrad: x gp image ->"""

# BatchNorm reads its operands twice; the two gradients of a block's input are added by themselves.
_BOTH_NORMS = "forward: a_read -> x; batch norm: x x -> h; batch norm backward: gh x gh x -> gx;"
_UNFUSED = _script(
    stem="""forward: image -> x; batch norm: x x -> h; relu: h -> y; pool: y -> p index8;
        pool backward: gp index8 -> gy; relu backward: gy y -> gh;
        batch norm backward: gh x gh x -> gx; wgrad: gx image ->""",
    conv=f"{_BOTH_NORMS} relu: h -> y; relu backward: gy y -> gh; {_LIBRARY_BACKWARD}",
    joined=f"{_BOTH_NORMS} {_LIBRARY_BACKWARD}",
    join="add: h s -> h; relu: h -> z; relu backward: gz z -> gz",
)
_UNFUSED["conv1"] += "add backward: ga ga -> ga"

# Here and in the next, join backward reduces for conv3's BatchNorm. That the shortcut's needs s for
# the same is left out; but the last z has one gradient, and two are counted.
_JOINED = f"forward: a_read -> x; statistics: x ->; {_SPLIT_BACKWARD}"
_COMPILER = _script(
    _COMPILER_STEM,
    conv=f"""forward: a_read -> x; statistics: x ->; apply: x -> y;
        reduce backward: gy y x ->; apply backward: gy y x -> gx; {_LIBRARY_BACKWARD}""",
    joined=_JOINED,
    join="join: x s -> z; join backward: ga gs z x -> gz",
)
# The sign of y is found from x again, that of z is kept in bits.
_LIBRARY = _script(
    _SPLIT_STEM,
    conv=f"{_JOINED} apply: x -> y; reduce backward: gy x ->",
    joined=_JOINED,
    join="join: x s -> z bits; join backward: ga gs bits x -> gz",
)

# Statistics and reductions in epilogues, the forward apply in prologues. The join backward is in
# the epilogue of the next conv1's dgrad, which has its ga at hand, but counted by itself.
_LAST_JOIN = "join: x s -> z; join backward: bits x -> gz"
_OUTER = f"forward: a_read -> x; {_SPLIT_BACKWARD}"
_INNER = _OUTER.replace("gx -> ga", "gx x_before -> ga")
_NVIDIA = _script(_COMPILER_STEM, _OUTER, _OUTER, "join: x s -> z; join backward: gs bits x d ->")
_NVIDIA |= {"conv2": _INNER, "conv3": _INNER, "last join": _LAST_JOIN}

# A library convolution among fused ones: its input is made for it, its light work done after it.
_SPLIT_CONV2 = f"""apply: x_before -> a; forward: a -> x; statistics: x ->;
    {_SPLIT_BACKWARD} reduce backward: ga x_before ->"""

# One kernel for dgrad and wgrad reads its operands once, also x_before, which a is made from. The
# joins inside the kernels of conv1 are counted by themselves.
_BOTH = "forward: a_read -> x; dgrad and wgrad: gy x a_read -> ga"
_MERGED = _script(_FUSED_STEM, _BOTH, _BOTH, "join: s -> z; join backward: gs bits x d ->")
_MERGED["last join"] = _LAST_JOIN

# Light work in passes of its own, the pooling in another; the head is left out.
_CONV, _APPLY, _POOL = "forward: a_read -> x", "apply: x -> y", "pool: y -> p"
_COMPILER_INFERENCE = _script(
    f"forward: image -> x; {_APPLY}; {_POOL}", f"{_CONV}; {_APPLY}", _CONV, "join: x s -> z"
)
_COMPILER_INFERENCE["head"] = ""
_INFERENCE = _script(f"forward: image -> y; {_POOL}", _CONV, _CONV, "")
_INFERENCE |= {"conv3": "forward: a_read s -> z", "head": "forward: z -> mean"}

_TITLED = (
    ("unfused", "unfused, every module a kernel", _UNFUSED),
    ("compiler", "as a compiler fuses it, convolutions separate", _COMPILER),
    ("library", "library convolutions, best BatchNorm kernels", _LIBRARY),
    ("nvidia", "NVIDIA's: statistics and forward apply fused", _NVIDIA),
    ("fused_1x1", "1x1 fused, 3x3 and stem split", _design(_SPLIT_STEM, "z", _SPLIT_CONV2)),
    ("compact", ".. + compact gradients", _design(_SPLIT_STEM, "z", _SPLIT_CONV2, compact=True)),
    ("masks", ".. + 1-bit masks", _design(_SPLIT_STEM, "bits", _SPLIT_CONV2, compact=True)),
    ("fused_3x3", "1x1 and 3x3 fused, stem split", _design(_SPLIT_STEM, "z")),
    ("fused_stem", "everything fused", _design(_FUSED_STEM, "z")),
    ("ideal", "everything fused, 1-bit masks", _design(_FUSED_STEM, "bits")),
    ("merged", ".. + one kernel for dgrad and wgrad", _MERGED),
    ("inference_compiler", "inference, as a compiler fuses it", _COMPILER_INFERENCE),
    ("inference", "inference, everything fused", _INFERENCE),
)
DATAFLOWS: dict[str, Dataflow] = {
    name: Dataflow(name, title, not name.startswith("inference"), script)
    for name, title, script in _TITLED
}
