"""torch's own attention module on local heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from shardwise.collectives import copy_to_tp, gather_from_tp, reduce_from_tp
from shardwise.errors import ShardwiseError, describe
from shardwise.layers.base import Local
from shardwise.layers.region import local_random_stream
from shardwise.layers.replicated import LocalParamsParallel
from shardwise.layout import Block, local_numbers


class LocalMultihead(LocalParamsParallel):
    """`nn.MultiheadAttention` on this rank's heads.  Queries, keys, values (batch, sequence, features) I -> the same I, and the
    weights of all heads I.

    torch's code puts heads together to the width of its input, and in evaluation calls one fused kernel for the whole encoder
    layer, which knows nothing of ranks. So the attention is computed here, and the layer around it told that it can't be fused.
    """

    prefix = "LocalHeads"
    num_heads: int
    batch_first: bool
    dropout: float
    add_zero_attn: bool
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: nn.Module

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        fits = type(module).forward is nn.MultiheadAttention.forward
        return None if fits else f"{type(module).__name__} is not torch's MultiheadAttention"

    @classmethod
    def local_attributes(cls, module: nn.Module, local: Local) -> dict[str, int | None]:
        return {"_qkv_same_embed_dim": False}  # which torch's fused encoder layer asks for

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As of `nn.MultiheadAttention`. Raises `ShardwiseError` for nested tensors."""
        if query.is_nested:
            raise ShardwiseError(
                describe(
                    "nn.MultiheadAttention on several ranks takes no nested tensors.",
                    either=["nn.TransformerEncoder(..., enable_nested_tensor=False), or", "padded tensors, and a mask"],
                )
            )
        q, k, v = (self._split(one) for one in self._projected(*self._batched(query, key, value)))
        if self.add_zero_attn:
            k, v = (torch.cat([one, one.new_zeros(one[:, :, :1].shape)], 2) for one in (k, v))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(None if causal else attn_mask, key_padding_mask, q, k)
        attended, weights = self._attend(q, k, v, mask, causal, need_weights)
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        if query.dim() == 2:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        return output, self._whole(weights, average_attn_weights, query.dim() == 3) if weights is not None else None

    def _batched(self, *given: Tensor) -> list[Tensor]:
        """(batch, sequence, features), R; what is given twice enters once."""
        entered: dict[int, Tensor] = {}
        for one in given:
            if id(one) not in entered:
                x = one.unsqueeze(0) if one.dim() == 2 else one if self.batch_first else one.transpose(0, 1)
                entered[id(one)] = copy_to_tp(x, self._tp.mesh)
        return [entered[id(one)] for one in given]

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        own: Any = self
        fused, bias = own.in_proj_weight, own.in_proj_bias
        apart = (own.q_proj_weight, own.k_proj_weight, own.v_proj_weight)
        weights = fused.chunk(3) if fused is not None else apart
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        found = [linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        for at, more in ((1, self.bias_k), (2, self.bias_v)):
            if more is not None:
                found[at] = torch.cat([found[at], more.expand(len(found[at]), -1, -1)], 1)
        return found

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores, (batch, heads, queries, keys) or less of them; keys that were appended are seen."""
        found: Tensor | None = None
        if mask is not None:
            found = _added(mask, q)
            if found.dim() == 3 and len(found) == len(q) * self.num_heads:  # made by this module's number, for local heads
                found = found.unflatten(0, (-1, self.num_heads))
            elif found.dim() == 3:
                first, stop = Block(self._heads).bounds(self._tp.mesh.get_local_rank(), self._tp.mesh.size())
                found = found.unflatten(0, (-1, self._heads))[:, first:stop]
            found = pad(found, (0, k.shape[2] - found.shape[-1]))
        if padding is not None:
            hidden = _added(padding if padding.dim() == 2 else padding.unsqueeze(0), q)
            hidden = pad(hidden, (0, k.shape[2] - hidden.shape[-1]))[:, None, None]
            found = hidden if found is None else found + hidden
        return found

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        rate = self.dropout if self.training else 0.0
        if rate and not torch.compiler.is_compiling():  # each head has a mask of its own
            with local_random_stream(q.device, self._tp.mesh.get_local_rank()):
                return _attention(q, k, v, mask, causal, need_weights, rate)
        return _attention(q, k, v, mask, causal, need_weights, rate)

    def _whole(self, weights: Tensor, average: bool, batched: bool) -> Tensor:
        """The weights of all heads, from those of the local ones."""
        mesh = self._tp.mesh
        if average:
            weights = reduce_from_tp(weights.sum(1), mesh) / self._heads
        else:
            sizes = local_numbers(self._heads, self._heads, mesh.size())
            weights = gather_from_tp(weights, mesh, 1, sizes)
        return weights if batched else weights.squeeze(0)

    @property
    def _heads(self) -> int:
        """All of them."""
        return int(self._tp.restore.get("num_heads", self.num_heads))  # type: ignore[call-overload, no-any-return]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, need_weights: bool, rate: float
) -> tuple[Tensor, Tensor | None]:
    if not need_weights:
        return scaled_dot_product_attention(q, k, v, mask, rate, causal), None
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = nn.functional.dropout((scores if mask is None else scores + mask).softmax(-1), rate)
    return weights @ v, weights


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))
    return mask.to(like.dtype)
