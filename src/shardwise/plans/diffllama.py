"""DiffLlama: attention that subtracts the second half of its heads from the first (arXiv:2410.05258).

Head h belongs with head h + H/2, and both read the values of KV heads j and j + K/2. So q, k and v are cut as two halves each,
and what a rank gets are pairs.
"""

from __future__ import annotations

from torch import nn

from shardwise.heads import Heads, heads_of
from shardwise.layers import Cut
from shardwise.layout import Block
from shardwise.plan import wildcard
from shardwise.plans.fused import count, gathered
from shardwise.plans.parts import mlp, rule
from shardwise.spec import Rule


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The rules for a model whose decoder layers are `{prefix}layers.*`, on `size` ranks. Its own plan knows the head alone."""
    here = [(name, module) for name, module in model.named_modules() if wildcard(name) == "layers.*.self_attn"]
    return [found for name, module in here for found in _attention(prefix + name, module, size)] + mlp(prefix, "layers.*.mlp")


def _attention(name: str, module: nn.Module, size: int) -> list[Rule]:
    heads, width = heads_of(module), module.head_dim
    if heads is None:
        return []
    assert isinstance(width, int)
    pairs = Heads(heads.query // 2, heads.kv // 2)
    if pairs.problem(size):
        reason = f"{pairs.query} pairs of query heads and {pairs.kv} of KV heads can't be dealt to {size} ranks"
        return gathered(name, ["q_proj", "k_proj", "v_proj"], "o_proj", reason)
    query, kv = pairs.query_cut(pairs.query * width, size), pairs.kv_cut(pairs.kv * width, size)
    halves = (Block(pairs.query * width, query.unit),) * 2, (Block(pairs.kv * width, kv.unit, kv.spread),) * 2
    group = {"num_key_value_groups": count(pairs, width, size)["group"]}
    reason = "the heads of the first half belong with those of the second"
    styles = {"q_proj": Cut(blocks=halves[0]), "k_proj": Cut(blocks=halves[1]), "v_proj": Cut(blocks=halves[1])}
    output = pairs.query_cut(2 * pairs.query * width, size)
    return [
        *(
            Rule(f"{name}.{child}", "packed_colwise", "shardwise", cut, parent_attributes=group, reason=reason)
            for child, cut in styles.items()
        ),
        Rule(f"{name}.o_proj", "rowwise", "shardwise", output, reason="reads pairs of heads"),
        *(
            rule(f"{name}.lambda_{child}", "replicated_with_grad_allreduce", "it sees the local pairs only")
            for child in ("q1", "k1", "q2", "k2")
        ),
    ]
