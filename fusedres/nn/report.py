"""report: which parts of a model are fused, by what, and why not where they are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedres import backends
from fusedres.nn.blocks import FusedModule, Stage
from fusedres.nn.frozen import FrozenModule
from fusedres.nn.fuse import FusedByProgram, unfused
from fusedres.nn.layers import geometry, is_untouched, sync_group
from fusedres.nn.program import at
from fusedres.ops._contract import compute_dtype
from fusedres.ops.conv_act import way_of as conv_act_way
from fusedres.ops.conv_bn_relu_maxpool import stem_way


@dataclass(frozen=True)
class Row:
    """One convolution with its BatchNorm."""

    name: str
    runs: str  # "fused" or "plain"
    backend: str
    plan: str
    reason: str


class Report(list[Row]):
    """Rows of `report`; printing it gives the table.

    Attributes:
        note: what is to be said of the model as a whole; "" where nothing is.
    """

    note = ""

    def __str__(self) -> str:
        header = Row("layer", "runs", "backend", "plan", "why not faster")
        table = [(r.name, r.runs, r.backend, r.plan, r.reason) for r in (header, *self)]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = [
            "  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4])).rstrip()
            for row in table
        ]
        fused = sum(r.runs == "fused" for r in self)
        lines.append(f"{fused} of {len(self)} layers fused")
        return "\n".join([*lines, self.note] if self.note else lines)


def _way(
    op: str, choice: backends.Choice, conv: nn.Conv2d, weight: Tensor, dtype: torch.dtype
) -> tuple[str, str]:
    """Backend and plan of a convolution whose input is not known yet: taken as large."""
    way = backends.way_of if op == "conv_bn" else stem_way
    return way(choice, dtype, weight, geometry(conv))


def report(model: nn.Module) -> Report:
    """What runs for each convolution and BatchNorm pair of a model, where it stands and as autocast
    is now.

    Args:
        model: any module. Its convolutions are listed: those of fused blocks, then the others.

    Returns:
        A printable list of rows (name, "fused" or "plain", backend, plan, reason), and a note where
        a plan that some of them could take is off.

    Raises:
        TypeError: model is no nn.Module.
        RuntimeError: the backend asked for by name cannot serve the model's device or dtype.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be an nn.Module, got {type(model).__name__}")
    rows = Report()
    frozen: set[str] = set()  # paths of convolutions that belong to frozen modules
    for path, module in model.named_modules():
        if isinstance(module, FrozenModule):
            found = list(_of_frozen(path, module))
            frozen |= {row.name for row in found}
            rows += found
    border: dict[str, str] = {}  # by path: why a Tensor, not a Deferred, crosses a block's border
    for path, module in model.named_modules():
        if module is not model and isinstance(module, FusedModule | Stage):
            if not is_untouched(module):
                border[path] = f"Tensors enter and leave {path}: it has a hook or its own forward"
            if isinstance(module, Stage | FusedByProgram) and path in border:
                ends = list(dict(module.named_children()))
                border |= {f"{path}.{name}": border[path] for name in (*ends[:1], *ends[-1:])}
        if not isinstance(module, FusedModule) or isinstance(module, FrozenModule):
            continue
        if all(f"{path}.{name}".lstrip(".") in frozen for name, *_ in module.units()):
            continue
        reason = module.plain_reason()
        for conv_name, conv, bn_name, bn in module.units():
            name = f"{path}.{conv_name}".lstrip(".") + f" + {bn_name}"
            weight = getattr(conv, "weight", None)
            if reason is not None or weight is None:
                rows.append(Row(name, "plain", "torch", "-", reason or ""))
                continue
            dtype = compute_dtype(weight)
            # over several processes a stem runs as conv_bn too
            op = module.op_of(conv_name) if sync_group(bn) is None else "conv_bn"
            choice = backends.choose(op, weight.device.type, dtype)
            assert isinstance(conv, nn.Conv2d)  # else there is a reason
            backend, plan = _way(op, choice, conv, weight, dtype)
            runs = "plain" if backend == "reference" else "fused"
            why = choice.reason
            if op == "conv_bn" and geometry(conv).has_tensor_core_kernel(weight.shape, "wgmma"):
                passed = backends.passed_over(choice, dtype, weight, geometry(conv))
                why = "; ".join(filter(None, (why, passed)))
                rows.note = backends.wgmma_note(weight.device.index)
            why = "; ".join(filter(None, (why, border.get(path))))
            rows.append(Row(name, runs, backend, plan, why))
    left = (row for row in unfused(model) if row[0] not in frozen)
    rows += [Row(path, "plain", "torch", "-", why) for path, _, why in left]
    return rows


def _of_frozen(path: str, module: FrozenModule) -> Iterator[Row]:
    program = "" if module._frozen is None else module._frozen.program(module)
    if isinstance(program, str):
        return
    for step in program.pairs():
        conv = at(module, step.conv)
        choice = backends.choose("conv_act", conv.weight.device.type, conv.weight.dtype)
        way = conv_act_way(choice, conv.weight, conv.weight.dtype, conv.weight, geometry(conv))
        runs = "plain" if way[0] == "reference" else "fused"
        yield Row(f"{path}.{step.conv}".lstrip("."), runs, *way, choice.reason)
    for name, why in program.left:
        yield Row(f"{path}.{name}".lstrip("."), "plain", "torch", "-", why)
