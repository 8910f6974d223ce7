"""What is measured: a training step, or some decoded tokens; in eager mode, compiled, and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from benchmarks.gpu.sizes import Size

CELLS = ("train eager", "train compiled", "decode eager", "decode compiled", "decode graphs")
Step = Callable[[], None]


def make_step(cell: str, model: PreTrainedModel, size: Size, fullgraph: bool) -> tuple[Step, int]:
    """What is run and timed, and how many of what is counted (steps, tokens) it does at a time.

    The model stays in train mode, in which it drops out nothing: else each change would be a compilation.
    """
    what, how = cell.split()
    called: nn.Module = model
    if how != "eager":
        mode = "reduce-overhead" if how == "graphs" else None
        # Not dynamic: the second shape of this model would be taken for one of many.
        called = torch.compile(model, fullgraph=fullgraph, dynamic=False, mode=mode)
    if what == "train":
        return train_step(model, called, size), 1
    return decode_step(model, called, size), size.tokens


def ids(size: Size, batch: int, device: torch.device) -> Tensor:
    """Random tokens of the first eighth of the vocabulary: those of rank 0, whatever the size of the axis.  (batch, length)"""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(size.shapes["vocab_size"] // 8, (batch, size.length), generator=draw).to(device)


def train_step(model: PreTrainedModel, called: nn.Module, size: Size) -> Step:
    """Forward and backward. Gradients are made anew, as after an optimizer's step."""
    tokens = ids(size, size.batch, model.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        called(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    return step


def decode_step(model: PreTrainedModel, called: nn.Module, size: Size) -> Step:
    """Tokens at batch 1, one forward each, behind a prompt, from a cache of fixed size. Which token it is does not matter."""
    prompt = ids(size, 1, model.device)
    cache = StaticCache(config=model.config, max_cache_len=size.length + size.tokens)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
    token = prompt[:, :1].clone()

    @torch.no_grad()
    def step() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(size.length)
        for _ in range(size.tokens):
            torch.compiler.cudagraph_mark_step_begin()
            called(input_ids=token, past_key_values=cache, use_cache=True)

    return step
