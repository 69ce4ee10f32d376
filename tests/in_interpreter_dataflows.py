"""What dataflows move, launch by launch; test_triton.py runs it in a process of its own, with
TRITON_INTERPRET=1. Nothing is computed.
"""

from __future__ import annotations

import collections

import pytest
import torch
from torch import Tensor
from triton_launches import dry, model_step

import fusedres
from fusedres import use_plan
from fusedres._plans import DATAFLOWS
from fusedres._tensors import INTERPRETED
from fusedres.bench import roofline
from fusedres.triton_kernels._launch import Launch

assert INTERPRETED, "run by test_triton.py"
BATCH = 8
POINTWISE = ("conv_bn_fwd_kernel", "conv_bn_dgrad_kernel", "conv_bn_wgrad_kernel")


def moved(launch: Launch) -> float:
    """Bytes of the activations of a launch, each once; of a strided input the rows read."""
    v, total = launch.arguments(), 0.0
    for name, t in v.items():
        if name == "bits_ptr" and t is not None:
            total += t.numel()
        elif isinstance(t, Tensor) and t.dim() == 4 and name not in ("w_ptr", "dw_ptr"):
            sampled = launch.name in POINTWISE and name in ("x_ptr", "residual_ptr")
            share = v["OH"] * v["OW"] / (v["H"] * v["W"]) if sampled else 1.0
            total += t.numel() * t.itemsize * share
    return total


def stated(launch: Launch) -> float:
    """Bytes a launch moves by the formula at the head of its kernel."""
    v = launch.arguments()
    size = next(t for t in launch.args if isinstance(t, Tensor)).itemsize
    m, c, k = v.get("M", 0), v.get("C", 0), v.get("K", 0)
    strided = v.get("H", 1) * v.get("W", 1) / max(1, v.get("OH", 1) * v.get("OW", 1))
    residual = v.get("RESIDUAL", 0)
    if launch.name == "conv_bn_fwd_kernel":
        reads, writes = m * c * (1 + (residual > 0)), m * (k + c * v["EMIT"])
        writes += v["BITS"] * m * c / (8 * size)
    elif launch.name == "conv_bn_dgrad_kernel":
        reads = 2 * m * k + m * c * (
            v["GRAD_A"] / (v["GH"] * v["GW"])
            + v["NORM"] * (1 + (v["MASK"] == 1) + (residual == 2))
            + (v["MASK"] == 3) / (8 * size)
        )
        writes = m * k + m * strided * c
    elif launch.name == "conv_bn_wgrad_kernel":
        reads, writes = m * c * (1 + (residual > 0)) + m * k, 0
    elif launch.name == "bn_act_fwd_kernel":
        reads, writes = m * c * (1 + (residual > 0)), m * c
    elif launch.name == "bn_act_bwd_kernel":
        reads = m * c * (2 + v["EXTRA"] + (v["MASK"] == 1) + bool(residual))
        writes = m * c * v["WRITE"]
    elif launch.name == "batch_norm_stats_kernel":
        reads, writes = m * c, 0
    elif launch.name == "batch_norm_bwd_kernel":
        reads, writes = 2 * m * c, m * c
    elif launch.name == "bn_relu_maxpool_fwd_kernel":
        reads, writes = v["y_ptr"].numel(), m * c
    elif launch.name == "maxpool_winners_kernel":  # p, and a byte for each window
        reads, writes = v["y_ptr"].numel(), m * c * (1 + 1 / size)
    elif launch.name == "maxpool_winners_bwd_kernel":
        pooled = v["y_ptr"].size(0) * v["OH"] * v["OW"] * c
        reads, writes = m * c + pooled * (1 + 1 / size), m * c * v["DY"]
    elif launch.name == "bn_relu_maxpool_bwd_kernel":
        pooled = v["y_ptr"].size(0) * v["OH"] * v["OW"] * c
        reads, writes = v["y_ptr"].numel() + pooled, v["y_ptr"].numel()
    elif launch.name.startswith("add_relu"):
        reads, writes = 2 * v["numel"], v["numel"]
    else:
        assert launch.name in (
            "batch_norm_finish_kernel",
            "conv_bn_finish_kernel",
            "sum_rows_kernel",
        )
        return 0
    return (reads + writes) * size


def test_bytes_of_each_kernel_and_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """What launches are given is what the heads of the kernels state; a step is the sum of it."""
    batch = 8
    with dry() as launches:
        model_step(batch, 224)
        x = torch.empty(2, 8, 5, 5, dtype=torch.bfloat16, requires_grad=True)
        fusedres.add_relu(x, x).backward(x.detach())
    total: collections.Counter[str] = collections.Counter()
    for launch in launches:
        total[launch.name] += moved(launch)
        if formula := stated(launch):
            assert moved(launch) == pytest.approx(formula), (launch.name, launch.arguments())
    with capsys.disabled():
        print("\nMB an image of a bf16 training step at 224 pixels, by kernel:")
        for name, size in total.most_common():
            if size:
                print(f"  {size / batch / 1e6:6.1f}  {name}")
        print(f"  {sum(total.values()) / batch / 1e6:6.1f}  in all, without the library's")
    assert sum(total.values()) / batch < 250e6  # what a change may not undo


# the names that the byte model has too
COUNTED = [name for name in DATAFLOWS if name in roofline.DATAFLOWS]


@pytest.mark.parametrize("name", COUNTED)
def test_a_dataflow_moves_what_the_byte_model_says(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the byte, but for what the model leaves out by its own words."""
    library: list[float] = []
    with dry(library=library) as launches, use_plan(name):
        model_step(BATCH, 224)
    ours = sum(moved(launch) for launch in launches)
    image, *others = roofline.layers()
    end, pooled = others[-1].output(), others[0].input()
    head = 2 * end + end / 49  # read and averaged; its gradient written for every pixel
    # a fused stem reads its image from a copy with 4 channels and padding in place, made twice:
    # zeros, then the image over them
    padded = 230 * 232 * 4 * 2
    copies = 2 * (2 * image.input() + padded) if DATAFLOWS[name].stem == "fused" else 0
    counted = (ours + sum(library)) / BATCH + head + copies
    joins = [layer.output() for layer in others if layer.role == "conv3"]
    left_out = {
        "the second gradient of the pooled map": pooled,
        "the pool's winners, a byte each, written once and read twice": 3 * pooled / 2,
        "the last join's mask, which is read from its activation": end - end / 16,
        "the masks' writing": sum(joins[:-1]) / 16 if "masks" in DATAFLOWS[name].pointwise else 0,
        "the image's copies": copies + 2 * (padded - image.input()) if copies else 0,
    }
    model = roofline.megabytes(name) * 1e6
    with capsys.disabled():
        print(f"\nMB an image, {name}:")
        print(f"  {counted / 1e6:6.1f}  counted, {model / 1e6:.1f} by the model")
    assert counted == pytest.approx(model + sum(left_out.values()), abs=1)
