"""Attention on local heads that its caller hands a position bias of all heads."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from shardwise.collectives import copy_to_tp
from shardwise.layers.replicated import LocalParamsParallel
from shardwise.layout import Block

_BIASES = ("alibi", "position_bias", "attention_mask")


class LocalHeadBias(LocalParamsParallel):
    """Attention on this rank's heads: of a bias of all heads it takes those of its own.

    The arguments `alibi` and `position_bias` (ALiBi, arXiv:2108.12409), and an `attention_mask` that has the bias in it:
    (heads, ...), (batch x heads, ...) or (batch, heads, ...) I -> the same of the local heads. A mask without heads stays.
    """

    prefix = "LocalHeadBias"

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        return None if _heads(module) else f"{type(module).__name__} does not say how many heads it has (num_heads)"

    @classmethod
    def options(cls, module: nn.Module, parent: nn.Module) -> dict[str, int]:
        heads, kv = _heads(module), getattr(module, "num_kv_heads", None) or _heads(module)
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        return {"heads": heads, "kv": kv} | {name: names.index(name) for name in _BIASES if name in names}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        for name in _BIASES:
            place = self._tp.options.get(name, len(given))
            if place < len(given):
                given[place] = self._own(given[place], name)
            elif name in kwargs:
                kwargs[name] = self._own(kwargs[name], name)
        return super().forward(*given, **kwargs)

    def _own(self, bias: Any, name: str) -> Any:
        if not isinstance(bias, Tensor):
            return bias
        bias = copy_to_tp(bias, self._tp.mesh)
        if name == "attention_mask" and (bias.dim() != 4 or bias.shape[1] == 1):
            return bias
        heads, kv, size = self._tp.options["heads"], self._tp.options["kv"], self._tp.mesh.size()
        # As `Heads.query_cut` deals them: whole groups, where no KV head is shared.
        start, stop = Block(heads, heads // kv if kv >= size else 1).bounds(self._tp.mesh.get_local_rank(), size)
        if bias.dim() == 4:
            return bias[:, start:stop]
        return bias.unflatten(0, (-1, heads))[:, start:stop].flatten(0, 1)


def _heads(module: nn.Module) -> int:
    holders = (module, getattr(module, "config", None))
    names = ("num_heads", "n_heads", "num_attention_heads")
    found = (getattr(holder, name, None) for name in names for holder in holders)
    return next((number for number in found if isinstance(number, int)), 0)
