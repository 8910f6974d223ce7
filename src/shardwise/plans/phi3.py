"""Phi-3: fused qkv and gate_up projections.

transformers' plan computes both projections column-wise, gathers the outputs and computes attention and activation whole on
every rank. Cut block by block (q | k | v, gate | up) nothing has to be gathered, and attention runs on local heads.
"""

from __future__ import annotations

from torch import nn

from shardwise.heads import heads_of
from shardwise.layers import Cut
from shardwise.layout import Block
from shardwise.plan import wildcard
from shardwise.spec import Rule


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The corrections for a model whose decoder layers are `{prefix}layers.*`, on `size` ranks."""
    return [
        rule
        for name, module in model.named_modules()
        if wildcard(name) == "layers.*.self_attn"
        for rule in _attention(prefix + name, module, size)
    ] + [
        Rule(f"{prefix}layers.*.mlp.gate_up_proj", "packed_colwise", "shardwise", reason="gate | up, each cut on its own"),
        Rule(f"{prefix}layers.*.mlp.down_proj", "rowwise", "shardwise", reason="reads the local half of gate and up"),
    ]


def _attention(name: str, module: nn.Module, size: int) -> list[Rule]:
    heads, width = heads_of(module), module.head_dim
    if heads is None or heads.problem(size):
        return []
    assert isinstance(width, int)
    query, kv = heads.query_cut(heads.query * width, size), heads.kv_cut(heads.kv * width, size)
    kv_block = Block(heads.kv * width, kv.unit, kv.spread)
    ranks = range(size)
    local_kv = tuple(heads.local_kv(rank, size) for rank in ranks)
    attributes = {
        "config.num_attention_heads": tuple(heads.local_query(rank, size) for rank in ranks),
        "num_key_value_heads": local_kv,
        "num_key_value_groups": (heads.local_group(size),) * size,
    }
    blocks = (Block(heads.query * width, query.unit), kv_block, kv_block)
    return [
        Rule(
            f"{name}.qkv_proj",
            "packed_colwise",
            "shardwise",
            Cut(blocks=blocks),
            parent_attributes=attributes,
            reason="q | k | v, each cut between its heads; attention slices them by these numbers",
        ),
        Rule(f"{name}.o_proj", "rowwise", "shardwise", query, reason="reads the local heads"),
    ]
