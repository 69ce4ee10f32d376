"""From measurements to the plan table: which plan a convolution takes and with which block sizes,
and who runs a light pass.

Rows of the suite "ops", or of a sweep, say how long each backend and plan took at each size. The
fastest gets the entry; between two measured sizes with different winners the border is their
geometric mean. It holds down to a quarter of the smallest size that was measured, and for all that
are larger.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from fusedres._plan_table import MEASURED, Shape, is_modelled
from fusedres.bench.measure import Job
from fusedres.bench.rows import Row
from fusedres.bench.sweep import NOW, in_words

Entry = dict[str, Any]
Span = list[Any]  # [least, most or None]
W = TypeVar("W")
IMAGE = 3  # channels: nobody wants its gradient
BY_RULE = "by rule"
# a light pass's row, by how its case begins, and the op whose backend it decides
_OPS = {
    "batch_norm_fwd": "batch_norm",
    "batch_norm_bwd": "batch_norm",
    "batch_norm_act_fwd": "batch_norm",
    "bn_act_fwd": "bn_act",
    "bn_act_bwd": "bn_act",
    "bn_relu_maxpool": "bn_relu_maxpool",
    "add_relu": "add_relu",
}


class Change(NamedTuple):
    """What an entry says that was otherwise before, at one measured size.

    Attributes:
        where: device, dtype, what it is about and at which size.
        what: "plan", the name of a kernel, or "backend".
        old, new: in words.
        gain: the share of the time that it saves, where both were measured: for a kernel's
            configuration of the pass it runs in.
    """

    where: str
    what: str
    old: str
    new: str
    gain: float | None

    def __str__(self) -> str:
        if self.gain is None:
            return f"{self.where}: {self.what} {self.old} -> {self.new}"
        gain = f", {abs(self.gain):.1%} {'less' if self.gain >= 0 else 'more'} time"
        return f"{self.where}: {self.what} {self.old} -> {self.new}{gain}"


class Changes(NamedTuple):
    """All of them, how many layers and passes stay as they were, and what a training step saves, in
    ms by device, dtype and batch.
    """

    changed: list[Change]
    unchanged: int
    saved: dict[tuple[str, str, int], float]


@dataclass(frozen=True)
class _Site:
    """A convolution at one size, as measured."""

    totals: dict[str, float]  # ms of a step by plan, the best backend's; NOW: as it ran before
    tuned: Row | None  # what a sweep of its configurations found
    batch: int
    count: int

    @property
    def winner(self) -> str | None:
        """The fastest plan, where there was a choice."""
        plans = {p: ms for p, ms in self.totals.items() if p != NOW and ms < math.inf}
        return min(plans, key=lambda plan: plans[plan]) if len(plans) > 1 else None

    def present(self, was: Entry) -> float:
        """ms of a step as it ran before: of its plan, but for other configurations."""
        kept = not self.tuned or _subset(self.tuned["configs"], was.get("configs", {}))
        return self.totals.get(was.get("plan", "") if kept else NOW, math.inf)


def _subset(one: Entry, two: Entry) -> bool:
    return all(two.get(name) == value for name, value in one.items())


def decides(job: Job) -> bool:
    """Whether the job of a light pass has anything to choose: two backends."""
    ours = [name for name in job.names if name.startswith("fusedres-")]
    return job.about["section"] == "light" and len(ours) > 1


def entries_from(rows: Sequence[Row]) -> list[Entry]:
    """Entries of the plan table.

    Args:
        rows: of sections "conv_bn", "tuned" and "light"; others, those that failed and those whose
            result was not a number are passed over.

    Returns:
        Plans of convolutions that were measured by two or more, then light passes that were
        measured by two backends or more, each over all sizes. `configs` are there, and maybe empty,
        where kernels were swept.
    """
    found = []
    for (device, dtype, *conv), sites in _sites(rows).items():
        winners = {}
        for pixels, site in sites.items():
            if site.winner is not None:
                configs = None if site.tuned is None else json.dumps(site.tuned["configs"])
                winners[pixels] = (site.winner, configs)
        channels, filters, kernel, stride = conv
        about = {"device": device, "dtype": dtype}
        about |= {"in_channels": channels, "out_channels": filters}
        about |= {"kernel": [kernel, kernel], "stride": [stride, stride]}
        for span, (plan, configs) in spans_of(winners):
            known = {} if configs is None else {"configs": json.loads(configs)}
            found.append({**about, "rows": span, "plan": plan, **known, "source": MEASURED})
    return found + _light([r for r in _usable(rows) if r["section"] == "light"])


def _usable(rows: Sequence[Row]) -> list[Row]:
    return [
        row
        for row in rows
        if "error" not in row
        and (row.get("backend") is not None or row["name"] == f"fusedres-{NOW}")
        and math.isfinite(row.get("max_error") or 0.0)
    ]


def _sites(rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[int, _Site]]:
    """By device, dtype and convolution; there by pixels of the output."""
    times: dict[tuple[Any, ...], Any] = defaultdict(lambda: defaultdict(dict))
    about = {}
    for row in (r for r in _usable(rows) if r["section"] == "conv_bn"):
        key, pixels = _place(row)
        way = (row["backend"], row["plan"] or NOW)
        times[key, pixels][way][row["case"]] = row["ms"]
        about[key, pixels] = row
    tuned = {_place(row): row for row in rows if row["section"] == "tuned"}
    found: dict[tuple[Any, ...], dict[int, _Site]] = defaultdict(dict)
    for (key, pixels), by_way in times.items():
        totals: dict[str, float] = {}
        for (_, plan), parts in by_way.items():
            total = _total(parts, has_dgrad=key[2] != IMAGE)
            totals[plan] = min(total, totals.get(plan, math.inf))
        row = about[key, pixels]
        found[key][pixels] = _Site(
            totals, tuned.get((key, pixels)), row["batch"], row.get("count") or 1
        )
    return found


def _place(row: Row) -> tuple[tuple[Any, ...], int]:
    batch, size, *conv = row["shape"]
    return (row["device"], row["dtype"], *conv), batch * ((size - 1) // conv[3] + 1) ** 2


def _total(parts: dict[str, float], has_dgrad: bool) -> float:
    """Forward and backward of a layer; infinite where a direction was not measured."""
    backward = parts.get("bwd", math.inf)
    if not has_dgrad:
        backward = parts.get("wgrad", math.inf)
    elif "bwd" not in parts and {"dgrad", "wgrad"} <= set(parts):
        backward = parts["dgrad"] + parts["wgrad"]
    return parts.get("fwd", math.inf) + backward


def _light(rows: Sequence[Row]) -> list[Entry]:
    """All passes of an op together, at each size of the tensor: an op has one backend."""
    times: dict[tuple[Any, ...], Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for row in rows:
        op = next((op for start, op in _OPS.items() if row["case"].startswith(start)), None)
        if op is None or " + " in row["case"]:  # a pair spans two ops
            continue
        size = math.prod(row["shape"]) * getattr(torch, row["dtype"]).itemsize
        part = (row["case"], *row["shape"])  # several shapes have one size
        times[row["device"], row["dtype"], op][size][part][row["backend"]] = row["ms"]
    found = []
    for (device, dtype, op), sizes in times.items():
        winners = {}
        for size, parts in sizes.items():
            shared = set.intersection(*(set(by) for by in parts.values()))
            totals = {name: sum(by[name] for by in parts.values()) for name in shared}
            if len(totals) > 1:
                winners[size] = min(totals, key=lambda name: totals[name])
        about = {"device": device, "dtype": dtype, "op": op}
        found += [
            {**about, "bytes": span, "backend": name, "source": MEASURED}
            for span, name in spans_of(winners)
        ]
    return found


def spans_of(winners: dict[int, W]) -> list[tuple[Span, W]]:
    """[least, most] around each run of sizes with one winner."""
    spans: list[tuple[Span, W]] = []
    least, last = min(winners, default=0) // 4, 0
    for size in sorted(winners):
        if spans and spans[-1][1] != winners[size]:
            border = round(math.sqrt(last * size))
            spans[-1][0][1] = border
            least = border + 1
        if not spans or spans[-1][1] != winners[size]:
            spans.append(([least, None], winners[size]))
        last = size
    return spans


# --- a table that was there before ----------------------------------------------------------------


def merged(new: Sequence[Entry], old: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """The new entries, with the configurations of old ones where no kernel was swept; and what is
    left of the old ones: of the sizes that the new ones do not speak of.
    """
    found, kept = [], []
    for entry in new:
        rest = [entry]
        for other in (o for o in old if "configs" in o and about_the_same(o, entry)):
            if "configs" in entry:
                continue
            pieces = []
            for piece in rest:
                common = _overlap(_span(piece), _span(other))
                if common is not None:
                    found.append({**piece, "rows": common, "configs": other["configs"]})
                pieces += [{**piece, "rows": s} for s in _outside(_span(piece), _span(other))]
            rest = pieces
        found += rest
    for entry in old:
        spans = [_span(entry)]
        for other in (o for o in new if about_the_same(o, entry)):
            spans = [left for span in spans for left in _outside(span, _span(other))]
        size = "bytes" if "op" in entry else "rows"
        whole = spans == [_span(entry)]
        kept += [entry] if whole else [{**entry, size: span} for span in spans]
    return found, kept


def about_the_same(entry: Entry, other: Entry) -> bool:
    """Whether two entries are about the same, whatever sizes they span."""
    free = {"rows", "bytes", "plan", "backend", "configs", "source"}
    one, two = ({k: v for k, v in e.items() if k not in free} for e in (entry, other))
    return one == two and is_modelled(entry) == is_modelled(other)


def _span(entry: Entry) -> Span:
    return list(entry.get("bytes" if "op" in entry else "rows", [0, None]))


def _overlap(one: Span, two: Span) -> Span | None:
    least, most = max(one[0], two[0]), min(_most(one), _most(two))
    return None if least > most else [least, None if most == math.inf else most]


def _outside(span: Span, other: Span) -> list[Span]:
    """What of a span is not in the other."""
    if _overlap(span, other) is None:
        return [span]
    below = [[span[0], other[0] - 1]] if span[0] < other[0] else []
    return below + ([[other[1] + 1, span[1]]] if _most(span) > _most(other) else [])


def _most(span: Span) -> float:
    return math.inf if span[1] is None else span[1]


# --- what changed ---------------------------------------------------------------------------------


def changes_of(
    rows: Sequence[Row], before: Callable[[str, torch.dtype, Shape], Entry | None]
) -> Changes:
    """What the plans and configurations of the rows' entries change.

    Args:
        rows: as for entries_from.
        before: what the table said of a convolution (_plan_table.lookup), where a sweep does not.
    """
    changed: list[Change] = []
    saved: dict[tuple[str, str, int], float] = defaultdict(float)
    unchanged = 0
    for (device, dtype, *conv), sites in _sites(rows).items():
        channels, filters, kernel, stride = conv
        for pixels, site in sorted(sites.items()):
            plan = site.winner
            if plan is None:
                continue
            shape = Shape(channels, filters, (kernel, kernel), (stride, stride), pixels)
            entry = before(device, getattr(torch, dtype), shape) or {}
            where = f"{device}, {dtype}, {channels} -> {filters}, {kernel}x{kernel}/{stride}"
            where += f", batch {site.batch}"
            was = site.tuned["was"] if site.tuned else entry
            present = site.present(was)
            found = _changes_at(where, site, plan, was, present)
            changed += found
            unchanged += not found
            if found and present < math.inf:
                less = (present - site.totals[plan]) * site.count
                saved[device, dtype, site.batch] += less
    return Changes(changed, unchanged, dict(saved))


def _changes_at(where: str, site: _Site, plan: str, was: Entry, present: float) -> list[Change]:
    found = []
    if was.get("plan") != plan:
        gain = 1 - site.totals[plan] / present if present < math.inf else None
        found.append(Change(where, "plan", was.get("plan") or BY_RULE, plan, gain))
    for kernel, config in (site.tuned or {}).get("configs", {}).items():
        old, ratio = was.get("configs", {}).get(kernel), (site.tuned or {})["gains"].get(kernel)
        if config != old:
            gain, words = None if ratio is None else 1 - ratio, in_words(config)
            found.append(Change(where, kernel, in_words(old) if old else BY_RULE, words, gain))
    return found


def light_changes(new: Sequence[Entry], old: Sequence[Entry]) -> tuple[list[Change], int]:
    """Light passes that another backend runs now, each size class one; and how many stay."""
    changed, unchanged = [], 0
    for entry in (e for e in new if "op" in e):
        alike = [o for o in old if about_the_same(o, entry) and _overlap(_span(o), _span(entry))]
        names = list(dict.fromkeys(o["backend"] for o in alike))
        if names == [entry["backend"]]:
            unchanged += 1
            continue
        least, most = entry["bytes"]
        size = f" from {least:,}" if least else ""
        size += f" to {most:,}" if most is not None else ""
        where = f"{entry['device']}, {entry['dtype']}, {entry['op']}"
        where += f" ({size.strip()} bytes)" if size else ""
        old_words = " and ".join(names) or BY_RULE
        changed.append(Change(where, "backend", old_words, entry["backend"], None))
    return changed, unchanged
