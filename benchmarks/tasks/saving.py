"""From a model on all ranks to its checkpoint on the disk."""

from __future__ import annotations

import os
import shutil
import time
from itertools import count
from pathlib import Path

import torch.distributed as dist

from benchmarks.adapters.base import Adapter
from benchmarks.memory import Watch
from benchmarks.tasks import Figures, Prepared
from benchmarks.tasks.loading import MIB, weights


def prepare(adapter: Adapter, folder: Path) -> Prepared:
    """Some contenders bring the bytes to the disk themselves (`fsync`), some leave it to the kernel: so `sync` counts too."""
    numbers = count()

    def step() -> Figures:
        model = adapter.build(folder)  # each time: models of all contenders would not fit into memory
        weights(model, read=True)  # those that still lie in the mapped file
        place = folder.parent / f"saved-{next(numbers)}"
        place.mkdir(exist_ok=True)
        os.sync()
        with Watch() as watch:
            began = time.perf_counter()
            adapter.save(model, place)
            saved = time.perf_counter() - began
            os.sync()
            synced = time.perf_counter() - began
        over = watch.most["RssAnon"] - watch.before["RssAnon"]
        if dist.is_initialized():
            dist.barrier()  # with some contenders every rank writes
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(place)
        return {"on disk": synced, "save_pretrained": saved, "over": over / MIB}

    step()
    return Prepared(step)
