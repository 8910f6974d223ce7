"""What happens in a LoRA layer around a parallel layer, beyond its two products, which have styles of their own.

    Y = base(X) + B(A(dropout(X))) * scaling                             Hu et al. 2021, arXiv:2106.09685

Around a column-wise base, A is whole and B column-wise, as the base is; around a row-wise one, A is row-wise and B whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from shardwise.layers.base import ParallelStyle, is_parallel
from shardwise.layers.region import local_random_stream


class CommonDropout(ParallelStyle):
    """Dropout in front of a whole A: every rank drops out the same elements, also in a region with a random stream of its own.
    X I -> X I.
    """

    prefix = "Common"

    def forward(self, input: Tensor) -> Tensor:
        region = self._tp.region
        if region is None or not self.training or torch.compiler.is_compiling():
            return super().forward(input)  # type: ignore[no-any-return]
        with region.common(input.device, self._tp.mesh.get_local_rank()):
            return super().forward(input)  # type: ignore[no-any-return]


class LocalDropout(ParallelStyle):
    """Dropout in front of a row-wise A: each rank's features have a mask of their own.  X S(-1) -> X S(-1)."""

    prefix = "Local"

    def forward(self, input: Tensor) -> Tensor:
        random = self.training and not torch.compiler.is_compiling()
        with local_random_stream(input.device, self._tp.mesh.get_local_rank()) if random else nullcontext():
            return super().forward(input)  # type: ignore[no-any-return]


class WholeEmbeddingAdapter(ParallelStyle):
    """PEFT's LoRA layer around an embedding that is cut: A (rank, vocabulary) and B (features, rank) are whole on every rank.
    ids (...) I -> (..., features) I.
    """

    prefix = "Whole"

    def _embed(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()  # type: ignore[operator]
        # The base's padding_idx counts from its own first row.
        padding = base._tp.restore.get("padding_idx", base.padding_idx)
        return embedding(input, weight, padding, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to this rank's part of the base's weight. Shape: as that."""
        state = self.get_base_layer()._tp  # type: ignore[operator]
        layout, _ = state.layouts["weight"]
        delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        return layout.shard(delta, state.mesh.get_local_rank(), state.mesh.size())  # type: ignore[no-any-return]


class ExpertAdapter(ParallelStyle):
    """PEFT's LoRA of stacked experts' matrices (experts, out, in), cut along out or in, as B (out, rank x experts), or
    A (rank x experts, in), is too: what is added is of the local shape.

    PEFT reads both weights past their modules' forward; of the whole one the gradient is summed.
    """

    prefix = "Local"

    def get_delta_factors(self, adapter_name: str) -> Any:
        """What PEFT adds to this rank's part of the weights, as two factors and a number."""
        with self._summing(adapter_name):
            return super().get_delta_factors(adapter_name)  # type: ignore[misc]

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """The same as one tensor. Shape: as this rank's part of the weights."""
        with self._summing(adapter_name):
            return super().get_delta_weight(adapter_name, *args, **kwargs)  # type: ignore[misc, no-any-return]

    @contextmanager
    def _summing(self, adapter: str) -> Iterator[None]:
        factors: list[Any] = [self.lora_A[adapter], self.lora_B[adapter]]  # type: ignore[index]
        states = [factor._tp for factor in factors if is_parallel(factor)]
        for state in states:
            state.summed = {}
        try:
            yield
        finally:
            for state in states:
                state.summed = None
