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
            found += _recurrent_unit(model, prefix, name, module, size)
    return found


def _recurrent_unit(model: nn.Module, prefix: str, place: str, module: Any, size: int) -> list[Rule]:
    unit, name = module.rg_lru, prefix + place
    heads, block = Heads(unit.num_attention_heads, unit.num_attention_heads), Cut(unit=unit.block_width)
    if problem := heads.problem(size):
        reason = f"a recurrent unit, computed whole: {problem}"
        return mixer(model, prefix, place, reason, ["linear_x", "linear_y", "linear_out"])
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


def rwkv(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """RWKV: time mixing, and channel mixing behind a gate as wide as the hidden states."""
    mixing, gate = "blocks.*.attention", "a gate of whole hidden states, gathered"
    return [
        *(rule(f"{prefix}{mixing}.{child}", "colwise", _CHANNELS) for child in ("key", "value", "receptance")),
        *(rule(f"{prefix}{mixing}.{child}", "colwise", _CHANNELS) for child in ("time_decay", "time_first")),
        rule(f"{prefix}{mixing}.output", "rowwise", "reads the local channels"),
        rule(f"{prefix}{mixing}", "local_state", "the state that it is handed is of all channels"),
        *mlp(prefix, "blocks.*.feed_forward", ["key"], "value"),
        rule(f"{prefix}blocks.*.feed_forward.receptance", "colwise_gather_output", gate),
    ]
