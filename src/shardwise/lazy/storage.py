"""What lazy tensors that are views of each other have in common."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

from shardwise.lazy.expr import Expr, full_box
from shardwise.lazy.ops import fill


class Storage:
    """What a lazy tensor and its views share: an expression, until somebody writes; then a tensor."""

    def __init__(self, expr: Expr, real: Tensor | None = None) -> None:
        self.expr = expr
        self.real = real
        self._lock = Lock()

    def realise(self) -> Tensor:
        """The values in memory, with the strides that were promised, so that any view can be taken of them."""
        with self._lock:
            if self.real is None:
                real = torch.empty_strided(self.expr.shape, self.expr.stride, dtype=self.expr.dtype, device="cpu")
                fill(real, self.expr, full_box(self.expr.shape))
                self.real = real
            return self.real

    def copy(self) -> Storage:
        """An independent storage; the sources stay shared."""
        return Storage(self.expr, None if self.real is None else self.real.clone(memory_format=torch.preserve_format))
