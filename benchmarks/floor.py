"""A head of one rank's width in an ordinary model, whose outputs are as wide as those of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def local_head(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """Give `model`, in place, a head of one rank of `size`: the loss stays that over the whole vocabulary, as on a rank."""
    whole = model.lm_head
    local = WholeWidth(whole.in_features, whole.out_features // size, bias=False, dtype=whole.weight.dtype)
    local.copies = size
    model.lm_head = local
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
