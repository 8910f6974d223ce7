"""Layers that do the same, and what one of each kind communicates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from shardwise.debug.record import Collective
from shardwise.estimate.flow import Node
from shardwise.names import layer_of
from shardwise.plan import Plan, wildcard

_TIMES_AROUND = MappingProxyType({"all_reduce": 2})
"""How often a ring sends what a rank puts in, in units of (n - 1) / n; once where nothing is said."""


@dataclass(frozen=True)
class LayerKind:
    """Layers whose parameters are cut alike and which communicate alike.

    Attributes:
        layers: their paths, such as "model.layers.3"; one that is "" stands for all that is outside of layers.
        collectives: of the first of them, in order, forward and backward.
        nodes: what happens in the forward of one of them; none where that is not known.
    """

    layers: tuple[str, ...]
    collectives: tuple[Collective, ...]
    nodes: tuple[Node, ...] = ()

    @property
    def name(self) -> str:
        """As "model.layers.*"; of a single layer its path."""
        return wildcard(self.layers[0]) if len(self.layers) > 1 else self.layers[0]

    @property
    def title(self) -> str:
        """The name, and how many there are."""
        if not self.layers[0]:
            return "outside of the layers"
        return f"{self.name}  x {len(self.layers)}" if len(self.layers) > 1 else self.name

    def inside(self, module: str) -> str:
        """The path of `module` in the layer."""
        return module.removeprefix(self.layers[0]).removeprefix(".")

    @property
    def bytes(self) -> int:
        """That a rank puts into the collectives of one such layer."""
        return sum(one.bytes for one in self.collectives)


def kinds(plan: Plan, collectives: Iterable[Collective], flows: Mapping[str, tuple[Node, ...]]) -> tuple[LayerKind, ...]:
    """The kinds of layers, by the first layer of each; at the end what is outside of layers, if it communicates."""
    sent: dict[str, list[Collective]] = {}
    for record in collectives:
        sent.setdefault(layer_of(record.module), []).append(record)
    alike: dict[object, list[str]] = {}
    cuts = _cuts(plan)
    nodes = {tuple(cuts[layer]): found for layer, found in flows.items()}
    for layer, cut in cuts.items():
        own = tuple((one.op, one.phase, one.module[len(layer) :], one.parameter, one.bytes) for one in sent.get(layer, ()))
        alike.setdefault((tuple(cut), own), []).append(layer)
    found = [
        LayerKind(tuple(layers), tuple(sent.get(layers[0], ())), nodes.get(tuple(cuts[layers[0]]), ()))
        for layers in alike.values()
    ]
    rest = [record for layer, records in sent.items() if layer not in cuts for record in records]
    return (*found, LayerKind(("",), tuple(rest))) if rest else tuple(found)


def first_layers(plan: Plan) -> list[str]:
    """A layer of each kind, as far as the table tells them apart."""
    return list({tuple(cut): layer for layer, cut in reversed(_cuts(plan).items())}.values())[::-1]


def _cuts(plan: Plan) -> dict[str, list[object]]:
    layers: dict[str, list[object]] = {}
    for row in plan:
        if (layer := layer_of(row.name)) and not row.buffer:
            layers.setdefault(layer, []).append((row.name[len(layer) :], row.shape, row.layout))
    return layers


def ring_bytes(record: Collective) -> int:
    """Bytes that leave a rank if a ring of the group's ranks does it; of an all-to-all, those for other ranks."""
    size = max(len(record.ranks), 1)
    if record.op == "all_gather":
        return record.bytes * (size - 1)
    return _TIMES_AROUND.get(record.op, 1) * record.bytes * (size - 1) // size


def payload_bytes(record: Collective) -> int:
    """Bytes of the larger one of what a rank puts in and what it gets."""
    return record.bytes * (len(record.ranks) if record.op == "all_gather" else 1)
