"""Tokens from `generate()`: greedy, with a KV cache."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.adapters.base import Adapter
from benchmarks.tasks import Figures, Prepared
from benchmarks.tasks.training import random_tokens


def prepare(adapter: Adapter, folder: Path, prompt: int, tokens: int) -> Prepared:
    """ms for each of `tokens` tokens behind the first one, which costs the prompt, at batch 1."""
    model = adapter.build(folder).eval()
    inputs = random_tokens(model, 1, prompt)
    model.generation_config.pad_token_id = 0

    def generate(count: int) -> float:
        began = time.perf_counter()
        found = model.generate(inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)
        elapsed = time.perf_counter() - began
        assert found.shape[1] == prompt + count
        return elapsed

    def step() -> Figures:
        first = generate(1)
        return {"ms": (generate(1 + tokens) - first) * 1e3 / tokens, "first token": first * 1e3}

    step()
    return Prepared(step)
