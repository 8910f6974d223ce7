"""What is in the picture of a layer, and in which row: the same for a page and for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from shardwise.debug.record import Collective
from shardwise.estimate.flow import INPUT, Node
from shardwise.estimate.kinds import LayerKind
from shardwise.estimate.picture.matrix import Matrix, matrix
from shardwise.plan import Plan

_DUALS = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather", "all_to_all": "all_to_all"}


@dataclass(frozen=True)
class Box:
    """One thing in the picture.

    Args:
        number: of the box, to be named as an input.
        kind: a module's parameters, a product of activations, a sum, or collectives at one place.
        module: the path in the layer.
        inputs: the boxes that it needs, and `INPUT`.
        matrices: of the module.
        collectives: at this place, forward and backward; of parameters, those that sum their gradients.
    """

    number: int
    kind: Literal["parameters", "mix", "sum", "collective"]
    module: str
    inputs: frozenset[int]
    matrices: tuple[Matrix, ...] = ()
    collectives: tuple[Collective, ...] = ()

    @property
    def title(self) -> str:
        """The last part of the module's name."""
        name = self.module.rpartition(".")[2]
        if self.kind == "mix":
            return "attention" if "att" in name and "linear" not in name else name
        return f"{name} {self.matrices[0].name}" if [one.name for one in self.matrices] == ["bias"] else name

    @property
    def cut(self) -> bool:
        """Whether a rank holds a part of it only."""
        return any(part.rank is not None for one in self.matrices for part in one.parts) or any(m.dealt for m in self.matrices)


@dataclass(frozen=True)
class Scene:
    """The picture of one kind of layer.

    Args:
        title: which layers.
        ranks: colours.
        rows: from the layer's input down to its output; what is in a row needs nothing of the same row.
        last: the output.
    """

    title: str
    ranks: int
    rows: tuple[tuple[Box, ...], ...]
    last: int

    @property
    def boxes(self) -> list[Box]:
        """All of them, from the top."""
        return [box for row in self.rows for box in row]


@dataclass
class _Draft:
    """Boxes in the making."""

    boxes: dict[int, Box] = field(default_factory=dict)
    end: list[Collective] = field(default_factory=list)

    def extend(self, number: int, record: Collective) -> None:
        """One more collective at a box."""
        box = self.boxes[number]
        self.boxes[number] = replace(box, collectives=(*box.collectives, record))

    def find(self, kind: str, wanted: Iterable[str]) -> int | None:
        """The first box of a kind whose module is, or is inside of, one of `wanted`."""
        for name in wanted:
            for number, box in self.boxes.items():
                if box.kind == kind and (box.module == name or box.module.startswith(f"{name}.")):
                    return number
        return None


def scene(kind: LayerKind, plan: Plan) -> Scene | None:
    """The picture of a kind of layer; None where its flow is not known."""
    if not kind.nodes:
        return None
    draft = _Draft()
    forward = iter([record for record in kind.collectives if record.phase == "forward"])
    for number, node in enumerate(kind.nodes):
        record = next(forward, None) if node.kind == "collective" else None
        matrices = tuple(_matrices(kind, plan, node))
        inputs = _needed(kind.nodes, node)
        draft.boxes[number] = Box(number, node.kind, node.module, inputs, matrices, (record,) if record else ())
    for record in kind.collectives:
        if record.phase == "recompute":
            _again(draft, kind, record)
        elif record.phase == "backward":
            _backward(draft, kind, record)
    last = len(kind.nodes) - 1
    if draft.end:
        _at_the_top(draft)
    return Scene(kind.title, max(plan.size, plan.ep_size), tuple(_rows(draft.boxes)), last)


def _matrices(kind: LayerKind, plan: Plan, node: Node) -> Iterable[Matrix]:
    modules = {row.name: row for row in plan.modules}
    for name in node.parameters:
        row = next((found for layer in kind.layers if (found := plan.get(f"{layer}.{name}")) is not None), None)
        if row is not None:
            owner = modules.get(f"{kind.layers[0]}.{node.module}")
            yield matrix(plan, row, name.rpartition(".")[2], bool(owner and owner.transposed))


def _needed(nodes: Sequence[Node], node: Node) -> frozenset[int]:
    """Its inputs. A collective is of one tensor: what that came from by a longer way is left out."""
    if node.kind != "collective":
        return node.inputs
    above = frozenset[int]().union(*(_all_above(nodes, one) for one in node.inputs))
    return node.inputs - above


