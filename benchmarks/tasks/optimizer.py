"""A whole training step: forward, backward, gradient clipping, and AdamW in its three implementations."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.adapters.base import Adapter
from benchmarks.serving import first_line
from benchmarks.tasks import Figures, Prepared, warm
from benchmarks.tasks.training import forward_backward, random_tokens

KINDS = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
SMALL = 1e-7
"""The learning rate: weights that stay where they are take the same time."""


def prepare(adapter: Adapter, folder: Path, batch: int, length: int) -> Prepared:
    """Parts of a step, and all of it with each AdamW. One that can't step on these parameters is left out, with a note."""
    model = adapter.build(folder).train()
    tokens = random_tokens(model, batch, length)
    optimizers = {kind: torch.optim.AdamW(model.parameters(), lr=SMALL, **how) for kind, how in KINDS.items()}
    forward_backward(model, model, tokens)
    notes = {}
    for kind, optimizer in list(optimizers.items()):
        try:
            optimizer.step()
        except Exception as error:
            notes[kind] = first_line(error)
            del optimizers[kind]

    def step() -> Figures:
        base = timed(lambda: forward_backward(model, model, tokens))
        clip = timed(lambda: adapter.clip(model, 1.0))
        parts = {kind: timed(optimizer.step) for kind, optimizer in optimizers.items()}
        whole = {f"step, {kind}": base + clip + part for kind, part in parts.items()}
        return whole | {"clip": clip} | parts

    warm(step, 2)
    return Prepared(step, notes=notes)


def timed(run: Callable[[], object]) -> float:
    """Its ms."""
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3
