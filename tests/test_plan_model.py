"""Plans by reasoning: the entries that are shipped are the model's, and the model is plausible."""

from __future__ import annotations

import json
from importlib import resources
from itertools import pairwise
from typing import Any

import pytest

from fusedres import _plan_table
from fusedres.bench import plan_model
from fusedres.bench.plan_model import (
    DEVICES,
    Device,
    entries_by_model,
    fused,
    likely_plan,
    seconds_of,
    split,
    with_model,
)
from fusedres.bench.roofline import layers

H200 = "NVIDIA H200"
LAYERS = {layer.name: layer for layer in layers()}


def text() -> str:
    return resources.files("fusedres").joinpath(_plan_table.PATH).read_text()


def test_the_shipped_entries_are_the_models_to_the_byte() -> None:
    """`fusedres tune --model --out fusedres/plan_table.json` writes them anew."""
    assert _plan_table.text_of(with_model(json.loads(text())["entries"])) == text()


def test_every_layer_of_every_device_has_its_entries() -> None:
    modelled = [e for e in _plan_table.shipped_entries() if _plan_table.is_modelled(e)]
    for device in DEVICES:
        for dtype in ("bfloat16", "float16"):
            own = [e for e in modelled if (e["device"], e["dtype"]) == (device, dtype)]
            by_conv: dict[Any, list[list[int | None]]] = {}
            for entry in own:
                conv = tuple(str(entry[name]) for name in ("in_channels", "out_channels", "kernel"))
                by_conv.setdefault((*conv, str(entry["stride"])), []).append(entry["rows"])
            assert len(by_conv) == 23
            for spans in by_conv.values():  # all sizes, each once
                assert spans[0][0] == 0 and spans[-1][1] is None
                for (_, most), (least, _) in pairwise(spans):
                    assert most is not None and least == most + 1
            assert len({json.dumps(e) for e in own}) == len(own)


def test_where_nothing_is_known_layers_stay_split() -> None:
    for device in DEVICES:
        found = [e for e in entries_by_model(device) if e["kernel"] != [1, 1]]
        assert len(found) == 2 * 8 and {e["plan"] for e in found} == {"split"}


@pytest.mark.parametrize("device", DEVICES)
def test_large_maps_are_fused(device: str) -> None:
    """Where memory is what counts, the plan that moves less is the faster one."""
    for name in ("layer1.0.conv1", "layer1.0.conv3", "layer1.1.conv1", "layer2.1.conv1"):
        assert likely_plan(LAYERS[name], 256, device) == "fused", name


def test_bytes_of_a_fused_layer_in_the_middle() -> None:
    """56x56, 64 -> 256: reads x, writes y; reads g, y and x, writes g of x and dy; dy and x."""
    layer, batch = LAYERS["layer1.1.conv3"], 8
    narrow, wide = batch * 56 * 56 * 64 * 2, batch * 56 * 56 * 256 * 2
    moved = [kernel.moved + kernel.near for kernel in fused(layer, batch)]
    forward, dgrad, wgrad = (size for size in moved if size)
    assert forward == narrow + wide
    assert dgrad == 2 * wide + 2 * narrow + wide
    assert wgrad == wide + narrow
    # apart: the activation, the convolution, statistics; dy, dgrad, the activation, wgrad, sums
    parts = [kernel.moved + kernel.near for kernel in split(layer, batch)]
    assert sum(parts) == (2 * narrow) + (narrow + wide) + wide + (3 * wide) + (wide + narrow) + (
        2 * narrow
    ) + (wide + narrow) + (2 * narrow)
    assert sum(k.flops for k in split(layer, batch)) == sum(k.flops for k in fused(layer, batch))
    assert sum(k.flops for k in fused(layer, batch)) == 3 * batch * layer.flops


def test_a_joining_layer_moves_its_residual_in_both_plans() -> None:
    layer = LAYERS["layer1.1.conv1"]
    wide, narrow = (56 * 56 * channels * 2 for channels in (256, 64))
    forward, _, dgrad, *_ = fused(layer, 1)
    assert forward.moved == 3 * wide + narrow  # x, residual, a; y
    # g, y; x, a and the shortcut's gradient; what leaves, and dy
    assert dgrad.moved == 2 * narrow + 3 * wide + wide + narrow
    assert split(layer, 1)[0].moved == 3 * wide and split(layer, 1)[-2].moved == 5 * wide


def test_what_the_assumptions_do() -> None:
    layer = LAYERS["layer1.1.conv3"]
    device = DEVICES[H200]
    narrow = device._replace(bandwidth=device.bandwidth / 100)
    assert seconds_of("split", layer, 256, narrow) > seconds_of("fused", layer, 256, narrow)
    # arithmetic alone: Triton's lower rate decides
    slow = Device(1e18, device.peak, device.cache, device.multiprocessors)
    late = LAYERS["layer4.0.downsample.0"]
    assert seconds_of("fused", late, 256, slow) > seconds_of("split", late, 256, slow)
    # a cache that holds what the kernel before wrote helps
    large = device._replace(cache=1e12)
    assert seconds_of("split", layer, 256, large) < seconds_of("split", layer, 256, device)
    # tiles that leave multiprocessors idle
    wide = device._replace(multiprocessors=10_000)
    assert seconds_of("fused", late, 1, wide) > seconds_of("fused", late, 1, device)
    assert seconds_of("split", late, 1, wide) == seconds_of("split", late, 1, device)


def test_small_tensors_cost_launches() -> None:
    layer = LAYERS["layer1.0.conv1"]
    kernels = len(fused(layer, 1))
    assert seconds_of("fused", layer, 1, DEVICES["NVIDIA B200"]) > kernels * plan_model.LAUNCH


def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device: got 'NVIDIA T4', accepted: 'NVIDIA H200'"):
        entries_by_model("NVIDIA T4")
