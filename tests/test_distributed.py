"""nn.SyncBatchNorm in fused blocks and models, DDP and FSDP2: in two processes
(in_two_processes.py), and what one process can show.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_blocks import BACKENDS, BLOCKS, assert_equal, plain, prepared, results
from torch import nn

from fusedres import ops, report, use_backend
from fusedres.nn.blocks import FusedModule
from fusedres.ops._sync import merge

TESTS = Path(__file__).resolve().parent
available = pytest.mark.skipif(not dist.is_available(), reason="torch has no torch.distributed")


SUITES = [
    "not triton",
    pytest.param("triton", marks=pytest.mark.slow),  # in its interpreter
]


@available
@pytest.mark.parametrize("select", SUITES)
def test_in_two_processes(select: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both run the same tests; one that fails leaves the other waiting, so the first failure ends
    them.
    """
    if select == "triton":
        pytest.importorskip("triton")
    command = [sys.executable, "-P", "-m", "pytest", str(TESTS / "in_two_processes.py"), "-qx"]
    command += ["-p", "no:cacheprovider", "-k", select]
    environment = os.environ | {"MEETING": str(tmp_path / "meeting"), "OMP_NUM_THREADS": "1"}
    environment["TRITON_INTERPRET"] = str(int(select == "triton"))
    running = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank)},
            stdout=(tmp_path / f"{rank}").open("w"),
            stderr=subprocess.STDOUT,
            cwd=TESTS,
        )
        for rank in range(2)
    ]
    codes = [process.wait() for process in running]
    found = [(tmp_path / f"{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], "\n".join(text[-6000:] for text in found)
    last = [text.strip().splitlines()[-1] for text in found]
    assert all(" passed" in line and "skipped" not in line for line in last), last
    with capsys.disabled():
        print(f"\n  each process: {last[0]}")


def test_many_rows_merge_to_the_last_place() -> None:
    """Of batches whose means are 1000 standard deviations, in fp32."""
    counts = [*torch.randint(1, 200, (61,)).tolist(), 0, 0, 0]
    batches = [1000 + torch.randn(n, 32) for n in counts]
    rows = torch.stack(
        [
            torch.cat((torch.full((1,), len(b)), b.double().mean(0), b.double().var(0, False)))
            if len(b)
            else torch.zeros(65)
            for b in batches
        ]
    )
    mean, var, total = merge(rows.float())
    truth = torch.cat(batches).double()
    assert total == len(truth)
    assert ((mean - truth.mean(0)).abs() <= 2**-14).all()  # the last place of 1000
    torch.testing.assert_close(var.double(), truth.var(0, False), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["identity", "conv", "basic, projected", "conv bn relu"])
@pytest.mark.parametrize("mode", ["train", "eval", "momentum=None"])
def test_alone_it_is_batch_norm(mode: str, name: str, backend: str) -> None:
    block = nn.SyncBatchNorm.convert_sync_batchnorm(prepared(name))
    if mode == "momentum=None":
        for module in block.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.momentum = None
    block.train(mode != "eval")
    x = torch.randn(3, 8, 9, 10, dtype=torch.float64)
    twin = plain(block)
    with use_backend(backend):
        assert {row.reason for row in report(block)} <= {"", "backend 'reference' was asked for"}
        for _ in range(2):
            block.zero_grad()
            twin.zero_grad()
            assert_equal(results(block, x), results(twin, x))


def test_every_block_takes_it() -> None:
    for name in BLOCKS:
        block = nn.SyncBatchNorm.convert_sync_batchnorm(BLOCKS[name]())
        fused = [m for m in block.modules() if isinstance(m, FusedModule)]
        assert not any(m.plain_reason() for m in fused), name
        assert not any(isinstance(m, nn.BatchNorm2d) for m in block.modules())
        assert {row.runs for row in report(block)} == {"fused"}


def test_alone_it_compiles_into_one_graph() -> None:
    block = nn.SyncBatchNorm.convert_sync_batchnorm(prepared("identity"))
    x = torch.randn(3, 8, 9, 10, dtype=torch.float64)
    compiled = copy.deepcopy(block)
    compiled.compile(backend="aot_eager", fullgraph=True)
    assert_equal(results(compiled, x), results(block, x))


@available
def test_errors_name_the_argument() -> None:
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 1, 1)
    for op in (ops.conv_bn, ops.conv_bn_relu_maxpool):
        for wrong in ("world", 2, dist.GroupMember.NON_GROUP_MEMBER):
            with pytest.raises(TypeError, match=r"sync must be a torch\.distributed\.Proc"):
                op(x, weight, sync=wrong)
