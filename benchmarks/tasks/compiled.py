"""A training step under torch.compile: its time, how long it takes to compile anew, and in how many graphs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from benchmarks.adapters.base import Adapter
from benchmarks.serving import first_line
from benchmarks.tasks import Prepared, warm
from benchmarks.tasks.training import forward_backward, random_tokens

STEPS = 20


def prepare(adapter: Adapter, folder: Path, batch: int, length: int) -> Prepared:
    """As one graph (`fullgraph=True`), or, where that fails, in as many as it takes; with a cache that is empty."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=folder.parent)
    model, notes = adapter.build(folder).train(), {}
    tokens = random_tokens(model, batch, length)
    try:
        called, seconds = compiled(model, lambda called: forward_backward(model, called, tokens), fullgraph=True)
    except Exception as error:
        notes["not one graph"] = first_line(error)
        called, seconds = compiled(model, lambda called: forward_backward(model, called, tokens), fullgraph=False)
    graphs = counters["stats"]["unique_graphs"]
    warm(lambda: forward_backward(model, called, tokens), STEPS)
    facts = {
        "compile": seconds,
        "graphs": graphs,
        "breaks": sum(counters["graph_break"].values()),
        "recompiled": counters["stats"]["unique_graphs"] - graphs,
    }
    return Prepared(lambda: forward_backward(model, called, tokens), facts=facts, notes=notes)


def compiled(model: PreTrainedModel, step: Callable[[nn.Module], None], fullgraph: bool) -> tuple[nn.Module, float]:
    """The compiled model, and the seconds of its first step."""
    torch._dynamo.reset()
    counters.clear()
    called = torch.compile(model, fullgraph=fullgraph, dynamic=False)
    began = time.perf_counter()
    step(called)
    return called, time.perf_counter() - began
