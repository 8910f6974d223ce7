"""Modules that a model exchanges for others in its first forward pass: attention that is sparse for long texts alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from torch import nn

from shardwise.spec import Rule

_HEADS = "num_attention_heads"


def exchanged(model: nn.Module, run: nn.Module) -> frozenset[str]:
    """The names of the modules of `model` that are others in `run`, which is the same after a forward pass."""
    owners = {f"{name}." for name, module in model.named_modules() if hasattr(module, "set_attention_type")}
    there = dict(run.named_modules())
    found = ((name, type(module)) for name, module in model.named_modules() if f"{name.rpartition('.')[0]}." in owners)
    return frozenset(name for name, kind in found if name in there and type(there[name]) is not kind)


def switched(model: nn.Module, names: Collection[str], rules: Iterable[Rule]) -> list[Rule]:
    """`rules`, such that the modules `names` of `model`, which are `exchanged`, keep their local numbers then."""
    found = []
    for rule in rules:
        owner = rule.pattern.rpartition(".")[0]
        if not rule.attributes or rule.pattern not in names:
            found.append(rule)
            continue
        attributes = {**_local_heads(model.get_submodule(rule.pattern), rule), **rule.attributes}
        found.append(replace(rule, style="block_heads", attributes=attributes))
        found.append(Rule(owner, "switched_attention", "inferred", reason="its attention is another one for short texts"))
    return found


def _local_heads(module: nn.Module, rule: Rule) -> dict[str, tuple[int, ...]]:
    """How many heads each rank has, by the first of the numbers that are local."""
    name, local = next(iter(rule.attributes.items()))
    heads, full = getattr(module, _HEADS), getattr(module, name)
    return {_HEADS: tuple(heads * part // full for part in local)}
