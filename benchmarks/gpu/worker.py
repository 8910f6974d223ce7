"""One backend in a process of its own: reads requests as lines of JSON, answers each with a line.

{"do": "prepare", "cell": "train compiled"}              compile it, run it some times
{"do": "round", "cell": ..., "runs": 5}                  times of some runs
{"do": "profile", "cell": ..., "trace": path or null}    kernels, memory
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.gpu import measure
from benchmarks.gpu.backends import one_rank
from benchmarks.gpu.sizes import LLAMA_3B, TINY, Size
from benchmarks.gpu.steps import Step, make_step

Reply = dict[str, object]
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
            reason = _first_line(error)
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


def serve(worker: Worker, requests: TextIO, answer: Callable[[Reply], None]) -> None:
    """Answer until the other end closes. What fails is answered too, as text."""
    for line in requests:
        request = json.loads(line)
        action = getattr(worker, request.pop("do"))
        try:
            answer(action(**request))
        except Exception as error:
            answer({"error": _first_line(error)})


def main(backend: str, tp: int, dtype: str, device: str, size: Size) -> None:
    """A worker's life. Whatever a library prints goes to standard error, and the answers alone to standard output."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(tp), HF_HUB_OFFLINE="1")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(reply: Reply) -> None:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()

    torch.manual_seed(0)
    try:
        with one_rank(backend, size, tp, getattr(torch, dtype), device) as model:
            if device == "cuda":
                torch.cuda.empty_cache()
            answer({"transformers": transformers.__version__, "site": str(Path(transformers.__file__).parents[1])})
            serve(Worker(model, size, device), sys.stdin, answer)
    except Exception as error:
        answer({"error": _first_line(error)})
        raise


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], TINY if sys.argv[5] == "tiny" else LLAMA_3B)
