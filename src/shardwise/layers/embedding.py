"""Embeddings split over the vocabulary or over the features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from shardwise.collectives import gather_from_tp, reduce_from_tp
from shardwise.layers.base import Cut, Local, ParallelStyle
from shardwise.layout import Layout, Shape


class EmbeddingStyle(ParallelStyle):
    """What the embedding styles share."""

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        return None if isinstance(module, nn.Embedding) else f"{type(module).__name__} is not an embedding"

    def extra_repr(self) -> str:
        local, full = self._parameters["weight"], self._tp.layouts["weight"][1]
        assert local is not None
        words = [f"{a} of {b}" if a != b else str(a) for a, b in zip(local.shape, full, strict=True)]
        return f"{', '.join(words)}, tp={self._tp.mesh.size()}"


class EmbeddingRowwise(EmbeddingStyle):
    """The vocabulary split: mask the ids of others, look up, sum.  ids (...) I -> (..., features) I.

    Whatever the module's own forward does with a row (a scale) happens before the mask. Megatron-LM, arXiv:1909.08053.
    """

    prefix = "VocabParallel"

    @classmethod
    def layout(cls, shape: Shape, cut: Cut) -> Layout:
        return cut.along(0)

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        if getattr(module, "max_norm", None) is not None:
            return "an embedding with max_norm renormalises rows that other ranks hold"
        if getattr(module, "scale_grad_by_freq", False):
            return "an embedding with scale_grad_by_freq counts ids, and a rank sees only its own"
        if isinstance(module, nn.Embedding) and not looks_up_what_it_is_given(module):
            return f"{type(module).__name__} looks up other rows than it is given the ids of"
        return super().refuses(module)

    @classmethod
    def local_attributes(cls, module: nn.Module, local: Local) -> dict[str, int | None]:
        # `num_embeddings` stays the whole vocabulary's, as `in_features` of a linear layer does.
        pad = module.padding_idx
        if not isinstance(pad, int):
            return {}
        mine = pad - local.start("weight")
        return {"padding_idx": mine if 0 <= mine < local.shape("weight")[0] else None}

    def forward(self, input: Tensor) -> Tensor:
        ids, elsewhere = self._tp.own(input, "weight")
        rows = super().forward(ids.masked_fill(elsewhere, 0))
        return reduce_from_tp(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self._tp.mesh)


class _LookUps(TorchFunctionMode):
    """Records the ids of rows that are looked up, and gives zeros for these."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[object] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is not functional.embedding:
            return function(*args, **(kwargs or {}))
        ids, weight = (*args, *(kwargs or {}).values())[:2]
        self.ids.append(ids)
        return torch.zeros(*ids.shape, weight.shape[-1])


def looks_up_what_it_is_given(module: nn.Embedding) -> bool:
    """Whether `module` looks up the rows whose ids it is given. One with a forward of its own may add an offset to them, as
    learned positions do.
    """
    if type(module).forward is nn.Embedding.forward:
        return True
    ids, seen = torch.tensor([[0, 1]], device="cpu"), _LookUps()
    try:
        with torch.no_grad(), seen:
            type(module).forward(module, ids)
    except Exception:  # its code asks for something else, or more, on which it may work
        pass
    return all(isinstance(found, Tensor) and found.tolist() == ids.tolist() for found in seen.ids)


class EmbeddingColwise(EmbeddingStyle):
    """The features split: each rank looks up its slice of every row, and the slices are gathered.  ids (...) I -> (...,
    features) I.
    """

    prefix = "FeatureParallel"

    @classmethod
    def layout(cls, shape: Shape, cut: Cut) -> Layout:
        return cut.along(1)

    def forward(self, input: Tensor) -> Tensor:
        return gather_from_tp(super().forward(input), self._tp.mesh, -1, self._tp.sizes["weight"])
