"""gpt-oss: attention with sinks, and experts that are stored as (in, out), gate and up in turns, with biases."""

from __future__ import annotations

from typing import Any

from torch import nn

from shardwise.layers import ALIGNED, Cut
from shardwise.plans.parts import MISSING, attention, rule
from shardwise.spec import Rule


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The rules for a model whose decoder layers are `{prefix}layers.*`. Its own plan knows the head alone."""
    experts, pairs = f"{prefix}layers.*.mlp.experts", "gate and up lie in turns: a pair stays together"
    config: Any = model.config
    width = config.intermediate_size
    unit = ALIGNED if width % ALIGNED == 0 and width // ALIGNED >= size else 1
    return [
        *attention(model, prefix),
        # Stored as (experts, in, out), the dims are those of the other style.
        Rule(f"{experts}.gate_up_proj", "rowwise", "shardwise", Cut(unit=2 * unit), reason=pairs),
        Rule(f"{experts}.gate_up_proj_bias", "rowwise", "shardwise", Cut(unit=2 * unit), reason=pairs),
        Rule(f"{experts}.down_proj", "colwise", "shardwise", Cut(unit=unit), reason=MISSING),
        rule(f"{experts}.down_proj_bias", "replicate", "added to a sum over ranks: the first rank's counts"),
        rule(experts, "moe_tp_experts", "each rank computes its slice of every expert"),
    ]
