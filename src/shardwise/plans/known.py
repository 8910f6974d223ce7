"""Modules that are dealt as we know, whatever model they are in: told by what is in them."""

from __future__ import annotations

from torch import nn

from shardwise.plans import decoders, delta, doge, gemma3n, heads, lightning, mixers, normed, recurrent, torch_modules, xlstm
from shardwise.spec import Rule

_KNOWN = (
    mixers.dealt,
    delta.dealt,
    lightning.dealt,
    recurrent.recurrent_unit,
    recurrent.time_mixing,
    xlstm.memory,
    doge.dealt,
    decoders.in_groups,
    normed.attention,
    normed.mlp,
    gemma3n.streams,
    torch_modules.attention,
    heads.reformer_attention,
    heads.reformer_mlp,
    heads.ngram_attention,
)


def known_rules(name: str, module: nn.Module, size: int) -> list[Rule] | None:
    """The rules for module `name` on `size` ranks; None of one that is not known, or that stays as it is."""
    return next((rules for dealt in _KNOWN if (rules := dealt(name, module, size)) is not None), None)
