"""Modules that a model exchanges for others in its first forward pass: attention that is sparse for long texts alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from shardwise.spec import Rule

_HEADS = "num_attention_heads"


def switched(model: nn.Module, run: nn.Module, rules: Iterable[Rule]) -> list[Rule]:
    """`rules`, such that modules of `model` that are others in `run`, which is the same after a forward pass, keep their local
    numbers when they are exchanged.
    """
    found = []
    for rule in rules:
        owner = rule.pattern.rpartition(".")[0]
        if not rule.attributes or not _is_exchanged(model, run, rule.pattern):
            found.append(rule)
            continue
        attributes = {**_local_heads(model.get_submodule(rule.pattern), rule), **rule.attributes}
        found.append(replace(rule, style="block_heads", attributes=attributes))
        found.append(Rule(owner, "switched_attention", "inferred", reason="its attention is another one for short texts"))
    return found


def _is_exchanged(model: nn.Module, run: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return hasattr(owner, "set_attention_type") and type(model.get_submodule(name)) is not type(run.get_submodule(name))


def _local_heads(module: nn.Module, rule: Rule) -> dict[str, tuple[int, ...]]:
    """How many heads each rank has, by the first of the numbers that are local."""
    name, local = next(iter(rule.attributes.items()))
    heads, full = getattr(module, _HEADS), getattr(module, name)
    return {_HEADS: tuple(heads * part // full for part in local)}
