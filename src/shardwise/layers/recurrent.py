"""Recurrent mixers whose state lies outside of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shardwise.collectives import even_sizes
from shardwise.layers.replicated import LocalParamsParallel


class LocalState(LocalParamsParallel):
    """RWKV's time mixing on this rank's channels, which is handed the state of all channels and layers.

    The state is (hidden, hidden, numerator, denominator, maximum), each (batch, channels, layers). The first two are whole
    hidden states; of the others it reads and writes views of its own channels: those of other ranks stay as they were.
    """

    prefix = "LocalState"

    def forward(self, hidden: Tensor, state: list[Tensor] | None = None, use_cache: bool = False) -> tuple[Tensor, Any]:
        if state is None:
            whole: tuple[Tensor, Any] = super().forward(hidden, use_cache=use_cache)
            return whole
        sizes, rank = self._tp.sizes["time_decay"], self._tp.mesh.get_local_rank()
        mine = [part.narrow(1, sum(sizes[:rank]), sizes[rank]) for part in state[2:]]
        output, _ = super().forward(hidden, [*state[:2], *mine], use_cache)
        return output, state


class LocalHeadState(LocalParamsParallel):
    """xLSTM's memory cells on this rank's heads, which are handed the state of all heads.

    The state is (cells, normalizers, maxima), each (batch, heads, ...). It reads and writes views of its own heads: those of
    other ranks stay as they were. Without a state, that of its own heads comes back.
    """

    prefix = "LocalHeadState"

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        heads = getattr(getattr(module, "config", None), "num_heads", None)
        return None if isinstance(heads, int) else f"the config of {type(module).__name__} has no num_heads"

    @classmethod
    def options(cls, module: nn.Module, parent: nn.Module) -> dict[str, int]:
        return {"heads": module.config.num_heads}  # type: ignore[union-attr, dict-item]

    def forward(self, x: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Any]:
        if state is None:
            own: tuple[Tensor, Any] = super().forward(x, None)
            return own
        sizes, rank = even_sizes(self._tp.options["heads"], self._tp.mesh.size()), self._tp.mesh.get_local_rank()
        mine = tuple(part.narrow(1, sum(sizes[:rank]), sizes[rank]) for part in state)
        output, after = super().forward(x, mine)
        for part, new in zip(mine, after, strict=True):
            part.copy_(new)
        return output, state
