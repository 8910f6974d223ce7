"""What the names in a frozen plan's expressions mean: integers of a module, of those around it, and of their config."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

from torch import nn

from shardwise.layers import Cut, ParallelStyle, stores_transposed
from shardwise.notation import Lookup

LENGTH = "length"
"""The name of the indices along the dim that is cut."""


def around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The module called `name` inside of `model` (or the one that has the parameter), the one around it, and so on."""
    while name:
        found: object = model
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Module):
            yield found
        name = name.rpartition(".")[0]
    yield model


def field(holder: object, name: str) -> Any:
    """What is called `name` in a config or module ("vision_config.hidden_size" in a config in it); None where nothing is, or
    where it differs from layer to layer.
    """
    try:
        return reduce(lambda found, part: getattr(found, part, None), name.split("."), holder)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        return None


def integer(value: object) -> bool:
    """Whether `value` is a number that may stand in an expression."""
    return isinstance(value, int) and not isinstance(value, bool)


def lookup(model: nn.Module, name: str, length: int | None) -> Lookup:
    """What names mean in a rule for `name`: the nearest module that has an integer of that name; "config.NAME" that of the
    nearest config.
    """

    def value_of(wanted: str) -> int:
        if wanted == LENGTH and length is not None:
            return length
        inside = wanted.removeprefix("config.")
        for module in around(model, name):
            value = field(getattr(module, "config", None) if inside != wanted else module, inside)
            if integer(value):
                return int(value)
        raise ValueError(f"{name}: nothing around it has a number called {wanted!r}")

    return value_of


def cut_length(model: nn.Module, name: str, style: type[ParallelStyle], dim: int | None = None) -> int | None:
    """Indices along the dim that `style` cuts of the parameter called `name`, or of the weight of that module, or along `dim`
    where a cut says it; None where it cuts none.
    """
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part)
    transposed = isinstance(found, nn.Module) and stores_transposed(found)
    tensor = getattr(found, "weight", None) if isinstance(found, nn.Module) else found
    if tensor is None:
        return None
    shape = tuple(tensor.shape)
    cut = style.layout(shape, Cut(transposed=transposed, dim=dim)).cut(shape)
    return None if cut is None else int(shape[cut[0]])
