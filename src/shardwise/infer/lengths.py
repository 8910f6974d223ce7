"""Numbers of linear layers that somebody wrote himself: how long their matrix is along the dim that is cut."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from shardwise.infer.proposals import Proposal
from shardwise.layers import Cut
from shardwise.layers.registry import style_named
from shardwise.layout import Layout
from shardwise.spec import Rule

Number = tuple[str, str]
"""A number that code reads: a module's name, and the attribute (or "config.name") of it."""


def own_numbers(model: nn.Module, proposal: Proposal, read: Collection[Number]) -> Iterator[list[list[Number]]]:
    """Of the numbers `read` of modules that hold one cut matrix each: for each kind of such modules the ways to choose, one of
    which says how long the matrix is along the dim that is cut. Both numbers of a square one may.
    """
    kinds: dict[tuple[object, ...], dict[str, list[str]]] = {}
    for path, name in read:
        place = f"{proposal.place}.{path}".strip(".")
        rule = matrix_of(model, proposal, place)
        if rule is not None:
            kinds.setdefault((type(model.get_submodule(place)), rule.style), {}).setdefault(path, []).append(name)
    for paths in kinds.values():
        names = dict.fromkeys(name for found in paths.values() for name in found)
        ways = [[(path, name) for path in paths] for name in names if all(_says(model, proposal, p, name) for p in paths)]
        if ways:
            yield ways


def matrix_of(model: nn.Module, proposal: Proposal, place: str) -> Rule | None:
    """The rule for the matrix of a module that holds a single one, and nothing else but vectors."""
    module = model.get_submodule(place)
    held = [f"{place}.{name}" for name, p in module._parameters.items() if p is not None and p.dim() > 1]
    if module._modules or len(held) != 1:
        return None
    return next((rule for rule in proposal.rules if rule.pattern == held[0] and _cut(model, rule) is not None), None)


def lengths(model: nn.Module, rule: Rule, size: int) -> tuple[int, ...]:
    """How long each rank's part is of the matrix that `rule` cuts, along that dim."""
    shape, (dim, layout) = tuple(model.get_parameter(rule.pattern).shape), _cut(model, rule) or (0, None)
    assert layout is not None
    return tuple(layout.local_shape(shape, rank, size)[dim] for rank in range(size))


def _cut(model: nn.Module, rule: Rule) -> tuple[int, Layout] | None:
    """Along which dim it is, and how."""
    shape = tuple(model.get_parameter(rule.pattern).shape)
    layout = style_named(rule.style, str(rule)).layout(shape, rule.cut or Cut())
    cut = layout.cut(shape)
    return None if cut is None else (cut[0], layout)


def _says(model: nn.Module, proposal: Proposal, path: str, name: str) -> bool:
    """Whether a module's number is the length of the dim of its matrix that is cut."""
    place = f"{proposal.place}.{path}".strip(".")
    rule = matrix_of(model, proposal, place)
    assert rule is not None
    dim, _ = _cut(model, rule) or (0, None)
    value: object = getattr(model.get_submodule(place), name, None)
    return value == model.get_parameter(rule.pattern).shape[dim]
