"""How each contender starts, builds, loads, saves and clips: all that the measuring code knows of it."""

from __future__ import annotations

from importlib import import_module

from benchmarks.adapters.base import Adapter


def adapter_named(name: str) -> Adapter:
    """The adapter of the module `name` in this folder."""
    found = import_module(f"benchmarks.adapters.{name}").ADAPTER
    assert isinstance(found, Adapter)
    return found
