"""The training loop: the same lines for one process and for many, and both run step by step beside each other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import shardwise
from shardwise.demo.settings import Settings
from shardwise.demo.text import Text
from shardwise.model_state import state_of


class Run:
    """A model in training: AdamW, a short warm-up and a cosine to a tenth, gradients clipped to norm 1.

    Nothing here depends on whether the model lies on one process or on several, but for the look at the first gradients.
    """

    def __init__(self, model: nn.Module, steps: int, warmup: int, learning_rate: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)

        def factor(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            return min(1.0, (step + 1) / warmup) * (0.1 + 0.9 * cosine)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []
        self.first_gradients: dict[str, Tensor] | None = None

    def step(self, batch: Tensor) -> None:
        """One optimizer step on `batch`, (sequences, tokens) int64. Of the first one the full gradients are kept, on rank 0."""
        start = time.perf_counter()
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        seconds = time.perf_counter() - start
        if not self.losses:
            self.first_gradients = _full_gradients(self.model)
        start = time.perf_counter()
        norm = shardwise.clip_grad_norm_(self.model, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))
        self.norms.append(float(norm))
        self.seconds.append(seconds + time.perf_counter() - start)

    def evaluate(self, batch: Tensor) -> float:
        """The loss on `batch`, without training."""
        with torch.no_grad():
            return float(self.model(input_ids=batch, labels=batch, use_cache=False).loss)


@dataclass(frozen=True)
class Training:
    """Both runs: the model on several processes, and the same in this one, which only rank 0 has."""

    sharded: Run
    whole: Run | None


def train(
    sharded: nn.Module, whole: nn.Module | None, text: Text, settings: Settings, on_step: Callable[[Training], None]
) -> Training:
    """Train both models on the same batches: a step of the one, then of the other, so that each has the machine for itself.

    Args:
        sharded: this rank's part of the parallel model.
        whole: the ordinary model, on rank 0.
        text: where the batches come from.
        settings: the size and the number of steps.
        on_step: called after each step.
    """
    size, steps = settings.size, settings.total_steps
    schedule = (steps, size.warmup, size.learning_rate)
    training = Training(Run(sharded, *schedule), Run(whole, *schedule) if whole is not None else None)
    for step in range(steps):
        batch = text.batch(step, size.batch, size.length, settings.seed)
        if training.whole is not None:
            training.whole.step(batch)
        training.sharded.step(batch)
        on_step(training)
    return training


def _full_gradients(model: nn.Module) -> dict[str, Tensor] | None:
    if state_of(model) is not None:
        return shardwise.full_gradients(model)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
