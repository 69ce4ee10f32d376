"""How much memory a forward leaves in use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Storages that ops made, as long as anything holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int, torch.Size]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(results):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), t.shape
        return results

    def bytes(self, model: nn.Module, *others: Tensor) -> int:
        """Of those alive, but for parameters, buffers and casts of weights."""
        given = [*model.parameters(), *model.buffers(), *others]
        theirs = {t.untyped_storage()._cdata for t in given}
        weights = {p.shape for p in model.parameters() if p.dim() > 1}
        return sum(
            size
            for key, (reference, size, shape) in self.made.items()
            if not reference.expired() and key not in theirs and shape not in weights
        )
