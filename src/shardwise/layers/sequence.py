"""Sequence parallelism: between the parallel regions each rank keeps its slice of the sequence.

    scatter -> layers of [ norm -> gather -> attention or MLP -> reduce-scatter -> + ] -> gather

The residual stream, its norms, dropouts and additions take 1/tp of the memory, and a layer sends the bytes that its all-reduces
took (Korthikanti et al. 2022, arXiv:2205.05198). The stream is cut at the entrance of the first decoder layer, as position ids
and masks are made for all positions, and whole again behind the last one. The first layer decides, in training mode and for
sequences that have work for every rank; the others see by the length of what they are given what it decided. So the same holds
when a layer is recomputed, whatever ran in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shardwise.collectives import (
    Sizes,
    copy_to_tp,
    even_sizes,
    gather_from_sp,
    gather_from_tp,
    reduce_scatter_to_sp,
    scatter_to_tp,
)
from shardwise.errors import ShardwiseError, describe
from shardwise.layers import traced
from shardwise.layers.base import ParallelStyle, original_class
from shardwise.layers.linear import RowwiseParallel
from shardwise.layers.region import local_random_stream
from shardwise.layers.replicated import Replicate

LEAST = 2
"""Positions a rank, at least: of a slice of one, a sum with something of all positions would be broadcast, silently."""


def _nothing() -> bool:
    return False


@dataclass
class Stream:
    """What the modules of one model share while a decoder layer runs.

    Args:
        sizes: how many positions each rank has; None where the stream is whole.
        recorded: whether somebody collects what the layers give, who expects all positions.
    """

    sizes: Sizes | None = None
    recorded: Callable[[], bool] = _nothing


class SequenceStyle(Replicate):
    """What the styles of this module share. They go in front of a module's style, where it has one."""

    @property
    def _sizes(self) -> Sizes | None:
        stream = self._tp.stream
        return None if stream is None else stream.sizes

    def _own_masks(self, device: torch.device) -> AbstractContextManager[None]:
        """A random stream of this rank's own: every slice has masks of its own."""
        if torch.compiler.is_compiling() or not (self.training and self._tp.options.get("drops_out")):
            return nullcontext()
        return local_random_stream(device, self._tp.tp.get_local_rank())


