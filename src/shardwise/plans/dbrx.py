"""DBRX: fused attention behind a clamp, and experts whose matrices lie below one another in two dimensions."""

from __future__ import annotations

from torch import nn

from shardwise.layers import Cut
from shardwise.layout import Block, Layout, Packed
from shardwise.plan import wildcard
from shardwise.plans.fused import Fused
from shardwise.spec import Rule

ATTENTION = Fused(
    "blocks.*.norm_attn_norm.attn",
    "Wqkv",
    "out_proj",
    {"hidden_size": "query width", "num_key_value_heads": "kv", "num_key_value_groups": "group"},
)


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The rules for a model whose layers are `{prefix}blocks.*`, on `size` ranks. Its own plan knows the head alone."""
    experts = [(name, module) for name, module in model.named_modules() if wildcard(name) == "blocks.*.ffn.experts"]
    return ATTENTION.rules(model, prefix, size) + [
        found for name, module in experts for found in _experts(prefix + name, module, size)
    ]


def _experts(name: str, module: nn.Module, size: int) -> list[Rule]:
    width, number = module.ffn_hidden_size, module.num_experts
    assert isinstance(width, int)
    assert isinstance(number, int)
    blocks = (Block(width),) * number
    layout: Layout = Packed(0, blocks)
    local = tuple(layout.local_shape((width * number,), rank, size)[0] // number for rank in range(size))
    reason = "the experts' matrices lie below one another: each is cut on its own"
    return [
        *(
            Rule(f"{name}.mlp.{child}", "colwise", "shardwise", Cut(blocks=blocks), reason=reason)
            for child in ("w1", "v1", "w2")
        ),
        Rule(
            name,
            "moe_tp_experts",
            "shardwise",
            attributes={"ffn_hidden_size": local},
            reason="it tells the experts apart by their width",
        ),
    ]
