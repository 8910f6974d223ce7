"""Rules that were found of a model with a few layers, for the one with all of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace

from torch import nn

from shardwise.errors import PlanError, describe
from shardwise.hf import layer_kinds
from shardwise.layers import Cut
from shardwise.names import Names, layer_of
from shardwise.plan import wildcard
from shardwise.spec import Rule


class OtherLengthsError(PlanError):
    """A rule of a model with a few layers that does not hold for one with all of them."""


def lifted(rules: Iterable[Rule], tried: nn.Module, model: nn.Module) -> list[Rule]:
    """The `rules` for the layers of `tried`, for those of `model`: a layer that is in both keeps its own, another one gets
    those of the first that is alike. Rules that all layers of a path have get one pattern, with `*` for the layers' numbers.

    Raises `PlanError` for a layer to which none in `tried` is alike; `OtherLengthsError` for a rule that says lengths of what
    has others in `model`.
    """
    like = _like(tried, model)
    layers, inside = set(like.values()), dict[str, dict[str, Rule]]()
    longer = _of_other_lengths(tried, model)
    for rule in rules:
        if (rule.attributes or rule.cut not in (None, Cut())) and any(_is_in(name, rule.pattern) for name in longer):
            raise OtherLengthsError(f"{type(model).__name__}: {rule} says lengths, which are others here.")
        layer = layer_of(rule.pattern)
        layer = layer if layer in layers else ""  # a number in a list of parameters is no layer
        inside.setdefault(layer, {})[rule.pattern.removeprefix(layer)] = rule
    found = {
        layer + rest: replace(rule, pattern=layer + rest)
        for layer, other in like.items()
        for rest, rule in inside.get(other, {}).items()
    }
    return _joined(found, model)


def _of_other_lengths(tried: nn.Module, model: nn.Module) -> list[str]:
    """The parameters outside of layers that have another shape in `model` than in `tried`."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if not layer_of(name)}
    return [name for name, parameter in tried.named_parameters() if shapes.get(name, parameter.shape) != parameter.shape]


def _is_in(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _like(tried: nn.Module, model: nn.Module) -> dict[str, str]:
    """For each layer of `model`, by its path, the one of `tried` that is like it."""
    kinds, theirs = layer_kinds(model), layer_kinds(tried)
    first: dict[tuple[str, Hashable], str] = {}
    for layer, kind in theirs.items():
        first.setdefault((wildcard(layer), kind), layer)
    exchanged = {(wildcard(layer), kinds.get(layer)): layer for layer in reversed(theirs)}  # some parts, as it ran
    found = {"": ""}
    for layer, kind in kinds.items():
        like = first.get((wildcard(layer), kind))
        if like is None:
            like = layer if layer in theirs else exchanged.get((wildcard(layer), kind), "")
        found[layer] = layer if theirs.get(layer) == kind else like
    missing = [layer for layer, other in found.items() if layer and not other]
    if missing:
        raise PlanError(
            describe(
                f"{type(model).__name__}: {missing[0]} is like none of the layers that a plan was tried out on.",
                tried=", ".join(filter(None, theirs)),
                either=["a plan of your own: tp_plan={...}, or", 'tp_plan="auto"'],
            )
        )
    return found


def _joined(rules: Mapping[str, Rule], model: nn.Module) -> list[Rule]:
    """One rule for all names that differ in numbers alone, where all of them have the same."""
    names = Names(dict.fromkeys([name for name, _ in (*model.named_modules(), *model.named_parameters())]))
    families: dict[str, list[Rule]] = {}
    for rule in rules.values():
        families.setdefault(wildcard(rule.pattern), []).append(rule)
    joined: list[Rule] = []
    for pattern, members in families.items():
        one = replace(members[0], pattern=pattern)
        alike = all(replace(member, pattern=pattern) == one for member in members)
        if alike and len(members) == len(names.matching(one)):
            joined.append(one)
        else:
            joined += members
    return joined
