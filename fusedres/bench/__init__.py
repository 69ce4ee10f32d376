"""How fast: paired timing, the ways of running a network that are held against each other, suites
of measurements, and the rows, tables and pages that come of them.
"""

from fusedres.bench.harness import Comparison, Spread, compare, stopwatch_for
from fusedres.bench.providers import Provider, Workload, build, default_names

__all__ = [
    "Comparison",
    "Provider",
    "Spread",
    "Workload",
    "build",
    "compare",
    "default_names",
    "stopwatch_for",
]