def _all_above(nodes: Sequence[Node], number: int) -> frozenset[int]:
    if number == INPUT:
        return frozenset()
    inputs = nodes[number].inputs
    return inputs.union(*(_all_above(nodes, one) for one in inputs))


def _again(draft: _Draft, kind: LayerKind, record: Collective) -> None:
    """Forward again, for activation checkpointing."""
    for number, box in draft.boxes.items():
        what = [(one.phase, one.op, one.module, one.shape) for one in box.collectives]
        if ("forward", *_what(record)) in what and ("recompute", *_what(record)) not in what:
            draft.extend(number, record)
            return
    draft.end.append(record)


def _what(record: Collective) -> tuple[str, str, tuple[int, ...]]:
    return record.op, record.module, record.shape


def _backward(draft: _Draft, kind: LayerKind, record: Collective) -> None:
    module = kind.inside(record.module)
    at = draft.find("parameters", [module] if module else [])
    if at is None:
        draft.end.append(record)
    elif record.parameter or any(record.shape in (one.shape, one.local) for one in draft.boxes[at].matrices):
        draft.extend(at, record)
    elif (dual := _dual(draft, record)) is not None:
        draft.extend(dual, record)
    elif not draft.boxes[at].cut and draft.boxes[at].module == module:
        _behind(draft, at, record)
    else:
        _in_front(draft, at, record)


def _dual(draft: _Draft, record: Collective) -> int | None:
    """The collective whose backward `record` is."""
    for number, box in draft.boxes.items():
        if box.kind == "collective" and box.collectives:
            first, *rest = box.collectives
            alike = first.phase == "forward" and first.module == record.module and _DUALS.get(first.op) == record.op
            if alike and not any(one.phase == "backward" for one in rest):
                return number
    return None


def _in_front(draft: _Draft, at: int, record: Collective) -> None:
    """In front of the module and of its siblings that read the same: forward passes here, the sum of backward is made here."""
    target = draft.boxes[at]
    before = [draft.boxes[one] for one in target.inputs if one in draft.boxes]
    for box in before:
        if box.kind == "collective" and all(one.phase == "backward" for one in box.collectives):
            draft.extend(box.number, record)
            return
    number = max(draft.boxes) + 1
    parent = target.module.rpartition(".")[0]
    readers = [
        box
        for box in draft.boxes.values()
        if box.number == at
        or (box.kind == "parameters" and box.inputs == target.inputs and box.cut and box.module.rpartition(".")[0] == parent)
    ]
    draft.boxes[number] = Box(number, "collective", target.module, target.inputs, collectives=(record,))
    for box in readers:
        draft.boxes[box.number] = replace(box, inputs=frozenset({number}))


def _behind(draft: _Draft, at: int, record: Collective) -> None:
    """Behind a module that every rank computes whole, whose output is then used by each rank's part of the heads."""
    number = max(draft.boxes) + 1
    for box in list(draft.boxes.values()):
        if at in box.inputs and (box.kind != "parameters" or box.cut):
            draft.boxes[box.number] = replace(box, inputs=box.inputs - {at} | {number})
    draft.boxes[number] = Box(number, "collective", draft.boxes[at].module, frozenset({at}), collectives=(record,))


def _at_the_top(draft: _Draft) -> None:
    """What comes last in backward, of no module of its own."""
    number = max(draft.boxes) + 1
    for box in [box for box in draft.boxes.values() if INPUT in box.inputs]:
        draft.boxes[box.number] = replace(box, inputs=box.inputs - {INPUT} | {number})
    draft.boxes[number] = Box(number, "collective", "", frozenset({INPUT}), collectives=tuple(draft.end))


def _rows(boxes: dict[int, Box]) -> list[tuple[Box, ...]]:
    """By the longest way from the input."""
    levels: dict[int, int] = {INPUT: -1}

    def level(number: int) -> int:
        if number not in levels:
            levels[number] = 1 + max((level(one) for one in boxes[number].inputs), default=-1)
        return levels[number]

    rows: dict[int, list[Box]] = {}
    for number, box in boxes.items():
        rows.setdefault(level(number), []).append(box)
    return [tuple(sorted(rows[one], key=lambda box: box.number)) for one in sorted(rows)]
