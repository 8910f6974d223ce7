"""MiniMax: lightning attention (arXiv:2501.08313) in some layers, cut between its heads."""

from __future__ import annotations

from typing import Any

from torch import nn

from shardwise.heads import Heads
from shardwise.layers import Cut
from shardwise.plan import wildcard
from shardwise.plans.parts import mixer
from shardwise.spec import Rule

_HEADS = "lightning attention, cut between its heads"
_TABLES = {"slope_rate": 0, "query_decay": 0, "key_decay": 0, "diagonal_decay": 1}


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The rules for every such layer on `size` ranks; where its heads can't be dealt to them it is computed whole."""
    found: list[Rule] = []
    for name, module in model.named_modules():
        if wildcard(name) == "layers.*.self_attn" and _is_lightning(module):
            own = dealt(prefix + name, module, size)
            reason = f"linear attention, computed whole: {_heads(module).problem(size)}"
            found += mixer(model, prefix, name, reason, ["qkv_proj", "output_gate", "out_proj"]) if own is None else own
    return found


def dealt(name: str, module: Any, size: int) -> list[Rule] | None:
    """The rules for module `name` on `size` ranks; None of one that is no such layer, or whose heads can't be dealt.

    q, k and v lie head by head; what decays with the distance is a table of all heads; a norm goes over all of them.
    """
    if not _is_lightning(module) or _heads(module).problem(size):
        return None
    heads, width = _heads(module), module.head_dim
    local = tuple(heads.local_query(rank, size) for rank in range(size))
    statistics, tables = "its statistics are over all heads", "a table of the heads' decay"
    return [
        Rule(f"{name}.qkv_proj", "colwise", "shardwise", Cut(unit=3 * width), reason=f"{_HEADS}: q k v | q k v"),
        Rule(f"{name}.output_gate", "colwise", "shardwise", Cut(unit=width), reason=_HEADS),
        Rule(f"{name}.norm", "sharded_norm", "shardwise", Cut(unit=width), reason=statistics),
        Rule(f"{name}.out_proj", "rowwise", "shardwise", Cut(unit=width), reason="reads the local heads"),
        *(Rule(f"{name}.{table}", "local_rows", "shardwise", Cut(dim=dim), reason=tables) for table, dim in _TABLES.items()),
        Rule(name, "local_params", "shardwise", attributes={"num_attention_heads": local}, reason="it reshapes by its heads"),
    ]


def _is_lightning(module: Any) -> bool:
    return hasattr(module, "qkv_proj") and all(name in module._buffers for name in _TABLES)


def _heads(module: Any) -> Heads:
    return Heads(module.num_attention_heads, module.num_attention_heads)
