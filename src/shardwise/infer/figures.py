"""How far apart two tensors are."""

from __future__ import annotations

from math import inf, isfinite

import torch
from torch import Tensor


def apart(actual: Tensor, expected: Tensor, scale: float) -> float:
    """The largest difference, relative to `scale`; infinite where shapes differ, or where one alone is no number."""
    if actual.shape != expected.shape:
        return inf
    largest = _extent(actual - expected)
    if not isfinite(largest):
        finite = expected.isfinite()
        if not torch.equal(actual.isfinite(), finite):
            return inf
        largest = _extent(actual[finite] - expected[finite])
    return largest / scale if scale else inf if largest else 0.0


def size(tensor: Tensor) -> float:
    """The largest absolute value of those that are finite."""
    extent = _extent(tensor)
    return extent if isfinite(extent) else _extent(tensor[tensor.isfinite()])


def _extent(tensor: Tensor) -> float:
    """The largest absolute value; no number where one of them is none. One pass over a whole vocabulary's logits."""
    if not tensor.numel():
        return 0.0
    low, high = (tensor.abs() if tensor.is_complex() else tensor).aminmax()
    return float(torch.maximum(low.abs(), high.abs()))
