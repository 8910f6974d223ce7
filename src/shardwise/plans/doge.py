"""Doge: a dynamic mask, computed from all values, one row a KV head."""

from __future__ import annotations

from torch import nn

from shardwise.heads import heads_of
from shardwise.plans.parts import rule
from shardwise.spec import Rule


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The corrections for a model whose decoder layers are `{prefix}layers.*`, on `size` ranks."""
    attention = f"{prefix}layers.*.self_attn"
    heads = next((heads_of(module) for name, module in model.named_modules() if name.endswith(".self_attn")), None)
    if heads is None or heads.shared(size):
        shared = "a KV head that ranks share would enter the dynamic mask more than once"
        return [
            rule(f"{attention}.{child}", "replicate", shared) for child in ("q_proj", "k_proj", "v_proj", "dt_proj", "o_proj")
        ]
    reason = "the mask's rows belong to the local KV heads; the model's plan leaves them all on every rank"
    return [
        rule(f"{attention}.dt_proj", "rowwise_scatter_output", reason),
        rule(f"{attention}.A", "colwise", reason),
        rule(attention, "local_params", "A is local"),
    ]
