"""The floor with a layer's four all-reduces written into it by hand, and nothing else: no checks, no plan, no saving.

What is left between this and the floor are the collectives themselves, each a call and a node of autograd.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from benchmarks.adapters.base import Adapter
from benchmarks.adapters.floor import Floor


class Copy(torch.autograd.Function):
    """Identity; backward: all-reduce."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.group.WORLD.allreduce([total]).wait()
        return total


class Reduce(torch.autograd.Function):
    """All-reduce, in place; backward: identity."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        dist.group.WORLD.allreduce([x]).wait()
        return x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return grad


class SummedAttention(LlamaAttention):
    """One rank's heads."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The sum over the ranks."""
        output, *rest = super().forward(Copy.apply(hidden_states), *args, **kwargs)
        return Reduce.apply(output), *rest


class SummedMLP(LlamaMLP):
    """One rank's inner features."""

    def forward(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        return Reduce.apply(super().forward(Copy.apply(x)))


class ByHand(Floor):
    """For a Llama without biases."""

    def start(self, size: int, fake: bool) -> None:
        """The fake group, whose collectives return at once."""
        super().start(size, fake)
        Adapter.start(self, size, fake)

    def build(self, folder: Path, expert_parallel: bool = False) -> PreTrainedModel:
        """The floor, its layers' classes exchanged."""
        model = super().build(folder, expert_parallel)
        for layer in model.model.layers:
            layer.self_attn.__class__, layer.mlp.__class__ = SummedAttention, SummedMLP
        return model


ADAPTER = ByHand()
