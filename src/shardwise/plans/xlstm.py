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
            own, reason = memory(prefix + place, module, size), f"memory cells, computed whole: {_heads(module).problem(size)}"
            found += mixer(model, prefix, place, reason, _LARGE) if own is None else own
    return [*found, *mlp(prefix, "blocks.*.ffn", ("proj_up_gate", "proj_up"), "proj_down")]


def memory(name: str, module: Any, size: int) -> list[Rule] | None:
    """The rules for module `name` on `size` ranks; None of one that has no such cells, or whose heads can't be dealt."""
    if not all(hasattr(module, child) for child in (*_LARGE, "multihead_norm")) or _heads(module).problem(size):
        return None
    heads = _heads(module)
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


def _heads(module: Any) -> Heads:
    return Heads(module.config.num_heads, module.config.num_heads)
