"""Attention on local heads whose code makes something for all heads: random rotations, position biases, masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardwise.collectives import copy_to_tp
from shardwise.layers.replicated import LocalParamsParallel, Replicate
from shardwise.layout import Block


class HashedHeads(LocalParamsParallel):
    """Attention that hashes by rotations drawn for each head (Reformer, arXiv:2001.04451): they are drawn for all heads, as in
    one process, and each rank takes those of its own.
    """

    prefix = "Hashed"

    def _hash_vectors(self, *args: Any, **kwargs: Any) -> Any:
        name = "num_attention_heads"
        with _DrawnForAll(_full(self, name), getattr(self, name), _first(self, name), getattr(self, "hash_seed", None)):
            return super()._hash_vectors(*args, **kwargs)  # type: ignore[misc]


class _DrawnForAll(TorchFunctionMode):
    def __init__(self, full: int, local: int, first: int, seed: int | None) -> None:
        super().__init__()
        self._full, self._local, self._first, self._seed = full, local, first, seed

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.randn and args and isinstance(args[0], tuple) and args[0][0] == self._local:
            kwargs = dict(kwargs or {})
            if self._seed is not None:
                kwargs["generator"] = self._seeded(kwargs.get("device"))
            drawn: Tensor = torch.randn((self._full, *args[0][1:]), **kwargs)
            return drawn[self._first : self._first + self._local]
        return function(*args, **(kwargs or {}))

    def _seeded(self, device: Any) -> torch.Generator:
        # What the global generator would draw, which ranks that are threads share.
        return torch.Generator(device or "cpu").manual_seed(self._seed or 0)


class AgreedSeeds(Replicate):
    """A layer of a reversible model, which seeds the random numbers of its two parts anew in each forward pass, to draw the
    same again in backward: all ranks take the first one's seeds.
    """

    prefix = "Agreed"
    attention_seed: Any
    feed_forward_seed: Any

    def _init_attention_seed(self) -> None:
        super()._init_attention_seed()  # type: ignore[misc]
        self.attention_seed = self._agree(self.attention_seed)

    def _init_feed_forward_seed(self) -> None:
        super()._init_feed_forward_seed()  # type: ignore[misc]
        self.feed_forward_seed = self._agree(self.feed_forward_seed)

    def _agree(self, seed: Any) -> int:
        device = next(self.parameters()).device
        agreed = torch.tensor([int(seed) % 2**62], device=device)
        dist.broadcast(agreed, group=self._tp.mesh.get_group(), group_src=0)
        torch.manual_seed(int(agreed))
        return int(agreed)


class NgramHeads(LocalParamsParallel):
    """ProphetNet's attention (arXiv:2001.04063): of masks of all heads, (batch, heads, ...), each rank takes those of its own;
    and of the position bias of n-grams, which is computed for all heads, from whole weights.

    transformers' code mixes heads and positions in that bias, so that no head's is computed from that head's weights alone.
    """

    prefix = "Ngram"
    num_attn_heads: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = {name: self._own_mask(value) for name, value in kwargs.items()}
        with _LocalShapes():
            return super().forward(*map(self._own_mask, args), **own)

    def _own_mask(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 4 or value.shape[1] != _full(self, "num_attn_heads"):
            return value
        return value.narrow(1, _first(self, "num_attn_heads"), self.num_attn_heads)

    def get_main_relative_pos_embeddings(self, hidden: Tensor, scores: Tensor, *args: Any) -> Tensor:
        """(batch, heads, sequence, keys), of the local heads; `scores` has that shape."""
        full = scores[:, :1].expand(-1, _full(self, "num_attn_heads"), -1, -1)
        with self._all_heads():
            bias: Tensor = super().get_main_relative_pos_embeddings(hidden, full, *args)  # type: ignore[misc]
        return self._own(bias, 1)

    def get_predict_relative_pos_embeddings(self, *args: Any) -> Tensor:
        """(batch, n-gram, heads, sequence, keys), of the local heads."""
        with self._all_heads():
            bias: Tensor = super().get_predict_relative_pos_embeddings(*args)  # type: ignore[misc]
        return self._own(bias, 2)

    def _own(self, bias: Tensor, dim: int) -> Tensor:
        return copy_to_tp(bias, self._tp.mesh).narrow(dim, _first(self, "num_attn_heads"), self.num_attn_heads)

    @contextmanager
    def _all_heads(self) -> Iterator[None]:
        local, self.num_attn_heads = self.num_attn_heads, _full(self, "num_attn_heads")
        try:
            yield
        finally:
            self.num_attn_heads = local


class _LocalShapes(TorchFunctionMode):
    """Where local heads don't fill the width of the input that they are put together to, it is theirs."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.reshape and all(isinstance(length, int) and length >= 0 for length in args[1:]):
            numel, before = args[0].numel(), prod(args[1:-1])
            if len(args) > 2 and before and prod(args[1:]) > numel and numel % before == 0:
                args = (*args[:-1], numel // before)
        return function(*args, **(kwargs or {}))


def _full(module: Any, name: str) -> int:
    return int(module._tp.restore[name])


def _first(module: Any, name: str) -> int:
    mesh = module._tp.mesh
    return Block(_full(module, name)).bounds(mesh.get_local_rank(), mesh.size())[0]
