"""Attention that is sparse for long sequences and full for short ones, by modules that the model's own code exchanges."""

from __future__ import annotations

from typing import Any

from torch import nn

from shardwise.layers.base import original_class, parallel_class
from shardwise.layers.replicated import LocalParamsParallel, Replicate
from shardwise.layout import Block


class SwitchedAttention(Replicate):
    """The module around attention that is exchanged in the first forward pass (BigBird, arXiv:2007.14062): what comes in takes
    over the numbers of this rank from what goes out. Both share their projections.
    """

    prefix = "Switched"

    def set_attention_type(self, *args: Any, **kwargs: Any) -> None:
        """As the module's own."""
        before = {name: child for name, child in self.named_children() if "_tp" in child.__dict__}
        super().set_attention_type(*args, **kwargs)  # type: ignore[misc]
        for name, old in before.items():
            new = self._modules[name]
            if new is not None and new is not old:
                _take_over(old, new)


class BlockHeads(LocalParamsParallel):
    """Attention on this rank's heads that reads random blocks in training: they are drawn for all heads, as in one process, and
    each rank takes those of its own.
    """

    prefix = "Block"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["_skipped"] = False
        return super().forward(*args, **kwargs)

    def _bigbird_block_rand_mask(self, *args: Any, **kwargs: Any) -> Any:
        if not self.__dict__["_skipped"]:
            self.__dict__["_skipped"] = True
            for _ in range(self._first()):
                super()._bigbird_block_rand_mask(*args, **kwargs)  # type: ignore[misc]
        return super()._bigbird_block_rand_mask(*args, **kwargs)  # type: ignore[misc]

    def _bigbird_block_rand_mask_with_head(self, *args: Any, num_heads: int, **kwargs: Any) -> Any:
        full, first = int(self._tp.restore["num_attention_heads"]), self._first()  # type: ignore[call-overload]
        drawn = super()._bigbird_block_rand_mask_with_head(*args, num_heads=full, **kwargs)  # type: ignore[misc]
        return drawn[first : first + num_heads]

    def _first(self) -> int:
        full, mesh = int(self._tp.restore["num_attention_heads"]), self._tp.mesh  # type: ignore[call-overload]
        return Block(full).bounds(mesh.get_local_rank(), mesh.size())[0]


def _take_over(old: nn.Module, new: nn.Module) -> None:
    style = vars(type(old))["_recipe"][0]
    state = new.__dict__["_tp"] = old.__dict__["_tp"]
    for name in state.restore:
        setattr(new, name, getattr(old, name))
    new.__class__ = parallel_class(style, original_class(new))
