"""The cache of compiled kernels: when Triton's own look-up is left out, and when it may not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedres.triton_kernels import _launch

CUDA = torch.device("cuda", 0)


class Compiled:
    """What Triton returns of a launch: launched again by compiled[grid](*args)."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 3
        return lambda *args: self.launched.append((grid, args))


class Kernel:
    """Stands for a @triton.jit function; counts the times that it is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Compiled:
            self.asked.append(options)
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return run


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_compiled", {})


def run(kernel: Kernel, *args: Any, num_warps: int = 4, device: torch.device = CUDA) -> None:
    _launch._run(kernel, (2,), args, device, num_warps, 1)


def test_the_second_launch_goes_straight_to_the_compiled_kernel() -> None:
    kernel, x = Kernel(), torch.randn(8)
    run(kernel, x, 8, True)
    run(kernel, torch.randn(8), 8, True)  # another tensor of the same kind
    assert len(kernel.asked) == 1
    assert kernel.asked[0] == {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    ((grid, args),) = kernel.compiled[0].launched
    assert grid == (2, 1, 1) and args[1:] == (8, True)


@pytest.mark.parametrize(
    "changed",
    [
        (torch.randn(8).half(), 8, True),
        (torch.randn(9)[1:], 8, True),  # not aligned to 16 bytes
        (None, 8, True),
        (torch.randn(8), 9, True),
        (torch.randn(8), 8, False),
    ],
    ids=["dtype", "alignment", "none", "integer", "constant"],
)
def test_what_triton_specialises_on_is_asked_for_again(changed: tuple[Any, ...]) -> None:
    kernel = Kernel()
    run(kernel, torch.randn(8), 8, True)
    run(kernel, *changed)
    assert len(kernel.asked) == 2
    run(kernel, torch.randn(8), 8, True)
    assert len(kernel.asked) == 2 and len(kernel.compiled[0].launched) == 1


def test_warps_and_devices_have_kernels_of_their_own() -> None:
    kernel, x = Kernel(), torch.randn(8)
    run(kernel, x)
    run(kernel, x, num_warps=8)
    run(kernel, x, device=torch.device("cuda", 1))
    assert len(kernel.asked) == 3


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_MOST", 4)
    kernel = Kernel()
    for i in range(11):
        run(kernel, i)
    assert len(_launch._compiled) <= 4
    run(kernel, 10)
    assert len(kernel.asked) == 11


def test_an_empty_grid_and_a_recording_launch_nothing() -> None:
    kernel, x = Kernel(), torch.randn(8)
    _launch.launch(kernel, (0, 3), x)
    with _launch.recording(run=False) as launches:
        _launch.launch(kernel, (2,), x, 8, num_warps=2)
    assert not kernel.asked
    assert [(x.grid, x.args[1], x.num_warps) for x in launches] == [((2,), 8, 2)]
