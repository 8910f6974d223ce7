"""Apertus: the xIELU activation has two parameters of its own, which see only the rank's slice of the MLP."""

from __future__ import annotations

from torch import nn

from shardwise.spec import Rule


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The corrections for a model whose decoder layers are `{prefix}layers.*`."""
    reason = "alpha_p and alpha_n are whole, and each rank's gradient is a part; the model's plan leaves it unsummed"
    return [Rule(f"{prefix}layers.*.mlp.act_fn", "replicated_with_grad_allreduce", "shardwise", reason=reason)]
