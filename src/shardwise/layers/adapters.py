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

from shardwise.collectives import reduce_from_tp
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


class LocalMagnitude(ParallelStyle):
    """DoRA's magnitudes around a column-wise layer: each rank has those of its outputs.  X I, Y S(-1) -> Y S(-1).

        Y = m * (W + BA scaling) X / |W + BA scaling|, row by row                    Liu et al. 2024, arXiv:2402.09353

    The norm is no part of the gradient, as in PEFT.
    """

    prefix = "Local"

    def forward(self, x: Tensor, *, base_layer: Any, base_result: Tensor | None = None, **keywords: Any) -> Tensor:
        # PEFT multiplies by the base's weight itself where dropout makes another input of x.
        result = base_layer(x) if base_result is None else base_result
        output: Tensor = super().forward(x, base_layer=base_layer, base_result=result, **keywords)
        return output

    def get_lora_weight(self, lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> Tensor:
        """B A, as long as this rank's part of the base's weight; PEFT sends the unit matrix through both."""
        product: Tensor = lora_B.weight @ lora_A.weight
        return product


class SummedMagnitude(LocalMagnitude):
    """DoRA's magnitudes around a row-wise layer: whole, and the norm of a row is that of all ranks' parts of it.
    X S(-1), Y I -> Y I.
    """

    prefix = "Summed"

    def get_weight_norm(self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None) -> Tensor:
        """The norm of each row of the whole weight, (out,), in the weight's dtype, computed in float32. Collective."""
        weight = (weight.T if self.fan_in_fan_out else weight) + scaling * lora_weight
        with torch.no_grad():
            squares = weight.float().square().sum(1)
            return reduce_from_tp(squares, self._tp.mesh).sqrt().to(weight.dtype)


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
