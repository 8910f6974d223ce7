"""A plan taken apart: what is cut by itself, from where activations become parts to where they are put together again."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from shardwise.layers import Replicate
from shardwise.layout import Replicated
from shardwise.names import layer_of
from shardwise.plan import Plan, wildcard
from shardwise.spec import ModuleSpec, Rule, ShardSpec

Row = ModuleSpec | ShardSpec


@dataclass(frozen=True)
class Part:
    """What is cut by itself, in all layers that have it alike.

    Args:
        name: its modules, with `*` for the layers' numbers: "model.layers.*.self_attn".
        count: how many layers have it.
        places: the modules' paths, in all of these layers.
        rows: those of the plan, in all of these layers.
    """

    name: str
    count: int
    places: frozenset[str]
    rows: tuple[Row, ...]

    def __contains__(self, name: str) -> bool:
        """Whether the module or parameter called `name` is in it."""
        return not self.places.isdisjoint((_place(name), _place_of_tensor(name)))

    @property
    def rules(self) -> list[Rule]:
        """Those that led to it."""
        return list({id(row.rule): row.rule for row in self.rows if row.rule is not None}.values())

    @property
    def styles(self) -> str:
        """What becomes of its modules, those of the same style together: "q_proj, k_proj: colwise; o_proj: rowwise"."""
        found: dict[str, dict[str, None]] = {}
        named = dict.fromkeys((rule.style, wildcard(rule.pattern)) for rule in self.rules)
        paths = [pattern.split(".") for _, pattern in named]
        common = sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, zip(*paths, strict=False)))
        for (style, _), path in zip(named, paths, strict=True):
            found.setdefault(style, {})[".".join(path[common:]) or path[-1]] = None
        if len(paths) == 1:
            return next(iter(found))
        return "; ".join(f"{', '.join(names)}: {style}" for style, names in found.items())


def parts_of(plan: Plan) -> list[Part]:
    """The parts of `plan`, in the order of the model."""
    alike: dict[Hashable, list[list[Row]]] = {}
    for rows in _groups(plan):
        alike.setdefault(frozenset(map(_kind, rows)), []).append(rows)
    found = []
    for members in alike.values():
        name = _name(members[0])
        rows = [row for rows in members for row in rows]
        places = frozenset(map(_place_of_row, rows))
        found.append(Part(wildcard(name) if len(members) > 1 else name, len(members), places, tuple(rows)))
    return found


def only(plan: Plan, parts: Iterable[Part]) -> Plan:
    """`plan` with these parts of it, and everything else whole."""
    kept = {(type(row), row.name) for part in parts for row in part.rows}
    tensors = tuple(
        row if (type(row), row.name) in kept else replace(row, layout=Replicated(), partial=False, rule=None)
        for row in plan.tensors
    )
    return replace(plan, tensors=tensors, modules=tuple(row for row in plan.modules if (type(row), row.name) in kept))


def _groups(plan: Plan) -> list[list[Row]]:
    """The rows, those that belong together in one list: of one module of a layer, of a layer that leaves parts and the one that
    sums them, of tied parameters.
    """
    group: dict[str, str] = {}

    def root(place: str) -> str:
        while group.setdefault(place, place) != place:
            place = group[place]
        return place

    rows: list[Row] = [*plan.modules, *(row for row in plan.tensors if row.sharded or row.partial)]
    for a, b in (*_pairs(plan.modules), *_ties(plan.tensors)):
        group[root(b)] = root(a)
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(root(_place_of_row(row)), []).append(row)
    return [rows for rows in found.values() if any(isinstance(row, ShardSpec) or row.style is not Replicate for row in rows)]


def _pairs(modules: Sequence[ModuleSpec]) -> Iterator[tuple[str, str]]:
    """The places of layers that leave parts, each with that of the layer behind it that sums them: a child of the same module,
    or else the nearest.
    """
    opened: list[str] = []
    for row in modules:
        layer, parent = layer_of(row.name), row.name.rpartition(".")[0]
        opened = [name for name in opened if layer_of(name) == layer]
        if row.style.opens_region:
            opened.append(row.name)
        elif row.style.closes_region and opened:
            siblings = [name for name in opened if name.rpartition(".")[0] == parent] or opened[-1:]
            yield from ((_place(name), _place(row.name)) for name in siblings)
            opened = [name for name in opened if name not in siblings]


def _ties(tensors: Iterable[ShardSpec]) -> Iterator[tuple[str, str]]:
    yield from ((_place_of_row(row), _place_of_tensor(name)) for row in tensors if row.sharded for name in row.aliases)


def _place_of_row(row: Row) -> str:
    return _place(row.name) if isinstance(row, ModuleSpec) else _place_of_tensor(row.name)


def _place_of_tensor(name: str) -> str:
    owner = name.rpartition(".")[0]
    return _place(name if owner in ("", layer_of(name)) else owner)


def _place(name: str) -> str:
    """The child of a layer in which the module `name` is; outside of layers itself."""
    layer = layer_of(name)
    return layer + "." + name.removeprefix(f"{layer}.").partition(".")[0] if layer and layer != name else name


def _kind(row: Row) -> Hashable:
    """What makes a row like another one of another layer."""
    name = wildcard(row.name)
    if isinstance(row, ShardSpec):
        return name, row.shape, row.layout, row.partial
    return name, row.style, tuple(row.attributes.items()), tuple(row.options.items()), row.region


def _name(rows: Collection[Row]) -> str:
    """Of modules that belong together: the first with its path, of the others their last segments."""
    first, *others = dict.fromkeys(map(_place_of_row, rows))
    parent = first.rpartition(".")[0]
    return ", ".join([first, *(name.removeprefix(f"{parent}.") for name in others)])
