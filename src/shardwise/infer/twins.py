"""Layers whose parameters are all those of others: what is found of one holds for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from shardwise.spec import Rule

Twins = Mapping[str, tuple[str, ...]]


def find_twins(model: nn.Module) -> Twins:
    """By name, the other modules and parameters that are tied to a module or parameter: of the same class, with the same
    tensors under the same names inside. Their products are one product, so islands name the first of them alone.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, module in model.named_modules():
        inside = [(child, id(tensor)) for child, tensor in module.named_parameters(remove_duplicate=False)]
        if not inside:
            continue
        groups.setdefault((type(module), *inside), []).append(name)
        for child in module._parameters:
            groups.setdefault((type(module), child, *inside), []).append(f"{name}.{child}")
    return {names[0]: tuple(names[1:]) for names in groups.values() if len(names) > 1}


def with_twins(rules: Iterable[Rule], twins: Twins) -> list[Rule]:
    """`rules`, and the same for what is tied to what they name."""
    found = list(rules)
    named = {rule.pattern for rule in found}
    return found + [replace(rule, pattern=name) for rule in found for name in twins.get(rule.pattern, ()) if name not in named]
