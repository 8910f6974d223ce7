"""A head of one rank's width in an ordinary model, whose outputs are as wide as those of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def widen_head(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """Let the head of `model`, whose vocabulary is that of one rank of `size`, give as many logits as all have, in place.

    So the loss is that over the whole vocabulary, as on a rank. The tokens must be of this rank's part.
    """
    model.lm_head.__class__ = WholeWidth
    model.lm_head.copies = size
    model.config.vocab_size = model.vocab_size = model.config.vocab_size * size
    return model


class WholeWidth(nn.Linear):
    """A head of one rank whose outputs are as wide as those of all."""

    copies: int

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., copies * out)."""
        return Repeated.apply(super().forward(input), self.copies)


class Repeated(torch.autograd.Function):
    """In the place of an all-gather, as which it writes as much; backward takes the first part."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, copies: int) -> Tensor:
        ctx.width = x.shape[-1]
        return x.repeat(*(1,) * (x.dim() - 1), copies)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad[..., : ctx.width].contiguous(), None
