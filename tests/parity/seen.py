"""How a line of the tables of encoders and towers looks, and what texts, images and sounds are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

CLASSES, SIDE, VOCABULARY, END = 3, 28, 127, 2


@dataclass(frozen=True)
class Other:
    """A type that is no causal LM, or with another head.

    Args:
        feed: makes the inputs of so many rows, without labels.
        tasks: of the Auto classes that make it; "" for `AutoModel`.
        options: what its config needs besides the common sizes.
        decodes: a decoder of its has inputs of its own.
    """

    feed: Callable[[int], Mapping[str, Tensor]]
    tasks: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=dict)
    decodes: bool = False


def ids(rows: int, *shape: int, below: int = 0) -> Tensor:
    """(rows, *shape) int64, `below` a number, or of a text."""
    draw = torch.Generator().manual_seed(rows)
    low, high = (0, below) if below else (10, VOCABULARY)
    return torch.randint(low, high, (rows, *shape), generator=draw)


def noise(rows: int, *shape: int) -> Tensor:
    """(rows, *shape)."""
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows))
