"""Where a model is: which module, and whether forward, backward, or forward again for activation checkpointing."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

OUTSIDE = ""
"""The path where no module is running."""


class Places:
    """The modules that run while it is on, by their names in the outermost module that was called.

    Autograd numbers its nodes as they are made, so the nodes of a module's forward are those made between its beginning and its
    end: this is how a collective in backward finds its module, without a mark on any tensor.

    Args:
        counts: whether to look at what happens on this thread. Hooks of all modules are called on every thread.
    """

    def __init__(self, counts: Callable[[], bool]) -> None:
        self._counts = counts
        self._names: dict[nn.Module, str] = {}
        self._parameters: dict[int, str] = {}
        self._running: defaultdict[int, list[str]] = defaultdict(list)
        self._numbers: list[int] = []
        self._paths: list[str] = []
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Look at the modules that begin from here on."""
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Look at no more modules, and let go of them."""
        for handle in self._handles:
            handle.remove()
        self._names.clear()
        self._running.clear()

    def now(self) -> tuple[str, str, str]:
        """Phase, module path, and the parameter of it that is communicated, or "" where that is an activation."""
        running = self._running.get(threading.get_ident())
        if torch._C._current_graph_task_id() == -1:
            return "forward", running[-1] if running else OUTSIDE, ""
        if running:
            return "recompute", running[-1], ""
        node: Any = torch._C._current_autograd_node()
        return "backward", *self._of_node(node)

    def entered(self, path: str) -> None:
        """A module has begun. Does nothing here: for subclasses."""

    def left(self) -> None:
        """The module that began last has ended. Does nothing here: for subclasses."""

    @property
    def spans(self) -> list[tuple[int, str]]:
        """From which of autograd's sequence numbers on which module's nodes are made, in ascending order; on one thread."""
        return list(zip(self._numbers, self._paths, strict=True))

    def _of_node(self, node: Any) -> tuple[str, str]:
        if node is None:
            return OUTSIDE, ""
        named = self._parameter(node)
        if named:
            module, _, parameter = named.rpartition(".")
            return module, parameter
        index = bisect_right(self._numbers, node._sequence_nr()) - 1
        return (self._paths[index] if index >= 0 else OUTSIDE), ""

    def _parameter(self, node: Any) -> str:
        """The name of the parameter whose gradient `node` computes, if that is all it does."""
        inputs = [after for after, _ in node.next_functions if after is not None]
        leaves = [getattr(one, "variable", None) for one in ([node] if hasattr(node, "variable") else inputs)]
        names = {self._parameters.get(id(leaf), "") for leaf in leaves}
        return names.pop() if len(names) == 1 else ""

    def _enter(self, module: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling() or not self._counts():  # the former is all that a compiler sees of this
            return
        if module not in self._names:
            self._names.update((m, name) for name, m in module.named_modules() if m not in self._names)
            self._parameters.update((id(p), name) for name, p in module.named_parameters())
        path = self._names[module] or type(module).__name__
        self._running[threading.get_ident()].append(path)
        self._mark()
        self.entered(path)

    def _leave(self, module: nn.Module, _: object, __: object) -> None:
        if torch.compiler.is_compiling() or not self._counts():
            return
        running = self._running.get(threading.get_ident())
        if running:
            running.pop()
            self._mark()
            self.left()

    def _mark(self) -> None:
        running = self._running[threading.get_ident()]
        self._numbers.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._paths.append(running[-1] if running else OUTSIDE)
