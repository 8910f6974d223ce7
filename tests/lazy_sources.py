"""A source of lazy tensors in memory, for the tests of what is read of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardwise.lazy import Box


@dataclass(eq=False)
class Memory:
    """A source that remembers which boxes it was asked for."""

    tensor: Tensor
    name: str = "weight"
    asked: list[Box] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, box: Box) -> Tensor:
        self.asked.append(box)
        return self.tensor[tuple(slice(*bounds) for bounds in box)]

    @property
    def elements(self) -> int:
        return sum(math.prod(stop - start for start, stop in box) for box in self.asked)
