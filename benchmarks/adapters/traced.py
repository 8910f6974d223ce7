"""shardwise, in a process in which a trace and a breakpoint were on before: what they cost when they are off."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

import shardwise
from benchmarks.adapters.ours import Ours


class Traced(Ours):
    """Plain tensors; what looked on has gone."""

    def build(self, folder: Path, expert_parallel: bool = False) -> PreTrainedModel:
        """Each rank reads its own shards; then one step is traced."""
        model = super().build(folder, expert_parallel)
        ids = torch.zeros(1, 8, dtype=torch.long)
        with shardwise.trace_collectives() as trace, shardwise.break_on("nowhere"):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert len(trace) > 0
        model.zero_grad()
        return model


ADAPTER = Traced()
