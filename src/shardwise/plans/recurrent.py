"""Recurrent mixers that are no linear attention: RecurrentGemma's by blocks (Griffin, arXiv:2402.19427), RWKV's by channels
(arXiv:2305.13048).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from shardwise.heads import Heads
from shardwise.layers import Cut
from shardwise.plan import wildcard
from shardwise.plans.parts import attention, mixer, mlp, rule
from shardwise.spec import Rule

_BLOCKS = "a recurrent unit, cut between its blocks"
_CHANNELS = "time mixing, channel by channel"


def recurrent_gemma(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """RecurrentGemma: a recurrent unit in most layers, local attention in the others, and an MLP in all."""
    path = "layers.*.temporal_block"
    found = [*attention(model, prefix, path), *mlp(prefix, "layers.*.mlp_block")]
    for name, module in model.named_modules():
        if wildcard(name) == path and hasattr(module, "rg_lru"):
            own, large = recurrent_unit(prefix + name, module, size), ["linear_x", "linear_y", "linear_out"]
            reason = f"a recurrent unit, computed whole: {_blocks(module).problem(size)}"
            found += mixer(model, prefix, name, reason, large) if own is None else own
    return found


def recurrent_unit(name: str, module: Any, size: int) -> list[Rule] | None:
    """The rules for module `name` on `size` ranks; None of one that is no such unit, or whose blocks can't be dealt."""
    if not hasattr(module, "rg_lru") or _blocks(module).problem(size):
        return None
    unit, heads = module.rg_lru, _blocks(module)
    block = Cut(unit=unit.block_width)
    local = tuple(heads.local_query(rank, size) for rank in range(size))
    width = tuple(number * unit.block_width for number in local)
    # Its convolution's state starts out as wide as the hidden states, which are as wide as the unit.
    widths = {"lru_width": width} | ({"hidden_size": width} if module.hidden_size == module.lru_width else {})
    stacked = ("input_gate_weight", "input_gate_bias", "recurrent_gate_weight", "recurrent_gate_bias")
    numbers = "it reshapes by its blocks, and makes states of its width"
    return [
        *(Rule(f"{name}.{child}", "colwise", "shardwise", block, reason=_BLOCKS) for child in ("linear_x", "linear_y")),
        Rule(f"{name}.conv_1d", "local_rows", "shardwise", block, reason="the channels of the local blocks"),
        *(Rule(f"{name}.rg_lru.{child}", "local_rows", "shardwise", reason=_BLOCKS) for child in stacked),
        Rule(f"{name}.rg_lru.recurrent_param", "colwise", "shardwise", block, reason=_BLOCKS),
        Rule(f"{name}.linear_out", "rowwise", "shardwise", block, reason="reads the local blocks"),
        Rule(f"{name}.rg_lru", "local_params", "shardwise", attributes={"num_attention_heads": local}, reason=numbers),
        Rule(name, "local_params", "shardwise", attributes=widths, reason=numbers),
    ]


def _blocks(module: Any) -> Heads:
    return Heads(module.rg_lru.num_attention_heads, module.rg_lru.num_attention_heads)


def rwkv(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """RWKV: time mixing, and channel mixing behind a gate as wide as the hidden states."""
    found: list[Rule] = []
    for name, module in model.named_modules():
        if wildcard(name) == "blocks.*.attention":
            found += time_mixing(prefix + name, module, size) or []
    gate = "a gate of whole hidden states, gathered"
    return [
        *found,
        *mlp(prefix, "blocks.*.feed_forward", ["key"], "value"),
        rule(f"{prefix}blocks.*.feed_forward.receptance", "colwise_gather_output", gate),
    ]


def time_mixing(name: str, module: Any, size: int) -> list[Rule] | None:
    """The rules for module `name` on `size` ranks; None of one that is no time mixing. Its channels are alone."""
    if not hasattr(module, "time_decay") or not hasattr(module, "time_first"):
        return None
    return [
        *(rule(f"{name}.{child}", "colwise", _CHANNELS) for child in ("key", "value", "receptance")),
        *(rule(f"{name}.{child}", "colwise", _CHANNELS) for child in ("time_decay", "time_first")),
        rule(f"{name}.output", "rowwise", "reads the local channels"),
        rule(name, "local_state", "the state that it is handed is of all channels"),
    ]
