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
EXPERTS = "blocks.*.ffn.experts"
MATRICES = ("w1", "v1", "w2")


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The rules for a model whose layers are `{prefix}blocks.*`, on `size` ranks. Its own plan knows the head alone."""
    return ATTENTION.rules(model, prefix, size) + _split(model, prefix, size)


def dealt(model: nn.Module, prefix: str) -> list[Rule]:
    """The rules for whole experts on each rank."""
    width, _ = _sizes(model)
    reason = "the experts' matrices lie below one another: each stays whole"
    rows = Cut(unit=width)
    return [
        *(Rule(f"{prefix}{EXPERTS}.mlp.{name}", "grouped_gemm", "shardwise", rows, reason=reason) for name in MATRICES),
        Rule(prefix + EXPERTS, "ep_dispatch_experts", "shardwise", reason="every rank computes its own experts"),
    ]


def _sizes(model: nn.Module) -> tuple[int, int]:
    experts = next(module for name, module in model.named_modules() if wildcard(name) == EXPERTS)
    width, number = experts.ffn_hidden_size, experts.num_experts
    assert isinstance(width, int)
    assert isinstance(number, int)
    return width, number


def _split(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    width, number = _sizes(model)
    name = prefix + EXPERTS
    blocks = (Block(width),) * number
    layout: Layout = Packed(0, blocks)
    local = tuple(layout.local_shape((width * number,), rank, size)[0] // number for rank in range(size))
    reason = "the experts' matrices lie below one another: each is cut on its own"
    return [
        *(Rule(f"{name}.mlp.{child}", "colwise", "shardwise", Cut(blocks=blocks), reason=reason) for child in MATRICES),
        Rule(
            name,
            "moe_tp_experts",
            "shardwise",
            attributes={"ffn_hidden_size": local},
            reason="it tells the experts apart by their width",
        ),
    ]
