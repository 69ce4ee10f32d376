"""info: what is built, what runs, why anything is off, and the command that would change it."""

from __future__ import annotations

import platform
from typing import Any

import torch

from fusedres import _plan_table, backends, native
from fusedres._version import __version__


class Info(dict[str, Any]):
    """What `info` found, as a dict; printing it gives the page."""

    def __str__(self) -> str:
        lines = [
            f"fusedres {self['version']}, Python {self['python']}, torch {self['torch']}, "
            f"{self['platform']}",
            f"devices: {', '.join(self['devices'])}",
        ]
        extension = self["extension"]
        if extension is None:
            lines.append("compiled extension: not built")
        else:
            cuda = extension["cuda_version"]
            archs = " ".join(extension["cuda_archs"])
            lines.append(f"compiled extension: {extension['compiler']}")
            lines.append(f"  CUDA kernels: {f'CUDA {cuda} for {archs}' if cuda else 'not built'}")
            best, others = extension["cpu_levels"][-1], extension["cpu_levels"][:-1]
            lines.append(f"  CPU kernels: {best} (of {', '.join([*others, best])})")
        asked = self["requested_backend"]
        plans = self["plan_table"]
        lines.append(
            f"plan table: {plans['shipped']} entries shipped, {plans['user']} by `fusedres tune` "
            f"in {plans['path']}"
        )
        for name, counts in plans["devices"].items():
            measured, modelled = counts[_plan_table.MEASURED], counts[_plan_table.MODELLED]
            lines.append(f"  {name}: {measured} measured, {modelled} by a model of bytes and rates")
        lines.append(f"backend asked for: {asked}; CPU threads: {self['threads']}")
        width = max(map(len, self["backends"]))
        for name, backend in self["backends"].items():
            state = "ready" if backend["ready"] else "off"
            note = ", ".join(backend["ops"]) if backend["ready"] else backend["reason"]
            lines.append(f"  {name.ljust(width)}  {state.ljust(5)}  {note}")
        lines.append(self["wgmma"])
        return "\n".join(lines)


def info() -> Info:
    """What is built, what runs, why not, and the command that would change it.

    Returns:
        A printable dict: version, python, torch, platform, devices, extension (None or compiler,
        cuda_version, cuda_archs, cpu_levels: the instruction sets of CPU kernels that run here,
        the last of which does), plan_table (entries shipped, of the user, the path of the user's,
        and by device how many were measured and how many modelled), requested_backend, threads,
        backends by name, each with ready, reason, ops, devices, dtypes, and wgmma: whether the plan
        "fused+wgmma" is off, and why.
    """
    extension = native.load()
    devices = _devices()
    return Info(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        platform=f"{platform.system()} {platform.machine()}",
        devices=devices,
        extension=None
        if extension is None
        else {
            "compiler": extension.compiler,
            "cuda_version": extension.cuda_version,
            "cuda_archs": list(extension.cuda_archs),
            "cpu_levels": extension.cpu_levels(),
        },
        plan_table={
            "shipped": len(_plan_table.shipped_entries()),
            "user": len(_plan_table.user_entries()),
            "path": str(_plan_table.user_path()),
            "devices": {name: _plan_table.counts(name) for name in devices},
        },
        requested_backend=backends.requested_backend(),
        threads=torch.get_num_threads(),
        backends={name: _describe(b) for name, b in backends.BACKENDS.items()},
        wgmma=backends.wgmma_note(None),
    )


def _devices() -> list[str]:
    """As the plan table names them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(torch.cuda.get_device_name(i) for i in range(count))]


def _describe(backend: backends.Backend) -> dict[str, Any]:
    reason = backends.not_ready(backend.name)
    return {
        "ready": reason is None,
        "reason": reason or "",
        "ops": list(backend.ops),
        "devices": list(backend.devices) or ["any"],
        "dtypes": [str(d).removeprefix("torch.") for d in backend.dtypes],
    }
