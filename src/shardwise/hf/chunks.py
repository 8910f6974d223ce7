"""Mixers that compute many tokens at once pad few to as many; while a model is tried out, they compute few."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

CHUNK = 4
_ARGUMENT = "chunk_size"


@contextmanager
def small_chunks(model: nn.Module) -> Iterator[None]:
    """In the block, functions of the files that `model`'s classes are in compute chunks of `CHUNK` tokens where they would
    more, unless they are told how many: the same numbers but for rounding.
    """
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    found = [(file, name, function) for file in files for name, function in [*_chunked(file)]]
    try:
        for file, name, function in found:
            setattr(file, name, partial(function, **{_ARGUMENT: CHUNK}))
        yield
    finally:
        for file, name, function in found:
            setattr(file, name, function)


def _chunked(file: ModuleType) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions defined in `file` that compute larger chunks by default."""
    for name, function in vars(file).items():
        if inspect.isfunction(function) and function.__module__ == file.__name__:
            argument = inspect.signature(function).parameters.get(_ARGUMENT)
            if argument is not None and isinstance(argument.default, int) and argument.default > CHUNK:
                yield name, function
