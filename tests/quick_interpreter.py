"""Triton's interpreter without half of its work, which says nothing of kernels on small tensors.

It computes every sum, difference and product of int32 once more in int64, to see whether it
overflowed; and at every call of a device function it looks through triton.language for what is to
be patched, which the kernel around it had patched already.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def quicken() -> None:
    """Where this version of Triton has what is left out."""
    from triton.runtime import interpreter

    builder, function = interpreter.interpreter_builder, interpreter.InterpretedFunction
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    patching, patched = function.__call__, set[str]()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            patched.add(module)  # for good: it sees triton.language under another name
            return patching(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    if hasattr(function, "rewrite"):
        function.__call__ = call