class SequenceLayer(SequenceStyle):
    """A decoder layer on slices.  X (batch, sequence/tp, features) S(1) -> the same; the first takes I, the last gives I.

    The gradients of whole parameters that see this rank's positions only (norms, biases behind a sum) are summed, all those
    of a layer by one all-reduce.
    """

    prefix = "Sequence"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = _first(args, kwargs)
        state = self._tp
        stream, mesh, options = state.stream, state.tp, state.options
        assert stream is not None
        if options.get("first"):
            sizes = self._decide(hidden, stream)
            hidden = hidden if sizes is None else scatter_to_tp(hidden, mesh, 1, sizes)
        else:
            sizes = self._find(hidden, kwargs)
        if sizes is None:
            return super().forward(hidden, *args, **kwargs)
        # No context managers: Dynamo cannot trace a generator that leaves a `with` block by `return`.
        earlier, stream.sizes, owners = stream.sizes, sizes, self._sum_together()
        try:
            output = super().forward(hidden, *args, **kwargs)
        finally:
            stream.sizes = earlier
            for owner in owners:
                owner._tp.summed = None
        result = output[0] if isinstance(output, tuple) else output
        _check(self, result, sizes[mesh.get_local_rank()], "gave")
        if not options.get("last"):
            return output
        result = gather_from_tp(result, mesh, 1, sizes)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    def _decide(self, hidden: Tensor, stream: Stream) -> Sizes | None:
        size = self._tp.tp.size()
        if not self.training or hidden.dim() != 3 or hidden.shape[1] < LEAST * size:
            return None
        if stream.recorded():
            raise ShardwiseError(
                describe(
                    "output_hidden_states: with sequence_parallel=True a rank has its slice of them only.",
                    either=["model.eval(), where they are whole, or", "leave sequence_parallel out"],
                )
            )
        return even_sizes(hidden.shape[1], size)

    def _find(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Sizes | None:
        length = _full_length(self, kwargs)
        if hidden.shape[1] == length:
            return None
        sizes = even_sizes(length, self._tp.tp.size())
        _check(self, hidden, sizes[self._tp.tp.get_local_rank()], "was given")
        return sizes

    def _sum_together(self) -> list[ParallelStyle]:
        """Give each of the stream's parameters that is trained a value whose gradient is summed over the ranks; their modules
        are returned, which read these values until they are taken away.
        """
        owners = [(_at(self, path), name) for path, name in self._tp.stream_parameters]
        read = [(owner, name, owner._parameters[name]) for owner, name in owners]
        trained = [(owner, name, p) for owner, name, p in read if p is not None and p.requires_grad]
        if not trained or not torch.is_grad_enabled():
            return []
        copies = _copy_together([p for _, _, p in trained], self._tp.tp)
        for (owner, name, _), value in zip(trained, copies, strict=True):
            owner._tp.summed = {**(owner._tp.summed or {}), name: value}
        return [owner for owner, _, _ in trained]


class SequencePointwise(SequenceStyle):
    """A norm or a dropout of the stream, each position by itself.  X (batch, sequence/tp, features) S(1) -> the same."""

    prefix = "Sequence"
    sums_itself = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._sizes is None or not args:
            return super().forward(*args, **kwargs)
        with self._own_masks(args[0].device):
            return super().forward(*args, **kwargs)


class SequenceRegion(SequenceStyle):
    """Attention or an MLP, all of whose own parameters lie in column-wise and row-wise layers.

    X (batch, sequence/tp, features) S(1) -> gathered, R -> local heads or features -> (batch, sequence/tp, features) S(1).
    """

    prefix = "Sequence"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sizes, mesh = self._sizes, self._tp.tp
        if sizes is None:
            return super().forward(*args, **kwargs)
        hidden, args, kwargs = _first(args, kwargs)
        _check(self, hidden, sizes[mesh.get_local_rank()], "was given")
        gathered = gather_from_sp(hidden, mesh, 1, sizes)
        compiling = torch.compiler.is_compiling()
        if compiling:
            traced.say_gathered(True)
        try:
            with self._own_masks(hidden.device):
                return super().forward(gathered, *args, **kwargs)
        finally:
            if compiling:
                traced.say_gathered(False)


class SequenceWhole(SequenceStyle):
    """A module that computes more with whole parameters (a router), so its input must be I.

    X (batch, sequence/tp, features) S(1) -> gathered, I -> as without sequence parallelism, I -> this rank's slice, S(1). Its
    own collectives stay, and a gather is added in each direction.
    """

    prefix = "Sequence"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream, mesh = self._tp.stream, self._tp.tp
        if stream is None or stream.sizes is None:
            return super().forward(*args, **kwargs)
        sizes = stream.sizes
        hidden, args, kwargs = _first(args, kwargs)
        _check(self, hidden, sizes[mesh.get_local_rank()], "was given")
        gathered = gather_from_tp(hidden, mesh, 1, sizes)
        stream.sizes = None
        try:
            output = super().forward(gathered, *args, **kwargs)
        finally:
            stream.sizes = sizes
        result = output[0] if isinstance(output, tuple) else output
        _check(self, result, sum(sizes), "gave")
        if isinstance(output, tuple) and any(isinstance(other, Tensor) and other.shape == result.shape for other in output[1:]):
            raise _unknown(self, "gave two results of all positions, of which one may go on to the stream")
        result = scatter_to_tp(result, mesh, 1, sizes)
        return (result, *output[1:]) if isinstance(output, tuple) else result


class SequenceRowwise(RowwiseParallel):
    """The end of a region.  X (batch, sequence, in/tp) S(-1) -> Y (batch, sequence/tp, out) S(1), the bias added to it."""

    prefix = "SequenceRowwise"

    def forward(self, input: Tensor) -> Tensor:
        stream = self._tp.stream
        if stream is None or stream.sizes is None:
            return super().forward(input)
        if torch.compiler.is_compiling() and self._facts["plain"]:
            product = linear(input, self.weight)
        else:
            self._tp.leave()
            product = self._product(input)
        output = reduce_scatter_to_sp(product, self._tp.tp, 1, stream.sizes)
        bias = self._parameters.get("bias")
        return output if bias is None else output + (self._tp.summed or {}).get("bias", bias)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _full_length(layer: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """How many positions there are on all ranks, by what is given to every layer, so that a recomputation finds it too."""
    positions, embeddings = kwargs.get("position_ids"), kwargs.get("position_embeddings")
    if isinstance(positions, Tensor):
        return positions.shape[-1]
    if embeddings is not None:
        return int(embeddings[0].shape[-2])
    raise ShardwiseError(
        describe(
            f"sequence_parallel: {original_class(layer).__name__} was given neither position_ids nor position_embeddings, "
            "which tell it how long the sequence is.",
            either=["pass position_ids to the model, or", "leave sequence_parallel out"],
        )
    )


def _check(module: nn.Module, hidden: object, length: int, did: str) -> None:
    if isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[1] == length:
        return
    found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
    raise _unknown(module, f"{did} {found}, where {length} positions were expected")


def _unknown(module: nn.Module, what: str) -> ShardwiseError:
    return ShardwiseError(
        describe(
            f"sequence_parallel: {original_class(module).__name__} {what}.",
            either=["leave sequence_parallel out: this model does more with its hidden states than it can follow"],
        )
    )


def _at(module: nn.Module, path: tuple[str, ...]) -> ParallelStyle:
    for name in path:
        inner = module._modules[name]
        assert inner is not None
        module = inner
    assert isinstance(module, ParallelStyle)
    return module


def _copy_together(parameters: list[Tensor], mesh: Any) -> list[Tensor]:
    """`copy_to_tp` of each, such that one all-reduce for each dtype sums the gradients of all. Shapes: unchanged."""
    if len(parameters) < 2:
        return [copy_to_tp(p, mesh) for p in parameters]
    copies: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        alike = [(i, p) for i, p in enumerate(parameters) if p.dtype == dtype]
        joined = copy_to_tp(torch.cat([p.flatten() for _, p in alike]), mesh)
        for (i, p), part in zip(alike, joined.split([p.numel() for _, p in alike]), strict=True):
            copies[i] = part.view_as(p)
    return [copies[i] for i in range(len(parameters))]
