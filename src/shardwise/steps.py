"""What the tools run: a step of training, a forward, or a decoded token, on random tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

Step = Callable[[], None]

MODES = ("training", "forward", "decode")
"""Forward and backward; forward alone, without gradient; one token behind a cache."""


def make_step(mode: str, model: Any, called: nn.Module, batch: int, sequence: int) -> Step:
    """A step of `model`, through `called`, which is the model itself or what `torch.compile` made of it.

    Args:
        mode: of `MODES`.
        batch, sequence: of the tokens, the same on every rank; in a decode, of those in the cache.
    """
    device = next(model.parameters()).device
    tokens = random_tokens(model.config, batch, sequence).to(device)
    if mode == "training":
        return _training(model, called, tokens)
    model.eval()
    return _forward(called, tokens) if mode == "forward" else _decode(model, called, tokens)


def random_tokens(config: PreTrainedConfig, batch: int, sequence: int) -> Tensor:
    """The same on every rank: (batch, sequence) int64."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(config.get_text_config().vocab_size, (batch, sequence), generator=draw)


def _training(model: nn.Module, called: nn.Module, tokens: Tensor) -> Step:
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        called(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    return step


def _forward(called: nn.Module, tokens: Tensor) -> Step:
    @torch.no_grad()
    def step() -> None:
        called(input_ids=tokens, use_cache=False)

    return step


def _decode(model: Any, called: nn.Module, tokens: Tensor) -> Step:
    """One token behind the others, which are in the cache; it is taken out again, so that every step does the same."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    token = tokens[:, :1].clone()

    @torch.no_grad()
    def step() -> None:
        called(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step
