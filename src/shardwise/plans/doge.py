"""Doge: a dynamic mask, computed from all values, one row a KV head."""

from __future__ import annotations

from torch import nn

from shardwise.heads import heads_of
from shardwise.plan import wildcard
from shardwise.plans.parts import rule
from shardwise.spec import Rule


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The corrections for a model whose decoder layers are `{prefix}layers.*`, on `size` ranks."""
    return [*_decays(model, prefix, size), rule(f"{prefix}layers.*.self_attn", "local_params", "A is local")]


def _decays(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """A, and the columns of dt_proj: one for each KV head, or each of its features."""
    found: list[Rule] = []
    for name, module in model.named_modules():
        if wildcard(name) == "layers.*.self_attn" and (heads := heads_of(module)) is not None and heads.problem(size) is None:
            columns = heads.kv_cut(module.get_parameter("dt_proj.weight").shape[1], size)
            reason = "the mask has a row for each local KV head; the model's plan leaves them all on every rank"
            found += [
                Rule(f"{prefix}{name}.A", "colwise", "shardwise", heads.kv_cut(heads.kv, size), reason=reason),
                Rule(f"{prefix}{name}.dt_proj", "rowwise_scatter_output", "shardwise", columns, reason=reason),
            ]
    return found
