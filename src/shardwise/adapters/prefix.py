"""Prefix tuning: learned keys and values in front of those of the tokens, of which each rank takes its heads'."""

from __future__ import annotations

import re
from dataclasses import replace

from shardwise.errors import ShardwiseError
from shardwise.layout import Sharded
from shardwise.plan import Plan
from shardwise.spec import ShardSpec

PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
"""PEFT's types of adapters that are keys and values."""

_KEYS = re.compile(r"(?:.*\.)?(\d+)\.[^0-9]*\b[kv]_proj\.weight")


def prefix_layouts(plan: Plan) -> tuple[tuple[Sharded, int], ...]:
    """Of every layer, how its KV heads lie on the ranks, as the layout of a tensor (batch, heads, positions, head dim); and
    how many there are in all.

    Raises `ShardwiseError`, with a reason, where `plan` doesn't cut each layer's keys and values alike, between heads.
    """
    layers: dict[int, list[ShardSpec]] = {}
    for row in plan:
        if found := _KEYS.fullmatch(row.name):
            layers.setdefault(int(found[1]), []).append(row)
    if not layers or sorted(layers) != list(range(len(layers))):
        raise ShardwiseError("its layers have no k_proj and v_proj of their own")
    return tuple(_of_layer(layers[number]) for number in range(len(layers)))


def _of_layer(rows: list[ShardSpec]) -> tuple[Sharded, int]:
    layouts = [row.layout for row in rows]
    first = layouts[0]
    if len(rows) != 2 or not isinstance(first, Sharded) or first != layouts[1] or rows[0].shape[0] != rows[1].shape[0]:
        raise ShardwiseError(f"{rows[0].name} is not cut between heads, as the values are")
    return replace(first, dim=1, unit=1), rows[0].shape[0] // first.unit
