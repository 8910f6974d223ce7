"""Inkling and Inkling 2: [gate | up] experts, shared experts of bare parameters, an embedding with a norm in its forward."""

from __future__ import annotations

from torch import nn

from shardwise.plans.parts import mixer, rule
from shardwise.spec import Rule


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The corrections for a model whose decoder layers are `{prefix}layers.*`."""
    experts, convolved = f"{prefix}layers.*.mlp", "keys and values are convolved over time: computed whole"
    return [
        rule(
            f"{experts}.experts.gate_up_proj", "packed_colwise", "gate | up: cut straight through, a rank would get one of them"
        ),
        rule(
            f"{experts}.shared_experts", "moe_tp_experts", "its input enters a parallel region, which all_reduce does not say"
        ),
        rule(f"{prefix}embed_tokens", "embedding_rowwise", "the norm is over a row's features, so rows can be cut"),
        rule(
            f"{prefix}embed_tokens.embed_norm",
            "replicated_with_grad_allreduce",
            "it sees the rows of the rank's own ids only",
        ),
        *mixer(model, prefix, "layers.*.self_attn", convolved, ["q_proj", "k_proj", "v_proj", "r_proj", "gate_proj", "o_proj"]),
    ]
