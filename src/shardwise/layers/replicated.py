"""Modules that every rank keeps whole, and what still has to be summed or sliced around them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.collectives import even_sizes, gather_from_tp, reduce_from_tp, scatter_to_tp
from shardwise.errors import ShardwiseError, describe
from shardwise.layers.base import Cut, Local, ParallelStyle, is_parallel, original_class
from shardwise.layers.region import drops_out, local_random_stream
from shardwise.layout import Layout, Shape


class Replicate(ParallelStyle):
    """Every rank keeps the module whole and computes the same. A parameter that a rule gives this style is whole on purpose."""

    prefix = "Replicated"


class LocalParamsParallel(Replicate):
    """A module whose own forward runs on local shards: the owner of bare parameters that are cut (attention sinks), or of
    numbers that became local (heads on this rank).
    """

    prefix = "Local"


class LocalMixer(LocalParamsParallel):
    """As `LocalParamsParallel`, of a module whose forward reads parameters of its children itself, as of a convolution, some of
    them held by several ranks: while it runs, their gradients are summed.
    """

    prefix = "LocalMixer"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        children: list[Any] = [child for child in self._modules.values() if child is not None and is_parallel(child)]
        inside = [child._tp for child in children if child._tp.summed is None]
        for state in inside:
            state.summed = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            for state in inside:
                state.summed = None


class LocalRows(LocalParamsParallel):
    """As `LocalParamsParallel`; what a rule gives this style is cut along dim 0, or the dim that its cut names: a depthwise
    convolution by its channels, a table by its heads.
    """

    @classmethod
    def layout(cls, shape: Shape, cut: Cut) -> Layout:
        return cut.along(0)

    @classmethod
    def local_attributes(cls, module: nn.Module, local: Local) -> dict[str, int | None]:
        groups = getattr(module, "groups", 1)
        if groups == 1 or "weight" not in local.layouts:
            return {}
        return {"groups": groups * local.shape("weight")[0] // local.layouts["weight"][1][0]}


class UnfusedMixer(LocalMixer):
    """As `LocalMixer`, of a state-space mixer, whose code in training calls one fused kernel, where that is installed. It
    multiplies by the weight of the output projection, past the sum over the ranks, and norms by the rank's own statistics.

    So the mixer's forward is not told that it trains, which is all that it reads `training` for, and calls its modules.
    """

    prefix = "Unfused"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        training, self.training = self.training, False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = training


class ReplicatedWithGradAllReduce(Replicate):
    """Whole parameters that see only this rank's part of the activations (a norm over local heads): their gradients are summed.

    What is summed is each backward's contribution, so accumulated micro-batches are counted once (see `sum_gradient`).
    """

    prefix = "GradSummed"
    gradient_is_partial = True


class SequenceParallel(Replicate):
    """A position-wise module (a norm, a dropout) run on this rank's slice of the sequence.  X (batch, sequence, ...) I -> the
    same, I.

    Its activations take 1/tp of the memory; its whole parameters see 1/tp of the positions, so their gradients are summed.
    Korthikanti et al. 2022, arXiv:2205.05198.
    """

    prefix = "SequenceParallel"
    gradient_is_partial = True

    @classmethod
    def options(cls, module: nn.Module, parent: nn.Module) -> dict[str, int]:
        return {"drops_out": int(drops_out(module))}

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if input.dim() < 3:
            kind, shape = original_class(self).__name__, tuple(input.shape)
            raise ShardwiseError(
                describe(
                    f"sequence_parallel: {kind} was given {shape}, and needs (batch, sequence, features).",
                    either=["give it a batch dim, or", "the style replicate: it is computed on every rank"],
                )
            )
        sizes = even_sizes(input.shape[1], self._tp.mesh.size())
        local = scatter_to_tp(input, self._tp.mesh, 1, sizes)
        # Slices of different lengths draw different amounts, and each slice has a mask of its own.
        random = self.training and self._tp.options["drops_out"] and not torch.compiler.is_compiling()
        stream = local_random_stream(input.device, self._tp.mesh.get_local_rank()) if random else nullcontext()
        with stream:
            local = super().forward(local, *args, **kwargs)
        return gather_from_tp(local, self._tp.mesh, 1, sizes)


class AllReduceParallel(Replicate):
    """A module whose output is a part on each rank: the parts are summed.  Its own output P -> I; of several outputs, the
    first.
    """

    prefix = "AllReduce"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if isinstance(output, Tensor):
            return reduce_from_tp(output.clone(), self._tp.mesh)
        if isinstance(output, tuple):
            return (reduce_from_tp(output[0].clone(), self._tp.mesh), *output[1:])
        return output
