"""The extension fusedres._C as Python sees it: one file per op allocates and passes pointers.

Each function checks what its pointers rest on, so that a direct call of torch.ops.fusedres cannot
crash; messages for people come from the functions in fusedres.ops, which check first.
"""

from __future__ import annotations

import platform
from functools import cache
from types import ModuleType

# Before fusedres._C: the extension then shares torch's OpenMP runtime and its threads.
import torch  # noqa: F401

_BUILD = "`pip install --no-build-isolation -v .` in a source checkout (needs g++, pybind11, ninja)"


@cache
def _import() -> tuple[ModuleType | None, str | None]:
    """The module, or the reason why there is none."""
    try:
        import fusedres._C as module
    except ModuleNotFoundError as error:
        if platform.system() != "Linux":
            return None, f"the extension is built on Linux only, this is {platform.system()}"
        return None, f"the extension is not built ({error}); build it with {_BUILD}"
    except ImportError as error:
        return None, f"the extension cannot be loaded ({error}); rebuild it with {_BUILD}"
    return module, None


def load() -> ModuleType | None:
    """fusedres._C, or None where it was not built or cannot be loaded."""
    return _import()[0]


def unavailable_reason() -> str | None:
    """Why load() gives None and the command that would change it; None when it gives the module."""
    return _import()[1]


def require() -> ModuleType:
    """fusedres._C; RuntimeError with the reason where there is none."""
    module, reason = _import()
    if module is None:
        raise RuntimeError(f"fusedres: {reason}")
    return module
