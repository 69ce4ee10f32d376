"""What conv_act asks of torch and of its callers; test_triton.py runs it in a process of its own,
with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from in_interpreter_conv_act import GEMM, NONE, STEMS, SUM, Window, taking
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres._conv import Conv
from fusedres._tensors import INTERPRETED
from fusedres.testing import CHANNELS_LAST, Inputs, Maker
from fusedres.triton_kernels import _launch
from fusedres.triton_kernels.conv_act import conv_act, pack

assert INTERPRETED, "run by test_triton.py"


class Called(TorchDispatchMode):
    """Which operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [Window(), STEMS[2], replace(STEMS[2], frames=True)], ids=str)
def test_of_torch_an_inference_calls_nothing_but_empty(window: Window) -> None:
    """No copy, no fill, nothing that waits for the device: it may be captured."""
    t = window.inputs(Maker(torch.float32, CHANNELS_LAST))
    packed = pack(t["weight"], window.conv)
    with taking(3), _launch.recording(run=False) as launches, Called() as called:
        window.ours(t, packed=packed)
    assert called.names == {"aten::empty.memory_format"}
    assert [launch.name for launch in launches][-2:] == [GEMM, SUM]


def test_a_weight_in_channels_last_is_packed_already() -> None:
    conv, pointwise = Window().conv, Conv((1, 1), NONE, (1, 1), 1)
    last = torch.randn(8, 6, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    assert pack(last, conv).data_ptr() == last.data_ptr()
    plain = torch.randn(8, 6, 1, 1)
    assert pack(plain, pointwise).data_ptr() == plain.data_ptr()
    filled = pack(torch.ones(8, 3, 7, 7), STEMS[0].conv)
    assert filled.shape == (8, 7, 8, 4) and filled.sum() == 8 * 3 * 49
    assert not filled[:, :, 7:].any() and not filled[..., 3:].any()


@pytest.mark.parametrize("frames", [False, True])
def test_an_empty_batch_launches_nothing(frames: bool) -> None:
    for window in (Window(shape=(0, 5, 6, 7)), replace(STEMS[2], shape=(0, 3, 9, 9))):
        if frames and not window.of_image:
            continue
        window = replace(window, frames=frames)
        t = window.inputs(Maker(torch.float32, CHANNELS_LAST))
        with _launch.recording() as launches:
            y = window.ours(t)
        assert y.shape == window.plain(t).shape and y.numel() == 0 and not launches


Change = Callable[[Inputs, dict[str, Any]], None]


def _wrong() -> Iterator[tuple[str, Window, Change]]:
    """What is named, and how a call is made wrong."""

    def put(name: str, value: Callable[[Inputs], Any]) -> Change:
        return lambda t, more: t.__setitem__(name, value(t))

    def also(name: str, value: Any) -> Change:
        return lambda t, more: more.__setitem__(name, value)

    plain, stem, frames = Window(), STEMS[2], replace(STEMS[2], frames=True)
    yield "x must be", plain, put("x", lambda t: t["x"][0])
    yield "x must be", plain, put("x", lambda t: t["x"].int())
    yield "x must be", plain, put("x", lambda t: t["x"].contiguous())
    yield "x must be", plain, put("x", lambda t: None)
    yield "weight must be", plain, put("weight", lambda t: t["weight"][0])
    yield "weight must be", plain, put("weight", lambda t: t["weight"].double())
    yield "weight must be", plain, put("weight", lambda t: t["weight"][:, :4].contiguous())
    yield "weight must be", plain, put("weight", lambda t: None)
    yield "weight must be", frames, put("weight", lambda t: t["weight"].int())
    for name in ("scale", "bias"):
        yield f"{name} must be", plain, put(name, lambda t, n=name: t[n][:3])
        yield f"{name} must be", plain, put(name, lambda t, n=name: t[n].half())
        yield f"{name} must be", plain, put(name, lambda t, n=name: t[n].repeat_interleave(2)[::2])
    yield "residual must be", plain, put("residual", lambda t: t["residual"][:1])
    yield "residual must be", plain, put("residual", lambda t: t["residual"].contiguous())
    yield "residual must be", plain, put("residual", lambda t: t["residual"].half())
    yield "does not fit", replace(plain, padding=NONE), put("x", lambda t: t["x"][:1, :, :2])
    yield "uint8 x needs", plain, put("x", lambda t: torch.zeros(2, 6, 7, 5, dtype=torch.uint8))
    yield "uint8 x must be", frames, put("x", lambda t: t["x"][0])
    yield "uint8 x must be", frames, put("x", lambda t: t["x"].permute(0, 2, 1, 3))
    yield "weight must be", frames, put("x", lambda t: t["x"][..., :2].contiguous())
    yield "normalize is", frames, put("times", lambda t: t["times"][:2])
    yield "normalize is", frames, put("plus", lambda t: t["plus"].half())
    yield "normalize is", frames, put("plus", lambda t: 1.0)
    yield "normalize is", stem, also("normalize", (torch.ones(3), torch.zeros(3)))
    yield "packed must be", plain, also("packed", torch.empty(7, 5, 3, 3))
    yield "packed must be", stem, also("packed", torch.empty(9, 3, 7, 7))
    yield "packed must be", stem, also("packed", torch.empty(9, 7, 8, 4).half())


@pytest.mark.parametrize(("named", "window", "change"), list(_wrong()))
def test_a_wrong_argument_is_named(named: str, window: Window, change: Change) -> None:
    t, more = window.inputs(Maker(torch.float32, CHANNELS_LAST)), dict[str, Any]()
    change(t, more)
    normalize = (t["times"], t["plus"]) if window.frames else None
    own = (t["scale"], t["bias"], t["residual"], window.relu)
    with _launch.recording() as launches, pytest.raises(ValueError, match=f"conv_act: .*{named}"):
        conv_act(t["x"], t["weight"], window.conv, *own, **({"normalize": normalize} | more))
    assert not launches
