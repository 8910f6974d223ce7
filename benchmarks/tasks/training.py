"""A training step, forward and backward, eager."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.adapters.base import Adapter
from benchmarks.tasks import Prepared, warm


def prepare(
    adapter: Adapter, folder: Path, batch: int, length: int, warm_up: int = 3, expert_parallel: bool = False
) -> Prepared:
    """`batch` sequences of `length` random tokens, each also the label."""
    model = adapter.build(folder, expert_parallel).train()
    tokens = random_tokens(model, batch, length)
    warm(lambda: forward_backward(model, model, tokens), warm_up)
    return Prepared(lambda: forward_backward(model, model, tokens))


def random_tokens(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """The same for every contender; of the first eighth of the vocabulary, which every rank 0 has.  (batch, length)"""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size // 8, (batch, length), generator=draw)


def forward_backward(model: nn.Module, called: nn.Module, tokens: Tensor) -> None:
    """One step of `model`, through `called`. Gradients are made anew, as after an optimizer's step."""
    model.zero_grad(set_to_none=True)
    called(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
