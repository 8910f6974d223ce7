"""ZAYA: compressed convolutional attention, and a router that carries a state from layer to layer."""

from __future__ import annotations

from torch import nn

from shardwise.plans.parts import mixer, rule, whole
from shardwise.spec import Rule


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The rules for a model whose decoder layers are `{prefix}layers.*`. Its own plan knows dealt experts alone."""
    convolved = "attention whose queries and keys are convolved over time: computed whole"
    projections = [f"qkv_proj.{name}" for name in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")]
    experts = f"{prefix}layers.*.mlp.experts"
    return [
        *mixer(model, prefix, "layers.*.self_attn", convolved, [*projections, "o_proj"]),
        *whole(model, prefix, "layers.*.mlp.gate", "the router"),
        rule(f"{experts}.gate_up_proj", "packed_colwise", "gate | up, each cut on its own"),
        rule(f"{experts}.down_proj", "rowwise"),
        rule(experts, "moe_tp_experts", "each rank computes its slice of every expert"),
    ]
