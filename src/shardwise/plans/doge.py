"""Doge: a dynamic mask, computed from all values, one row a KV head."""

from __future__ import annotations

from typing import Any

from torch import nn

from shardwise.heads import heads_of
from shardwise.plans.parts import modules_at, rule
from shardwise.spec import Rule

_REASON = "the mask has a row for each local KV head; the model's plan leaves them all on every rank"


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The corrections for a model whose decoder layers are `{prefix}layers.*`, on `size` ranks."""
    places = modules_at(model, "layers.*.self_attn")
    return [found for name, module in places for found in _mask(prefix + name, module, size) or ()]


def dealt(name: str, module: Any, size: int) -> list[Rule] | None:
    """The rules for module `name` on `size` ranks; None of one that is no such attention, or whose heads can't be dealt."""
    mask = _mask(name, module, size)
    if mask is None:
        return None
    projections = [rule(f"{name}.{child}_proj", "colwise", "local heads, as the mask's rows are theirs") for child in "qkv"]
    return [*projections, *mask, rule(f"{name}.o_proj", "rowwise", "reads the local heads")]


def _mask(name: str, module: Any, size: int) -> list[Rule] | None:
    """A, and the columns of dt_proj: one for each KV head, or each of its features."""
    heads = heads_of(module)
    if heads is None or heads.problem(size) or not {"dt_proj", "q_proj"} <= module._modules.keys() or not hasattr(module, "A"):
        return None
    columns = heads.kv_cut(module.dt_proj.weight.shape[1], size)
    return [
        Rule(f"{name}.A", "colwise", "shardwise", heads.kv_cut(heads.kv, size), reason=_REASON),
        Rule(f"{name}.dt_proj", "rowwise_scatter_output", "shardwise", columns, reason=_REASON),
        rule(name, "local_params", "A is local"),
    ]
