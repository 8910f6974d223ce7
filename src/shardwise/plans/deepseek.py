"""DeepSeek-V3: multi-head latent attention, which transformers' plan leaves whole (a quarter of a small model's parameters).

The latent projections are small and read by all heads, so they stay whole; what expands the latents to heads is cut between
heads.
"""

from __future__ import annotations

from torch import nn

from shardwise.spec import Rule


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The corrections for a model whose decoder layers are `{prefix}layers.*`."""
    attention = f"{prefix}layers.*.self_attn"
    latent = "a latent that all heads read"
    return [
        Rule(f"{attention}.q_a_proj", "replicate", "shardwise", reason=latent),
        Rule(f"{attention}.q_b_proj", "colwise", "shardwise", reason="left whole by the model's plan"),
        Rule(f"{attention}.q_proj", "colwise", "shardwise", reason="left whole by the model's plan"),
        Rule(f"{attention}.kv_a_proj_with_mqa", "mla_kv_a_proj", "shardwise", reason=latent),
        Rule(f"{attention}.kv_b_proj", "colwise", "shardwise", reason="left whole by the model's plan"),
        Rule(f"{attention}.o_proj", "rowwise", "shardwise", reason="left whole by the model's plan"),
    ]
