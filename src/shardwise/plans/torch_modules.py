"""Modules of torch's own that multiply by their parameters past the layers in them."""

from __future__ import annotations

from typing import Any

from torch import nn

from shardwise.layers import Cut
from shardwise.layout import Block, local_numbers
from shardwise.spec import Rule

_HEADS = "torch's attention, on local heads"


def attention(name: str, module: Any, size: int) -> list[Rule] | None:
    """The rules for `nn.MultiheadAttention`, called `name`, on `size` ranks; None of any other, or with fewer heads."""
    if type(module).forward is not nn.MultiheadAttention.forward or module.num_heads < size:
        return None
    width, unit = module.embed_dim, module.head_dim
    block, cut = Block(width, unit), Cut(unit=unit)
    fused = Cut(blocks=(block,) * 3)
    styles = {
        "in_proj_weight": ("packed_colwise", fused),
        "in_proj_bias": ("packed_colwise", fused),
        **dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), ("colwise", cut)),
        **dict.fromkeys(("bias_k", "bias_v"), ("rowwise", cut)),
    }
    local = {"num_heads": local_numbers(module.num_heads, module.num_heads, size)}
    return [
        *(
            Rule(f"{name}.{child}", style, "shardwise", how, reason=_HEADS)
            for child, (style, how) in styles.items()
            if module._parameters.get(child) is not None
        ),
        Rule(f"{name}.out_proj", "rowwise", "shardwise", cut, reason=_HEADS),
        Rule(name, "local_multihead", "shardwise", attributes=local, reason=_HEADS),
    ]


def encoders(model: nn.Module, named: set[str], size: int) -> list[Rule]:
    """The rules for torch's encoders around attention in `named`: they hand it padded tensors, not nested ones."""
    return [
        Rule(name, "local_params", "shardwise", attributes={"use_nested_tensor": (0,) * size}, reason="its heads are local")
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoder) and any(one.startswith(f"{name}.") or not name for one in named)
    ]
