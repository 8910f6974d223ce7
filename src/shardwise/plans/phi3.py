"""Phi-3: fused projections.

transformers' plan computes both projections column-wise, gathers the outputs and computes attention and activation whole on
every rank. Cut block by block (q | k | v, gate | up) nothing has to be gathered, and attention runs on local heads.
"""

from __future__ import annotations

from torch import nn

from shardwise.plans.fused import Fused
from shardwise.plans.parts import packed_mlp
from shardwise.spec import Rule

ATTENTION = Fused(
    "layers.*.self_attn",
    "qkv_proj",
    "o_proj",
    {"config.num_attention_heads": "query", "num_key_value_heads": "kv", "num_key_value_groups": "group"},
    otherwise="leave",
)


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The corrections for a model whose decoder layers are `{prefix}layers.*`, on `size` ranks."""
    return [*ATTENTION.rules(model, prefix, size), *packed_mlp(prefix, "layers.*.mlp")]
