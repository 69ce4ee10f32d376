"""Weight initialisers, by the names that PyTorch's and Keras's users know."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Initializer = str | Callable[[Tensor], object]

_BY_NAME: dict[str, Callable[[Tensor], object]] = {
    "kaiming_normal": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    "glorot_uniform": nn.init.xavier_uniform_,
    "random_uniform": lambda w: nn.init.uniform_(w, -0.05, 0.05),
    "zeros": nn.init.zeros_,
    "ones": nn.init.ones_,
}


def resolve(initializer: Initializer) -> Callable[[Tensor], object]:
    """The function that fills a weight in place.

    Args:
        initializer: "kaiming_normal" (fan out, ReLU), "glorot_uniform", "random_uniform" (+-0.05),
            "zeros", "ones", or a callable that fills the tensor it is given.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor callable.
    """
    if callable(initializer):
        return initializer
    if not isinstance(initializer, str):
        raise TypeError(
            f"initializer must be a name or a callable, got {type(initializer).__name__}"
        )
    if initializer not in _BY_NAME:
        names = ", ".join(map(repr, _BY_NAME))
        raise ValueError(f"initializer: got {initializer!r}, accepted: {names}, or a callable")
    return _BY_NAME[initializer]
