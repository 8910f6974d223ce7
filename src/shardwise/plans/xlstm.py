"""xLSTM (arXiv:2405.04517): memory cells by heads. Models with fused projections, which transformers can't initialise, have no
plan.
"""

from __future__ import annotations

from typing import Any

from shardwise.heads import Heads
from shardwise.layers import Cut
from shardwise.plan import wildcard
from shardwise.plans.parts import mixer, mlp
from shardwise.spec import Rule

_HEADS = "memory cells, cut between their heads"
_LARGE = ("q", "k", "v", "ogate_preact", "out_proj")


def rules(model: Any, prefix: str, size: int) -> list[Rule]:
    """The rules for every layer on `size` ranks; where its heads can't be dealt to them its memory is computed whole."""
    if model.config.weight_mode == "fused":
        return []
    found: list[Rule] = []
    for place, module in model.named_modules():
        if wildcard(place) == "blocks.*.mlstm_layer":
            heads = Heads(module.config.num_heads, module.config.num_heads)
            problem = heads.problem(size)
            reason = f"memory cells, computed whole: {problem}"
            found += mixer(model, prefix, place, reason, _LARGE) if problem else _memory(prefix + place, module, heads, size)
    return [*found, *mlp(prefix, "blocks.*.ffn", ("proj_up_gate", "proj_up"), "proj_down")]


def _memory(name: str, module: Any, heads: Heads, size: int) -> list[Rule]:
    keys, values = Cut(unit=module.qk_dim // heads.query), Cut(unit=module.v_dim // heads.query)
    cuts = {"q": keys, "k": keys, "v": values, "ogate_preact": values, "igate_preact": Cut(), "fgate_preact": Cut()}
    local = tuple(heads.local_query(rank, size) for rank in range(size))
    numbers = {"config.num_heads": local, "v_dim": tuple(number * values.unit for number in local)}
    reads = "it reshapes by its heads, and is handed the state of all of them"
    return [
        *(Rule(f"{name}.{child}", "colwise", "shardwise", cut, reason=_HEADS) for child, cut in cuts.items()),
        Rule(f"{name}.multihead_norm", "local_rows", "shardwise", values, {"num_heads": local}, reason="a norm for each head"),
        Rule(f"{name}.out_proj", "rowwise", "shardwise", values, reason="reads the local heads"),
        Rule(name, "local_head_state", "shardwise", attributes=numbers, reason=reads),
    ]
