"""How many collectives a decoder layer makes, and of how many bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from benchmarks.adapters.base import Adapter
from benchmarks.tasks import Prepared
from benchmarks.tasks.training import random_tokens

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast")
NAMESPACES = ("c10d", "_c10d_functional")
INPUTS = ("input", "inputs", "input_tensor", "input_tensors", "input_list", "tensor", "tensors")
"""What the operators call the tensors that a rank puts in; what it takes out is often the same tensor."""


def prepare(adapter: Adapter, folder: Path, shorter: str, layers: int, length: int, train: bool) -> Prepared:
    """Of a layer: the difference between this model and one that is `layers` layers shorter, in the folder beside it."""
    found = [count(adapter.build(path), length, train) for path in (folder, folder.parent / shorter)]
    figures = {what: (found[0][what] - found[1][what]) / layers for what in {**found[0], **found[1]}}
    total = sum(found[1][kind] for kind in KINDS)
    per_layer = sum(figures.get(kind, 0) for kind in KINDS)
    figures |= {"collectives": per_layer, "outside": total - per_layer * layers}
    return Prepared(lambda: dict(figures))


def count(model: PreTrainedModel, length: int, train: bool) -> Counter[str]:
    """By kind, and KiB, of a training step, or of one token's forward pass with a KV cache."""
    tokens = random_tokens(model, 1, length)
    if not train:
        with torch.no_grad(), Count() as passed:
            model.eval()(input_ids=tokens[:, :1], use_cache=True)
        return passed.found
    with Count() as forward:
        loss = model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss
    with Count() as backward:
        loss.backward()
    parts = {"forward": forward.total(), "backward": backward.total()}
    return forward.found + backward.found + Counter(parts)


class Count(TorchDispatchMode):
    """Counts what is handed to the process group, whoever does it: at the operators that all ways to it lead through."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def total(self) -> int:
        """Of all kinds."""
        return sum(self.found[kind] for kind in KINDS)

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: list[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # what it makes of this comes by here again, on plain tensors
        kind = kind_of(func) if func.namespace in NAMESPACES else ""
        if kind:
            self.found[kind] += 1
            self.found["KiB"] += sum(tensor.nbytes for tensor in sent(func, args, kwargs or {})) / 1024
        return func(*args, **(kwargs or {}))


def kind_of(func: torch._ops.OpOverload) -> str:
    """Which of `KINDS` an operator is; empty for what is none, such as a wait."""
    name = func._schema.name.partition("::")[2].replace("_", "")
    return next((kind for kind in KINDS if name.startswith(kind.replace("-", ""))), "")


def sent(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that this rank puts in."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return [tensor for name in INPUTS if name in named for tensor in flat(named[name])]


def flat(value: Tensor | list) -> list[Tensor]:
    """A tensor, or lists of lists of them, as one list."""
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flat(part)]
