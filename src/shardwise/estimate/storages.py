"""A value for each storage, for as long as the storage lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

_Value = TypeVar("_Value")


class Storages(Generic[_Value]):
    """Keeps no storage alive. Tensors that are views of each other have one value.

    Args:
        gone: called with the value of a storage that nobody holds any more.
    """

    def __init__(self, gone: Callable[[_Value], None] | None = None) -> None:
        self._gone = gone
        self._values: dict[int, _Value] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def get(self, tensor: Tensor) -> _Value | None:
        """The value of `tensor`'s storage; None where it has none."""
        return self._values.get(key_of(tensor))

    def set(self, tensor: Tensor, value: _Value) -> None:
        """Give `tensor`'s storage a value."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._values[key] = value
        if key not in self._references:
            self._references[key] = weakref.ref(storage, partial(self._forget, key))

    def _forget(self, key: int, _: object) -> None:
        value = self._values.pop(key)
        del self._references[key]
        if self._gone is not None:
            self._gone(value)


def key_of(tensor: Tensor) -> int:
    """A number that no other storage has while this one lives."""
    key: int = tensor.untyped_storage()._cdata
    return key
