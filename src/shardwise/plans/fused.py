"""Attention with numbers that must become local: those that its code slices and reshapes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from shardwise.heads import Heads, heads_of
from shardwise.layers import Cut
from shardwise.layout import Block
from shardwise.plan import wildcard
from shardwise.plans.parts import WITHOUT, modules_at, rule
from shardwise.spec import Rule

Counted = Literal["query", "kv", "group", "query width", "kv width"]
"""What an attribute counts: query heads, KV heads, query heads a KV head, or features of all query heads or KV heads."""


@dataclass(frozen=True)
class Fused:
    """Attention whose q, k and v are one matrix, which is cut block by block between the heads.

    Args:
        path: where the modules are ("layers.*.self_attn"), relative to the base model.
        fused: the projection to q, k and v.
        output: the projection that reads the heads.
        attributes: numbers that attention slices and reshapes by, and what each of them counts.
        otherwise: for a size that the heads can't be dealt to: an error, or the model's own plan, or attention on gathered
            q, k and v, computed whole.
        interleaved: q, k and v lie head by head (q k v | q k v), not one after the other (q q | k k | v v).
        biased: attention is handed a position bias of all heads (ALiBi).
    """

    path: str
    fused: str
    output: str
    attributes: Mapping[str, Counted]
    otherwise: Literal["refuse", "leave", "gather"] = "refuse"
    interleaved: bool = False
    biased: bool = False

    def rules(self, model: nn.Module, prefix: str, size: int) -> list[Rule]:
        """The rules for every such module of `model` on `size` ranks."""
        here = modules_at(model, self.path)
        return [found for name, module in here for found in self._of(prefix + name, module, size)]

    def _of(self, name: str, module: nn.Module, size: int) -> list[Rule]:
        heads, width = heads_of(module), module.head_dim
        if heads is None:
            return gathered(name, [self.fused], self.output, "nothing says how many heads it has")
        if heads.problem(size):
            return self._otherwise(name)
        if self.interleaved and heads.shared(size):
            return gathered(name, [self.fused], self.output, "a KV head lies among its queries, and ranks would share it")
        assert isinstance(width, int)
        counted = count(heads, width, size)
        attributes = {attribute: counted[what] for attribute, what in self.attributes.items()}
        reason = "q, k and v, each cut between its heads; attention reshapes them by these numbers"
        cut = self._cut(heads, width, size)
        bias = "the position bias that it is handed is of all heads"
        return [
            *([rule(name, "local_head_bias", bias)] if self.biased else []),
            Rule(f"{name}.{self.fused}", "packed_colwise", "shardwise", cut, parent_attributes=attributes, reason=reason),
            Rule(
                f"{name}.{self.output}",
                "rowwise",
                "shardwise",
                heads.query_cut(heads.query * width, size),
                reason="reads the local heads",
            ),
        ]

    def _otherwise(self, name: str) -> list[Rule]:
        if self.otherwise == "leave":
            return []
        if self.otherwise == "gather":
            return gathered(name, [self.fused], self.output, "its heads can't be dealt to this many ranks")
        # Resolving these rules says which sizes are possible.
        return [rule(f"{name}.{self.fused}", "packed_colwise"), rule(f"{name}.{self.output}", "rowwise")]

    def _cut(self, heads: Heads, width: int, size: int) -> Cut:
        if self.interleaved:
            length = (heads.query + 2 * heads.kv) * width
            return Cut(blocks=(Block(length, length // heads.kv),))
        query, kv = heads.query_cut(heads.query * width, size), heads.kv_cut(heads.kv * width, size)
        block = Block(heads.kv * width, kv.unit, kv.spread)
        return Cut(blocks=(Block(heads.query * width, query.unit), block, block))


def separate_attention(
    model: nn.Module, prefix: str, path: str, size: int, output: str, attributes: Mapping[str, Counted]
) -> list[Rule]:
    """Attention with q_proj, k_proj and v_proj, at `path`, and `attributes` as of `Fused`."""
    found: list[Rule] = []
    for name, module in model.named_modules():
        if wildcard(name) != path:
            continue
        found += [rule(f"{prefix}{name}.{child}", "colwise", WITHOUT) for child in ("q_proj", "k_proj", "v_proj")]
        found.append(rule(f"{prefix}{name}.{output}", "rowwise", WITHOUT))
        heads = heads_of(module)
        if heads is not None and not heads.problem(size):  # what is a problem, resolving says
            counted = count(heads, int(getattr(module, "head_dim", 1)), size)
            local = {attribute: counted[what] for attribute, what in attributes.items()}
            reason = "attention reshapes by these numbers"
            found.append(Rule(prefix + name, "local_params", "shardwise", attributes=local, reason=reason))
    return found


def gathered(name: str, projections: Sequence[str], output: str, reason: str) -> list[Rule]:
    """Attention that is computed whole, of which each rank keeps its part of the weights."""
    return [
        *(rule(f"{name}.{child}", "colwise_gather_output", f"computed whole: {reason}") for child in projections),
        rule(f"{name}.{output}", "rowwise_split_input", f"computed whole: {reason}"),
    ]


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
