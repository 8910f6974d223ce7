"""What depends on what in a layer: its parameters, its attention, its sums and its collectives, as they run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from shardwise.debug.operators import read_call
from shardwise.estimate.live import FUSED
from shardwise.estimate.storages import Storages

INPUT = -1
"""Stands for the layer's input among the inputs of a node."""

_PRODUCTS = ("bmm", "mm", "baddbmm")
_SUMS = ("add", "add_")
_NOTHING: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Node:
    """Something that happens in a layer's forward.

    Args:
        kind: "parameters": a module's own are applied; "mix": activations are multiplied with each other, as attention does;
            "sum": two streams are added, as at the end of a residual branch; "collective".
        module: the path in the layer of the module in which it happens.
        inputs: the nodes before it that it needs directly, by their numbers, and `INPUT`.
        parameters: their names in the layer, of the first kind.
    """

    kind: Literal["parameters", "mix", "sum", "collective"]
    module: str
    inputs: frozenset[int]
    parameters: tuple[str, ...] = ()


@dataclass
class _Graph:
    """The nodes of the layer that runs, and what each storage comes from."""

    nodes: list[Node] = field(default_factory=list)
    places: dict[object, int] = field(default_factory=dict)
    sources: Storages[frozenset[int]] = field(default_factory=Storages)
    stream: int = 0  # elements of the layer's input

    def of(self, tensors: Iterable[Tensor]) -> frozenset[int]:
        """The nodes that `tensors` come from directly."""
        return _NOTHING.union(*(self.sources.get(tensor) or _NOTHING for tensor in tensors))

    def add(self, node: Node, place: object = None) -> int:
        """The number of `node`, which is that of an earlier one at the same `place` where both can be one."""
        before = self.places.get(place) if place is not None else None
        if before is not None and not any(self._needs(one, before) for one in node.inputs if one > before):
            earlier = self.nodes[before]
            inputs = earlier.inputs | {one for one in node.inputs if one < before}
            names = tuple(dict.fromkeys(earlier.parameters + node.parameters))
            self.nodes[before] = Node(node.kind, node.module, inputs, names)
            return before
        self.nodes.append(node)
        if place is not None:
            self.places[place] = len(self.nodes) - 1
        return len(self.nodes) - 1

    def _needs(self, number: int, other: int) -> bool:
        return number == other or any(one >= other and self._needs(one, other) for one in self.nodes[number].inputs)


class Flow(TorchDispatchMode):
    """Records `Node`s of the forward of some layers, each the first time that it runs.

    Args:
        model: whose layers they are.
        layers: their paths.

    Attributes:
        graphs: of each layer, its nodes in the order in which they ran.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graphs: dict[str, tuple[Node, ...]] = {}
        self._model, self._layers = model, tuple(layers)
        self._graph: _Graph | None = None
        self._parameters: Storages[frozenset[str]] = Storages()
        self._running: list[tuple[str, int]] = []
        self._calls = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Flow:
        for path in self._layers:
            layer = self._model.get_submodule(path)
            for name, module in layer.named_modules():
                self._watch(path, name, module)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _watch(self, layer: str, name: str, module: nn.Module) -> None:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not name and layer not in self.graphs:
                self._begin(layer, tree_leaves((args, kwargs)))
            self._calls += 1
            self._running.append((name, self._calls))

        def leave(*_: object) -> None:
            self._running.pop()
            if not name and self._graph is not None:
                self.graphs[layer] = tuple(self._graph.nodes)
                self._graph = None

        self._handles += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]

    def _begin(self, layer: str, given: Sequence[object]) -> None:
        stream = next(value for value in given if isinstance(value, Tensor) and value.is_floating_point())
        self._graph = _Graph(stream=stream.numel())
        self._graph.sources.set(stream, frozenset({INPUT}))
        self._parameters = Storages()
        for name, parameter in self._model.get_submodule(layer).named_parameters():
            self._parameters.set(parameter, frozenset({name}))

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Every operator comes by here."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._graph is not None and torch._C._current_graph_task_id() == -1:
            given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
            if read_call(func, args, kwargs) is not None:
                self._set(given, frozenset({self._graph.add(Node("collective", self._module, self._graph.of(given)))}))
            else:
                self._follow(self._graph, func, given, made)
        return result

    def _follow(self, graph: _Graph, func: OpOverload, given: list[Tensor], made: list[Tensor]) -> None:
        names = frozenset[str]().union(*(self._parameters.get(tensor) or frozenset[str]() for tensor in given))
        active = [tensor for tensor in given if graph.sources.get(tensor)]
        sources = graph.of(active)
        if names and not active:
            for tensor in made:
                self._parameters.set(tensor, names)
            return
        if names:
            for module in sorted({name.rpartition(".")[0] for name in names}):
                own = tuple(sorted(name for name in names if name.rpartition(".")[0] == module))
                place = ("parameters", module, self._call(module))
                sources = frozenset({graph.add(Node("parameters", module, sources, own), place)})
        elif self._mixes(func, active):
            sources = frozenset({graph.add(Node("mix", self._module, sources), ("mix", *self._running[-1]))})
        elif self._sums(func, active, made):
            sources = frozenset({graph.add(Node("sum", self._module, sources))})
        if sources:
            self._set(made, sources)

    def _mixes(self, func: OpOverload, active: list[Tensor]) -> bool:
        name = func.overloadpacket.__name__
        return len(active) > 1 and (FUSED in name or name in _PRODUCTS)

    def _sums(self, func: OpOverload, active: list[Tensor], made: list[Tensor]) -> bool:
        if func.overloadpacket.__name__ not in _SUMS or len(active) != 2 or made[0].numel() != self._stream:
            return False
        first, second = (self._graph_sources(tensor) for tensor in active)
        return not (first <= second or second <= first)

    @property
    def _stream(self) -> int:
        return self._graph.stream if self._graph is not None else 0

    def _graph_sources(self, tensor: Tensor) -> frozenset[int]:
        return (self._graph.sources.get(tensor) if self._graph is not None else None) or _NOTHING

    @property
    def _module(self) -> str:
        return self._running[-1][0] if self._running else ""

    def _call(self, module: str) -> int:
        return next((number for name, number in reversed(self._running) if name == module), 0)

    def _set(self, tensors: Iterable[Tensor], sources: frozenset[int]) -> None:
        assert self._graph is not None
        for tensor in tensors:
            self._graph.sources.set(tensor, sources)
