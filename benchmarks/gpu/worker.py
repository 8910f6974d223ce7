"""One backend in a process of its own: reads requests as lines of JSON, answers each with a line.

{"do": "prepare", "cell": "train compiled"}              compile it, run it some times
{"do": "round", "cell": ..., "runs": 5}                  times of some runs
{"do": "profile", "cell": ..., "trace": path or null}    kernels, memory
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.gpu import measure
from benchmarks.gpu.backends import one_rank
from benchmarks.gpu.sizes import LLAMA_3B, TINY, Size
from benchmarks.gpu.steps import Step, make_step
from benchmarks.serving import Reply, answers, first_line, serve

WARM_UP = 3


class Worker:
    """The model, and the cells that are ready."""

    def __init__(self, model: PreTrainedModel, size: Size, device: str) -> None:
        self.model, self.size, self.device = model, size, device
        self.steps: dict[str, tuple[Step, int]] = {}

    def prepare(self, cell: str) -> Reply:
        """Compile and warm up; as one graph, or in several where it cannot be one."""
        began, reason = time.monotonic(), ""
        try:
            self.steps[cell] = self._ready(cell, fullgraph=True)
        except Exception as error:
            if cell.endswith("eager") or "out of memory" in str(error):
                raise
            reason = first_line(error)
            torch._dynamo.reset()
            self.steps[cell] = self._ready(cell, fullgraph=False)
        return {"seconds": time.monotonic() - began, "not one graph": reason}

    def round(self, cell: str, runs: int) -> Reply:
        """Times of some runs."""
        step, count = self.steps[cell]
        samples = measure.sample(step, count, runs, self.device)
        self._clear()
        return {"samples": [asdict(sample) for sample in samples]}

    def profile(self, cell: str, trace: str | None) -> Reply:
        """Kernels and memory of one run."""
        step, count = self.steps[cell]
        memory = measure.peak_memory(step, self.device)
        found = measure.profile(step, count, self.device, Path(trace) if trace else None)
        self._clear()
        return {**found.to_json(), "memory": memory}

    def _ready(self, cell: str, fullgraph: bool) -> tuple[Step, int]:
        step, count = make_step(cell, self.model, self.size, fullgraph)
        for _ in range(WARM_UP):
            step()
        self._clear()
        return step, count

    def _clear(self) -> None:
        """Leave the memory of the device to the other workers."""
        self.model.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def main(backend: str, tp: int, dtype: str, device: str, size: Size) -> None:
    """A worker's life."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(tp), HF_HUB_OFFLINE="1")
    answer = answers()
    torch.manual_seed(0)
    try:
        with one_rank(backend, size, tp, getattr(torch, dtype), device) as model:
            if device == "cuda":
                torch.cuda.empty_cache()
            answer({"transformers": transformers.__version__, "site": str(Path(transformers.__file__).parents[1])})
            serve(Worker(model, size, device), sys.stdin, answer)
    except Exception as error:
        answer({"error": first_line(error)})
        raise


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], TINY if sys.argv[5] == "tiny" else LLAMA_3B)
