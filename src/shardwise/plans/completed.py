"""Families whose own plan is right and leaves much whole: often the experts alone are cut. What is missing is plain attention,
latent attention, or MLPs (shared experts, dense layers).
"""

from __future__ import annotations

from torch import nn

from shardwise.plans import delta, normed
from shardwise.plans.mixers import mamba, mamba2
from shardwise.plans.parts import (
    LATENT,
    attention,
    latent_attention,
    mixer,
    mlp,
    packed_mlp,
    places,
    rule,
    whole,
)
from shardwise.spec import Rule

SHARED = "layers.*.mlp.shared_experts"
_ATTENTION = "layers.*.self_attn"


def afmoe(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Attention with an output gate, dense MLPs, shared experts."""
    return [*attention(model, prefix, also=["gate_proj"]), *mlp(prefix, "layers.*.mlp"), *mlp(prefix, SHARED)]


def latent(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Latent attention."""
    return latent_attention(model, prefix)


def wide_latent(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Latent attention in a narrow model, of which the latent projections are a large part."""
    return latent_attention(model, prefix, gathered=True)


def wide_latent_alone(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The same, where the model's plan knows the rest of attention."""
    return [found for found in wide_latent(model, prefix, size) if "_a_proj" in found.pattern]


def latent_queries(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The queries' latent, where the model's plan names all else of latent attention; an indexer, where it has one."""
    found = [rule(f"{prefix}{place}.q_a_proj", "replicate", LATENT) for place in places(model, _ATTENTION, having="q_a_proj")]
    return [*found, *whole(model, prefix, f"{_ATTENTION}.indexer", "the indexer, which chooses tokens for all heads at once")]


def plain_attention(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Attention, and sinks where it has them."""
    return attention(model, prefix)


def shared_experts(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Shared experts."""
    return mlp(prefix, SHARED)


def glm4_moe_lite(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Shared experts, and the queries, with or without a latent."""
    queries = [f"{prefix}{place}.q_proj" for place in places(model, _ATTENTION, having="q_proj")]
    return [*mlp(prefix, SHARED), *(rule(query, "colwise") for query in queries), *latent_queries(model, prefix, size)]


def shared_expert(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The one shared expert."""
    return mlp(prefix, "layers.*.mlp.shared_expert")


def granite(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Attention, shared MLPs, and in the hybrid's other layers a Mamba-2 mixer."""
    return [
        *attention(model, prefix),
        *packed_mlp(prefix, "layers.*.shared_mlp", "input_linear", "output_linear"),
        *mamba2(model, prefix, "layers.*.mamba", size),
    ]


def hunyuan(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Attention and the shared MLP beside the experts."""
    return [*attention(model, prefix), *mlp(prefix, "layers.*.mlp.shared_mlp")]


def minimax_m3(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Fused MLPs, dense and shared."""
    return [*packed_mlp(prefix, "layers.*.mlp"), *packed_mlp(prefix, SHARED)]


def jamba(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Attention and dense MLPs, and a Mamba mixer in most layers."""
    return [
        *attention(model, prefix),
        *mlp(prefix, "layers.*.feed_forward"),
        *mamba(model, prefix, "layers.*.mamba", size),
    ]


def mamba2_and_attention(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Attention, a Mamba-2 mixer, in each layer one of them (Bamba) or both (Falcon-H1), and an MLP."""
    return [*attention(model, prefix), *mlp(prefix, "layers.*.feed_forward"), *mamba2(model, prefix, "layers.*.mamba", size)]


def plain_decoder(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Attention and MLPs as Llama's, in a model without a plan of its own."""
    return [*attention(model, prefix), *mlp(prefix, "layers.*.mlp")]


def nemotron_h(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Every layer is one mixer: attention, an MLP, experts with shared ones, or Mamba-2."""
    path = "layers.*.mixer"
    return [
        *attention(model, prefix, path),
        *mlp(prefix, path, ["up_proj"]),
        *mlp(prefix, f"{path}.shared_experts", ["up_proj"]),
        *mamba2(model, prefix, path, size),
    ]


def delta_and_latent(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Layers of latent attention and of Kimi delta attention, both called `self_attn`."""
    return [*latent_attention(model, prefix, also=["g_proj"]), *delta.delta_attention(model, prefix, size)]


def olmo_hybrid(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Attention whose queries and keys are normed over all heads, and in most layers a gated delta net."""
    return [*normed.attentions(model, prefix, size), *delta.gated_delta_net(model, prefix, size)]


def deepseek_v4(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Shared experts; attention has one KV head, which all ranks would keep, and projects its output in groups of heads."""
    reason = "attention with one latent KV head, and an output projected in groups of heads: computed whole"
    return [*mlp(prefix, SHARED), *mixer(model, prefix, "layers.*.self_attn", reason, ["q_b_proj", "o_b_proj"])]


def mistral_large4(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Latent attention behind an indexer, with a learnt scale for each head."""
    reason = "latent attention behind an indexer, computed whole"
    return mixer(model, prefix, "layers.*.self_attn", reason, ["q_proj", "kv_b_proj", "o_proj"])


def step3p5(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Dense MLPs and shared experts."""
    return [*mlp(prefix, "layers.*.mlp"), *mlp(prefix, SHARED)]


def qwen4(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Attention behind an indexer, which chooses tokens for all heads at once; several residual streams; gated delta nets."""
    reason = "from a low rank to the weights of all residual streams"
    streams = [f"{prefix}layers.*.{part}_hyper_connection.input_mix_weight_up" for part in ("attn", "mlp")]
    whole_ones = [rule(name, "replicate", reason) for name in streams]
    return [*attention(model, prefix), *whole_ones, *delta.gated_delta_net(model, prefix, size)]


def glm(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """A fused MLP, whose activations transformers' plan gathers."""
    return packed_mlp(prefix, "layers.*.mlp")
