"""BitNet: Llama's layers, with a norm in front of each row-wise product, over all heads or over the MLP's width."""

from __future__ import annotations

from torch import nn

from shardwise.heads import heads_of
from shardwise.plan import wildcard
from shardwise.plans.parts import attention, mlp, rule
from shardwise.spec import Rule


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The rules for a model whose decoder layers are `{prefix}layers.*`, on `size` ranks."""
    found = [*attention(model, prefix), *mlp(prefix, "layers.*.mlp")]
    found.append(rule(f"{prefix}layers.*.mlp.ffn_sub_norm", "sharded_norm", "its statistics are over the full width"))
    for name, module in model.named_modules():
        if wildcard(name) == "layers.*.self_attn" and (heads := heads_of(module)) is not None:
            cut = heads.query_cut(module.get_submodule("attn_sub_norm").get_parameter("weight").numel(), size)
            over = "its statistics are over all heads"
            found.append(Rule(f"{prefix}{name}.attn_sub_norm", "sharded_norm", "shardwise", cut, reason=over))
    return found
