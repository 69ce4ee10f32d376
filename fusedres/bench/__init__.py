"""How fast: paired timing, and the ways of running a network that are held against each other."""

from fusedres.bench.harness import Comparison, Spread, compare, timer_for
from fusedres.bench.providers import PROVIDERS, Provider, Workload, inference, training_step

__all__ = [
    "Comparison",
    "PROVIDERS",
    "Provider",
    "Spread",
    "Workload",
    "compare",
    "inference",
    "timer_for",
    "training_step",
]
