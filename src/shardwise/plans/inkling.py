"""Inkling and Inkling 2: [gate | up] experts, shared experts of bare parameters, an embedding with a norm in its forward."""

from __future__ import annotations

from torch import nn

from shardwise.plans.parts import mixer, rule
from shardwise.spec import Rule


def inkling(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The corrections for Inkling, whose decoder layers are `{prefix}layers.*`."""
    reason = "its input enters a parallel region, which all_reduce does not say"
    return [rule(f"{prefix}layers.*.mlp.shared_experts", "moe_tp_experts", reason), *_both(model, prefix)]


def inkling2(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The corrections for Inkling 2, whose decoder layers are `{prefix}layers.*`."""
    reason = "the norm goes over a row's features, so the rows can be cut"
    return [rule(f"{prefix}embed_tokens", "embedding_rowwise", reason), *_both(model, prefix)]


def _both(model: nn.Module, prefix: str) -> list[Rule]:
    straight = "gate | up: cut straight through, a rank would get one of them"
    projections = ["q_proj", "k_proj", "v_proj", "r_proj", "gate_proj", "o_proj"]
    convolved = "attention whose keys and values are convolved over time: computed whole"
    return [
        rule(f"{prefix}layers.*.mlp.experts.gate_up_proj", "packed_colwise", straight),
        rule(f"{prefix}embed_tokens.embed_norm", "replicated_with_grad_allreduce", "it sees the rows of the rank's own ids"),
        *mixer(model, prefix, "layers.*.self_attn", convolved, projections),
    ]
