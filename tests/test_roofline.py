"""The byte model against the figures that the project plans with, and the layers against the
network.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fusedres
from fusedres.bench import roofline

BANDWIDTH, PEAK = 4.3e12, 790e12  # bytes/s and FLOP/s, measured on an H200
FIGURES = {  # MB and images a second
    "unfused": ("473", 8_189),
    "compiler": ("356", 10_544),
    "library": ("322", 11_505),
    "nvidia": ("273", 13_390),
    "fused_1x1": ("257", 14_190),
    "compact": ("253", 14_370),
    "masks": ("243", 14_875),
    "fused_3x3": ("240", 15_438),
    "fused_stem": ("236", 15_710),
    "ideal": ("225", 16_315),
    "merged": ("178", 18_738),
    "inference_compiler": ("92.9", 38_909),
    "inference": ("54.7", 60_277),
}
MB_OF_STAGES = {  # stem and stages 1 to 4
    "unfused": (31.9, 177.8, 138.3, 96.8, 27.7),
    "compiler": (24.3, 134.1, 103.6, 72.7, 20.7),
    "library": (13.1, 125.0, 96.3, 67.5, 19.2),
    "nvidia": (24.3, 100.7, 77.7, 54.1, 15.6),
    "ideal": (8.2, 87.0, 68.2, 47.4, 13.9),
    "merged": (8.2, 66.9, 53.6, 37.3, 11.0),
    "inference": (3.9, 20.1, 16.1, 11.2, 3.2),
}
LAYERS = roofline.layers()


def test_the_figures_are_of_every_dataflow_in_order() -> None:
    assert list(FIGURES) == list(roofline.DATAFLOWS)
    assert all(flow.name == name for name, flow in roofline.DATAFLOWS.items())


@pytest.mark.parametrize("name", FIGURES)
def test_megabytes_and_speed(name: str) -> None:
    megabytes, speed = FIGURES[name]
    decimals = len(megabytes.partition(".")[2])
    assert f"{roofline.megabytes(name):.{decimals}f}" == megabytes
    assert roofline.images_per_second(name, BANDWIDTH, PEAK) == pytest.approx(speed, abs=0.6)


@pytest.mark.parametrize("name", MB_OF_STAGES)
def test_megabytes_of_stages(name: str) -> None:
    stages = [size / 1e6 for size in roofline.by_stage(name).values()]
    assert stages[:5] == pytest.approx(MB_OF_STAGES[name], abs=0.055)  # rounded twice


@pytest.mark.parametrize("name", FIGURES)
def test_kernels_stages_and_arithmetic_add_up(name: str) -> None:
    found = roofline.kernels(name)
    assert all(kernel.stage in roofline.STAGES and kernel.bytes > 0 for kernel in found)
    total = sum(roofline.by_stage(name).values())
    assert sum(kernel.bytes for kernel in found) == total == roofline.megabytes(name) * 1e6
    flops = sum(kernel.flops for kernel in found if kernel.stage != "head")
    training = roofline.DATAFLOWS[name].training
    assert flops / 1e9 == pytest.approx(24.29 if training else 8.17, abs=0.005)


@pytest.mark.parametrize(
    ("name", "joins", "index"),
    [("inference", 0, 0), ("unfused", 0, 8), ("compiler", 0, 1), ("ideal", 16, 0)]
    + [("masks", 16, 0), ("fused_stem", 1, 0)],  # the last join has bits in every design
)
def test_bits_and_indices_are_as_large_for_wide_elements(name: str, joins: int, index: int) -> None:
    ends = [layer.output(1) for layer in LAYERS if layer.role == "conv3"]
    bits = sum(ends[len(ends) - joins :]) / 8
    indices = 2 * index * 56 * 56 * 64  # written and read
    twice, wide = 2 * roofline.megabytes(name), roofline.megabytes(name, itemsize=4)
    assert (twice - wide) * 1e6 == pytest.approx(bits + indices, abs=1)


def test_bytes_of_a_fused_layer() -> None:
    """One shape worked out by hand: 56x56, 256 -> 64 channels, the join before it inside."""
    wide, narrow = 56 * 56 * 256 * 2, 56 * 56 * 64 * 2
    flops = 2 * 56 * 56 * 256 * 64
    # Reads x and the residual, writes z and its own x.
    forward = wide + wide + wide + narrow
    # Reads gy and x, writes ga; for the join the shortcut's gradient, bits, and the x of conv3 and
    # of the first block's shortcut.
    dgrad = 2 * narrow + wide + wide + wide / 16 + 2 * wide
    found = roofline.kernels("ideal")
    start = [kernel.kind for kernel in found].index("forward & join")
    assert found[start : start + 3] == [
        ("stage 1", "forward & join", flops, forward),
        ("stage 1", "dgrad & join backward", flops, dgrad),
        ("stage 1", "wgrad", flops, 2 * narrow + wide),
    ]


def test_layers_of_the_network() -> None:
    assert len(LAYERS) == 53
    assert sum(layer.kernel == 1 for layer in LAYERS) == 36
    forward = sum(layer.flops for layer in LAYERS)
    assert forward / 1e9 == pytest.approx(8.17, abs=0.005)
    assert (3 * forward - LAYERS[0].flops) / 1e9 == pytest.approx(24.29, abs=0.005)
    assert sum(layer.output() for layer in LAYERS) / 1e6 == pytest.approx(22.2, abs=0.05)
    assert LAYERS[0].input(4) == 224 * 224 * 3 * 4


@pytest.mark.parametrize("image", [224, 97])
def test_layers_agree_with_the_modules(image: int) -> None:
    """Names, shapes and sizes, those of an odd image too; hooks have blocks run their modules."""
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def note(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        sizes[module] = (inputs[0].shape[-1], output.shape[-1])

    with torch.device("meta"):
        model = fusedres.FusedResNet50().eval()
        modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        for module in modules.values():
            module.register_forward_hook(note)
        model(torch.empty(1, 3, image, image))
    found = roofline.layers(image)
    assert list(sizes) == list(modules.values())
    assert [layer.name for layer in found] == list(modules)
    for layer in found:
        module = modules[layer.name]
        assert module.weight.numel() == layer.weights
        assert module.in_channels == layer.in_channels and module.out_channels == layer.out_channels
        assert module.kernel_size == (layer.kernel,) * 2 and module.stride == (layer.stride,) * 2
        assert sizes[module] == (layer.size, layer.out_size)
        path = layer.name.split(".")
        assert layer.stage == ("stem" if len(path) == 1 else path[0].replace("layer", "stage "))
        assert layer.role == ("stem" if len(path) == 1 else path[2])


def test_distinct_shapes() -> None:
    found = roofline.distinct(LAYERS)
    assert len(found) == 23 and sum(count for _, count in found) == 53
    counts = {layer.name: count for layer, count in found}
    # Of one shape with the first shortcut, and first in the role that three of the four have.
    assert counts["layer1.0.conv3"] == 4 and "layer1.0.downsample.0" not in counts
    assert counts["layer3.0.conv3"] == 6 and counts["layer3.0.downsample.0"] == 1


def test_a_strided_1x1_reads_a_quarter_of_its_input() -> None:
    shortcut = next(layer for layer in LAYERS if layer.name == "layer2.0.downsample.0")
    strided = next(layer for layer in LAYERS if layer.name == "layer2.0.conv2")
    assert shortcut.read() == shortcut.input() // 4 and strided.read() == strided.input()


def test_a_kernel_takes_the_longer_of_its_two_times() -> None:
    assert roofline.seconds(flops=6, bytes=8, bandwidth=2, peak=3) == 4
    assert roofline.seconds(flops=60, bytes=8, bandwidth=2, peak=3) == 20


@pytest.mark.parametrize("of", [roofline.kernels, roofline.megabytes, roofline.by_stage])
def test_unknown_dataflow(of: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"'fused', accepted: 'unfused', 'compiler'.*'inference'"):
        of("fused")


def test_images_too_small() -> None:
    with pytest.raises(ValueError, match="at least 32 pixels"):
        roofline.layers(16)
