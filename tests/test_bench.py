"""The timing harness under a clock that its providers move; the networks it times agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fusedres
from fusedres.bench import (
    PROVIDERS,
    Provider,
    Workload,
    compare,
    inference,
    timer_for,
    training_step,
)

SMALL = Workload(batch=4, size=32, dtype=torch.float64, num_classes=10)


class Clock:
    """Stands still but for what providers add to it, and keeps the order in which they ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def provider(self, name: str, *durations: float) -> Callable[[], None]:
        """Takes the durations in turn, in seconds."""
        left = list(durations)

        def run() -> None:
            self.ran.append(name)
            self.now += left.pop(0)

        return run


def test_every_round_runs_each_provider_once_in_rotating_order() -> None:
    clock = Clock()
    providers = {name: clock.provider(name, *[1.0] * 4) for name in "abc"}
    compare(providers, rounds=3, warmup=1, timer=clock)
    assert "".join(clock.ran) == "abcbcacababc"


def test_medians_percentiles_and_ratios_leave_the_warm_up_out() -> None:
    clock = Clock()
    result = compare(
        {
            "slow": clock.provider("slow", 100, 2, 4, 6, 8, 10, 12),
            "fast": clock.provider("fast", 100, 1, 1, 3, 2, 5, 30),
        },
        rounds=6,
        warmup=1,
        timer=clock,
    )
    assert result.seconds == {"slow": (2, 4, 6, 8, 10, 12), "fast": (1, 1, 3, 2, 5, 30)}
    slow = result.spread("slow")
    assert (slow.p20, slow.median, slow.p80) == pytest.approx((4, 7, 10))
    assert result.ratio("slow", "fast") == pytest.approx(7 / 2.5)
    paired = result.paired_ratio("slow", "fast")  # 2, 4, 2, 4, 2, 0.4
    assert (paired.p20, paired.median, paired.p80) == pytest.approx((2, 2, 4))


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, -1)])
def test_counts_out_of_range(rounds: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=r"rounds >= 1 and warmup >= 0"):
        compare({"a": lambda: None}, rounds=rounds, warmup=warmup)


def test_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="providers is empty"):
        compare({})


@pytest.mark.gpu
def test_the_timer_waits_for_the_gpu() -> None:
    timer, matrix = timer_for("cuda"), torch.ones(8192, 8192, device="cuda")
    matrix @ matrix
    start, event = timer(), torch.cuda.Event()
    matrix @ matrix
    event.record()
    assert timer() > start and event.query()


@pytest.mark.parametrize("build", [training_step, inference])
def test_providers_compute_the_same(build: Callable[[str, Workload], Provider]) -> None:
    providers = [build(name, SMALL) for name in PROVIDERS]
    results = [p.run() for p in providers]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-10)


def test_a_training_step_trains() -> None:
    provider = training_step("fused", Workload(batch=2, size=32, num_classes=10))
    first, second = provider.run(), provider.run()
    assert first.dim() == 0 and not first.requires_grad and first != second


def test_providers_say_what_runs_them() -> None:
    backends = {name: inference(name, SMALL).backend for name in PROVIDERS}
    model = fusedres.FusedResNet50(10).double()
    assert backends == {
        "fused": fusedres.report(model)[0].backend,
        "unfused": "torch",
        "reference": "reference",
    }


def test_unknown_provider() -> None:
    with pytest.raises(ValueError, match=r"'compiled', accepted: 'fused', 'unfused', 'reference'"):
        training_step("compiled", SMALL)


def test_building_a_provider_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    training_step("unfused", SMALL)
    assert torch.equal(before, torch.get_rng_state())
