"""Every op that runs, those within our own ops too."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Calls `see` for each op; below ours go on those that they are made of, on the CPU."""

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An op, before it runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.see(func, args, kwargs)
        if func.namespace != "fusedres":
            return func(*args, **kwargs)
        with self:
            return func.redispatch(
                torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs
            )
