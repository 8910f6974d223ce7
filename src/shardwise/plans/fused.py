"""Attention whose q, k and v are one matrix, cut block by block between its heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from shardwise.heads import Heads, heads_of
from shardwise.layers import Cut
from shardwise.layout import Block
from shardwise.plan import wildcard
from shardwise.plans.parts import rule
from shardwise.spec import Rule

Counted = Literal["query", "kv", "group", "query width", "kv width"]
"""What an attribute counts: query heads, KV heads, query heads a KV head, or features of all query heads or KV heads."""


@dataclass(frozen=True)
class Fused:
    """The names of one kind of attention module.

    Args:
        path: where the modules are ("layers.*.self_attn"), relative to the base model.
        fused: the projection to q, k and v.
        output: the projection that reads the heads.
        attributes: numbers that attention slices and reshapes by, and what each of them counts.
        refuse: a size that the heads can't be dealt to is an error; else it is left to the model's own plan.
        interleaved: q, k and v lie head by head (q k v | q k v), not one after the other (q q | k k | v v).
    """

    path: str
    fused: str
    output: str
    attributes: Mapping[str, Counted]
    refuse: bool = True
    interleaved: bool = False

    def rules(self, model: nn.Module, prefix: str, size: int) -> list[Rule]:
        """The rules for every such module of `model` on `size` ranks."""
        here = ((name, module) for name, module in model.named_modules() if wildcard(name) == self.path)
        return [found for name, module in here for found in self._of(prefix + name, module, size)]

    def _of(self, name: str, module: nn.Module, size: int) -> list[Rule]:
        heads, width = heads_of(module), module.head_dim
        if heads is None or heads.problem(size):
            if not self.refuse:
                return []
            # Resolving these rules says which sizes are possible.
            return [rule(f"{name}.{self.fused}", "packed_colwise"), rule(f"{name}.{self.output}", "rowwise")]
        assert isinstance(width, int)
        counted = count(heads, width, size)
        attributes = {attribute: counted[what] for attribute, what in self.attributes.items()}
        reason = "q, k and v, each cut between its heads; attention reshapes them by these numbers"
        cut = self._cut(heads, width, size)
        return [
            Rule(f"{name}.{self.fused}", "packed_colwise", "shardwise", cut, parent_attributes=attributes, reason=reason),
            Rule(
                f"{name}.{self.output}",
                "rowwise",
                "shardwise",
                heads.query_cut(heads.query * width, size),
                reason="reads the local heads",
            ),
        ]

    def _cut(self, heads: Heads, width: int, size: int) -> Cut:
        if self.interleaved:
            length = (heads.query + 2 * heads.kv) * width
            return Cut(blocks=(Block(length, length // heads.kv),))
        query, kv = heads.query_cut(heads.query * width, size), heads.kv_cut(heads.kv * width, size)
        block = Block(heads.kv * width, kv.unit, kv.spread)
        return Cut(blocks=(Block(heads.query * width, query.unit), block, block))


def count(heads: Heads, width: int, size: int) -> dict[Counted, tuple[int, ...]]:
    """What each of `size` ranks has of `heads`, whose features are `width` each."""
    query = tuple(heads.local_query(rank, size) for rank in range(size))
    kv = tuple(heads.local_kv(rank, size) for rank in range(size))
    return {
        "query": query,
        "kv": kv,
        "group": (heads.local_group(size),) * size,
        "query width": tuple(number * width for number in query),
        "kv width": tuple(number * width for number in kv),
    }
