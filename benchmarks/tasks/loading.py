"""From a checkpoint in the page cache to a model that can compute."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.adapters.base import Adapter
from benchmarks.memory import Watch
from benchmarks.tasks import Figures, Prepared

MIB = 2**20


def prepare(adapter: Adapter, folder: Path) -> Prepared:
    """A step loads the model anew, and reads each of its weights once: what a loader puts off until then counts too."""

    def step() -> Figures:
        with Watch() as watch, adapter.bytes_asked() as asked:
            began = time.perf_counter()
            model = adapter.build(folder)
            loaded = time.perf_counter() - began
            shards = sum(local.nbytes for local in weights(model, read=True))
            ready = time.perf_counter() - began
        kept = min(watch.after["RssAnon"] - watch.before["RssAnon"], shards)
        over = watch.most["RssAnon"] - watch.before["RssAnon"] - kept
        pages = watch.most["RssFile"] - watch.before["RssFile"]
        read = pages + watch.after["rchar"] - watch.before["rchar"]
        known = {"asked share": sum(asked) / shards} if asked else {}
        return known | {
            "ready": ready,
            "from_pretrained": loaded,
            "over": over / MIB,
            "shards": shards / MIB,
            "read": read / MIB,
            "read share": read / shards,
        }

    step()
    return Prepared(step)


def weights(model: PreTrainedModel, read: bool = False) -> list[Tensor]:
    """This rank's part of every parameter; read through once, if asked."""
    found = [getattr(parameter, "_local_tensor", parameter).detach() for parameter in model.parameters()]
    if read:
        for tensor in found:
            tensor.sum().item()
    return found
