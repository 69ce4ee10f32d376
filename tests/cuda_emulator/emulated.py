"""A pytest plugin: fusedres on the emulated extension, whose GPU is the CPU.

Loaded by `-p emulated` with this folder on PYTHONPATH, before any test module, in a process whose
FUSEDRES_EMULATED names what build.py made, and FUSEDRES_EMULATED_LIMITS maybe what the device has:
multiprocessors, blocks that each takes, bytes of shared memory of a block. CPU tensors then serve
as GPU tensors of the `cuda` backend. torch.empty gives NaN and the like, so that what a kernel
leaves unwritten shows.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

PATH = Path(os.environ["FUSEDRES_EMULATED"])


def _install() -> ctypes.CDLL:
    """Puts the emulated module in fusedres._C's place; returns its controls."""
    loader = importlib.machinery.ExtensionFileLoader("fusedres._C", str(PATH))
    spec = importlib.util.spec_from_loader("fusedres._C", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["fusedres._C"] = module

    from fusedres import backends, native
    from fusedres.native import _args

    assert native.load() is module
    for name, backend in backends.BACKENDS.items():
        devices = {"cuda": ("cpu",), "reference": ()}.get(name, ("none",))
        backends.BACKENDS[name] = replace(backend, devices=devices)
    backends.product_problem = lambda *_: None  # the emulator has the instructions of every GPU
    _args.where = lambda _: (0, 0)  # device 0, the default stream
    controls = ctypes.CDLL(str(PATH))
    controls.emulator_launched.restype = ctypes.c_char_p
    types = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_size_t]
    controls.emulator_configure.argtypes = types
    if limits := os.environ.get("FUSEDRES_EMULATED_LIMITS"):
        controls.emulator_configure(1, *map(int, limits.split()))
    return controls


torch.use_deterministic_algorithms(True)  # with it comes the filling of what torch.empty gives
torch.utils.deterministic.fill_uninitialized_memory = True
CONTROLS = _install()


_ALL: set[str] = set()


def launched() -> set[str]:
    """Mangled names of the kernels that have run since `clear`."""
    return set(CONTROLS.emulator_launched().decode().split())


def clear() -> None:
    """Forgets which kernels have run."""
    _ALL.update(launched())
    CONTROLS.emulator_clear_launched()


def pytest_sessionfinish() -> None:
    """Leaves the names of all kernels that have run in the folder FUSEDRES_LAUNCHED, if set."""
    clear()
    if folder := os.environ.get("FUSEDRES_LAUNCHED"):
        Path(folder, str(os.getpid())).write_text("\n".join(sorted(_ALL)))
