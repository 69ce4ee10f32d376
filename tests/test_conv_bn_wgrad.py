"""The weight gradient with its prologue on the CPU, against the library's in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fusedres import native
from fusedres._conv import Conv, Source, output_shape
from fusedres.native.conv_bn import conv_bn_wgrad, serves_wgrad
from fusedres.reference.bn_act import bn_act

pytestmark = pytest.mark.skipif(native.load() is None, reason="the extension is not built")
LEVELS = [] if native.load() is None else native.require().cpu_levels()[1:]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # of x
    filters: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        x = "x".join(map(str, self.shape))
        return f"{x}-{self.filters}-{self.kernel}-{self.stride}-{self.padding}-{self.dilation}"


# One pixel; an odd number of pixels, of which two share a word in bf16; more than a depth and more
# than a slice of them; filters off the width of a vector and of a block; channels in several
# blocks; kernels with zeros on one side, on both, wider than the input; strides and dilations that
# differ.
CASES = [
    Case((1, 32, 1, 1), 8),
    Case((3, 64, 5, 7), 24),
    Case((2, 32, 33, 35), 136),
    Case((5, 32, 21, 23), 8),
    Case((2, 1056, 3, 3), 40),
    Case((2, 64, 9, 11), 16, stride=(2, 2)),
    Case((2, 64, 9, 11), 16, stride=(1, 2)),
    Case((2, 32, 12, 10), 16, (3, 3), padding=(1, 1, 1, 1)),
    Case((2, 32, 12, 11), 16, (3, 3), (2, 2), (0, 1, 0, 1)),
    Case((3, 32, 7, 9), 8, (2, 3), (1, 2), (1, 0, 2, 1), (2, 1)),
    Case((2, 32, 2, 2), 8, (5, 5), padding=(2, 2, 2, 2)),
    Case((40, 32, 14, 14), 8, (3, 3), padding=(1, 1, 1, 1)),
]


def source_of(x: Tensor, prologue: str) -> Source:
    if prologue == "plain":
        return Source.plain(x)
    channels = x.size(1)
    mean, bias = torch.randn(channels), torch.randn(channels)
    scale = torch.randn(channels)
    return Source(x, mean, scale, bias, None, None, None, None, prologue == "relu")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    extension = native.require()
    best = extension.cpu_level()
    extension.set_cpu_level(request.param)
    yield request.param
    extension.set_cpu_level(best)


@pytest.mark.parametrize("prologue", ["plain", "relu", "affine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_wgrad(level: str, case: Case, dtype: torch.dtype, prologue: str) -> None:
    torch.manual_seed(0)
    channels = case.shape[1]
    conv = Conv(case.stride, case.padding, case.dilation, 1)
    x = torch.randn(case.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    source = source_of(x, prologue)
    out = output_shape(x.shape, torch.Size((case.filters, channels, *case.kernel)), conv)
    dy = torch.randn(out).to(dtype).contiguous(memory_format=torch.channels_last)
    a = bn_act(*source) if prologue != "plain" else x  # rounded as the kernel rounds it
    top, bottom, left, right = case.padding
    padded = torch.nn.functional.pad(a.double(), (left, right, top, bottom))
    weight = torch.empty(case.filters, channels, *case.kernel)
    truth = torch.nn.grad.conv2d_weight(
        padded, weight.shape, dy.double(), case.stride, 0, case.dilation
    )
    for memory_format in (torch.channels_last, torch.contiguous_format):
        parameter = weight.contiguous(memory_format=memory_format)
        assert serves_wgrad(source, parameter, conv)
        dw = conv_bn_wgrad(dy, source, parameter, conv)
        assert dw.dtype == torch.float32
        assert dw.stride() == parameter.stride()
        # a may be rounded the other way where (x - mean)*scale + bias is fused
        tolerance = 3e-4 if dtype == torch.bfloat16 and prologue != "plain" else 3e-6
        assert (dw.double() - truth).norm() <= tolerance * truth.norm().clamp_min(1e-30)


def test_bits_do_not_depend_on_the_thread_count() -> None:
    case = CASES[2]
    x = torch.randn(case.shape).contiguous(memory_format=torch.channels_last)
    dy = torch.randn(2, case.filters, 33, 35).contiguous(memory_format=torch.channels_last)
    parameter = torch.empty(case.filters, 32, 1, 1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            conv = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)
            found.append(conv_bn_wgrad(dy, Source.plain(x), parameter, conv))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_nan_and_infinity_reach_the_weights_they_meet() -> None:
    conv = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)
    x = torch.randn(2, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    x[0, 3, 1, 1] = float("nan")
    dy = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    dw = conv_bn_wgrad(dy, Source.plain(x), torch.empty(8, 32, 1, 1), conv)
    assert dw[:, 3].isnan().all()
    assert dw[:, torch.arange(32) != 3].isfinite().all()


@pytest.mark.parametrize(
    "change", ["dtype", "format", "channels", "filters", "groups", "residual", "dy", "rank"]
)
def test_what_it_does_not_serve_is_refused(change: str) -> None:
    conv = Conv((1, 1), (0, 0, 0, 0), (1, 1), 2 if change == "groups" else 1)
    dtype = torch.float64 if change == "dtype" else torch.float32
    layout = torch.contiguous_format if change == "format" else torch.channels_last
    channels, filters = 24 if change == "channels" else 32, 12 if change == "filters" else 8
    x = torch.randn(2, channels, 4, 4, dtype=dtype).contiguous(memory_format=layout)
    dy = torch.randn(2, filters, 4, 4, dtype=dtype).contiguous(memory_format=layout)
    source = Source.plain(x)
    if change == "residual":
        vector = torch.ones(channels)
        source = Source(x, vector, vector, vector, x, None, None, None, True)
    if change == "dy":
        dy = dy[:, :, :3]
    weight = torch.empty(filters, channels, 1, 1)
    weight = weight[0] if change == "rank" else weight
    with pytest.raises(ValueError, match="conv_bn_wgrad"):
        conv_bn_wgrad(dy, source, weight, conv)
