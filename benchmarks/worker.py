"""One rank of one contender, in its own interpreter: `python -m benchmarks.worker ADAPTER SIZE fake|processes THREADS`.

{"do": "prepare", "task": "training", "model": folder, "options": {...}}     build it, warm it up
{"do": "round", "steps": 3}                                                  figures of some steps
{"do": "drop"}                                                               free it
"""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from benchmarks.adapters import adapter_named
from benchmarks.adapters.base import Adapter
from benchmarks.serving import Reply, answers, first_line, serve
from benchmarks.tasks import Figures, Prepared


class Worker:
    """What is prepared, if anything is."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.prepared: Prepared | None = None

    def prepare(self, task: str, model: str, options: dict[str, object]) -> Reply:
        """Make a step of a task ready. The facts that it finds on the way, notes, and the backend of the process group are the
        answer."""
        torch.manual_seed(0)
        try:
            self.prepared = import_module(f"benchmarks.tasks.{task}").prepare(self.adapter, Path(model), **options)
        except Exception:
            traceback.print_exc()  # the answer has but one line of it
            raise
        gc.collect()
        gc.freeze()
        backend = dist.get_backend_config() if dist.is_initialized() else ""
        return {"facts": self.prepared.facts, "notes": self.prepared.notes, "backend": backend}

    def round(self, steps: int) -> Reply:
        """The figures of some steps, by step."""
        assert self.prepared is not None
        return {"samples": [self._sample(self.prepared) for _ in range(steps)]}

    def drop(self) -> Reply:
        """Forget what was prepared, and give its memory back."""
        self.prepared = None
        gc.unfreeze()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return {}

    @staticmethod
    def _sample(prepared: Prepared) -> Figures:
        began = time.perf_counter()
        figures = prepared.step()
        elapsed = time.perf_counter() - began
        return figures or {"ms": elapsed * 1e3 / prepared.count}


def main(adapter: str, size: int, fake: bool, threads: int) -> None:
    """A worker's life."""
    answer = answers()
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    try:
        worker = Worker(adapter_named(adapter))
        worker.adapter.start(size, fake)
    except Exception as error:
        answer({"error": first_line(error)})
        raise
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    answer({"versions": versions})
    serve(worker, sys.stdin, answer)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "fake", int(sys.argv[4]))
