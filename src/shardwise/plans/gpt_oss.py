"""gpt-oss: attention with sinks, and experts that are stored as (in, out), gate and up in turns, with biases."""

from __future__ import annotations

from torch import nn

from shardwise.layers import Cut
from shardwise.plans.parts import attention, rule
from shardwise.spec import Rule


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The rules for a model whose decoder layers are `{prefix}layers.*`. Its own plan knows the head alone."""
    experts, pairs = f"{prefix}layers.*.mlp.experts", "gate and up lie in turns: a pair stays together"
    return [
        *attention(model, prefix),
        # Stored as (experts, in, out), the dims are those of the other style.
        Rule(f"{experts}.gate_up_proj", "rowwise", "shardwise", Cut(unit=2), reason=pairs),
        Rule(f"{experts}.gate_up_proj_bias", "rowwise", "shardwise", Cut(unit=2), reason=pairs),
        rule(f"{experts}.down_proj", "colwise"),
        rule(f"{experts}.down_proj_bias", "replicate", "added to a sum over ranks: the first rank's counts"),
        rule(experts, "moe_tp_experts", "each rank computes its slice of every expert"),
    ]
