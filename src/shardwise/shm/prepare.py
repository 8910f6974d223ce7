"""From the tensors of a call to its steps: checks them, cuts them, and says what all ranks must agree on.

Everything that is wrong with one rank's own arguments is raised here, before anybody has been told of the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TypeAlias

from torch import Tensor

from shardwise.shm import algorithms
from shardwise.shm.algorithms import Steps
from shardwise.shm.calls import Call
from shardwise.shm.channel import Channel
from shardwise.shm.flat import flat, parts, returned
from shardwise.shm.reduce import reducer

Prepared: TypeAlias = tuple[Call, Steps]


def barrier(channel: Channel) -> Prepared:
    """Every rank has come."""
    return Call("barrier"), algorithms.barrier(channel)


def all_reduce(channel: Channel, tensor: Tensor, op: str) -> Prepared:
    """In place."""
    data = flat(tensor)
    steps = algorithms.pick_all_reduce(channel, data)(channel, data, reducer(op, data.dtype, channel.size))
    return Call("all_reduce", data.dtype, data.numel(), op), returned(steps, [tensor], [data])


def all_gather(channel: Channel, outputs: Sequence[Tensor], source: Tensor) -> Prepared:
    """`source` of every rank into `outputs`, all of its size."""
    data = flat(source)
    flats = _alike(outputs, data, channel.size)
    steps = algorithms.all_gather(channel, flats, data)
    return Call("all_gather", data.dtype, data.numel()), returned(steps, outputs, flats)


def all_gather_single(channel: Channel, output: Tensor, source: Tensor) -> Prepared:
    """`source` of every rank, one behind the other, into `output`."""
    data, whole = flat(source), flat(output)
    pieces = _alike(_pieces(whole, channel.size), data, channel.size)
    steps = algorithms.all_gather(channel, pieces, data)
    return Call("all_gather", data.dtype, data.numel()), returned(steps, [output], [whole])


def reduce_scatter(channel: Channel, output: Tensor, inputs: Sequence[Tensor], op: str) -> Prepared:
    """The reduction of the ranks' `inputs` for this rank into `output`, all of its size."""
    data = flat(output)
    flats = _alike(inputs, data, channel.size)
    steps = algorithms.reduce_scatter(channel, data, flats, reducer(op, data.dtype, channel.size))
    return Call("reduce_scatter", data.dtype, data.numel(), op), returned(steps, [output], [data])


def reduce_scatter_single(channel: Channel, output: Tensor, source: Tensor, op: str) -> Prepared:
    """As `reduce_scatter`, the inputs one behind the other in `source`."""
    return reduce_scatter(channel, output, _pieces(flat(source), channel.size), op)


def broadcast(channel: Channel, tensor: Tensor, root: int) -> Prepared:
    """In place."""
    data = flat(tensor)
    steps = algorithms.broadcast(channel, data, root)
    return Call("broadcast", data.dtype, data.numel(), "", root), returned(steps, [tensor], [data])


def reduce(channel: Channel, tensor: Tensor, op: str, root: int) -> Prepared:
    """In place on `root`."""
    data = flat(tensor)
    steps = algorithms.reduce_to(channel, data, root, reducer(op, data.dtype, channel.size))
    return Call("reduce", data.dtype, data.numel(), op, root), returned(steps, [tensor], [data])


def gather(channel: Channel, outputs: Sequence[Tensor], source: Tensor, root: int) -> Prepared:
    """`source` of every rank into `outputs` on `root`."""
    data = flat(source)
    flats = _alike(outputs, data, channel.size) if channel.rank == root else []
    steps = algorithms.all_gather(channel, flats, data)
    return Call("gather", data.dtype, data.numel(), "", root), returned(steps, outputs if flats else [], flats)


def scatter(channel: Channel, output: Tensor, inputs: Sequence[Tensor], root: int) -> Prepared:
    """`inputs` of `root`, by rank, into `output`."""
    data = flat(output)
    flats = _alike(inputs, data, channel.size) if channel.rank == root else []
    steps = algorithms.scatter(channel, data, flats, root)
    return Call("scatter", data.dtype, data.numel(), "", root), returned(steps, [output], [data])


def all_to_all(channel: Channel, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Prepared:
    """`inputs[r]` of every rank to rank r, into `outputs` by sender."""
    _check_number(outputs, channel.size)
    _check_number(inputs, channel.size)
    flats = [flat(output) for output in outputs]
    steps = algorithms.all_to_all(channel, flats, [flat(source) for source in inputs])
    return Call("all_to_all", flats[0].dtype), returned(steps, outputs, flats)


def all_to_all_single(
    channel: Channel, output: Tensor, source: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
) -> Prepared:
    """As `all_to_all` for rows of dim 0, one behind the other."""
    whole = flat(output)
    pieces = parts(whole, output, output_splits, channel.size)
    steps = algorithms.all_to_all(channel, pieces, parts(flat(source), source, input_splits, channel.size))
    return Call("all_to_all", whole.dtype), returned(steps, [output], [whole])


def several(each: Iterable[Prepared]) -> Prepared:
    """Calls of one kind as one."""
    calls, steps = zip(*each, strict=True)
    return calls[0]._replace(elements=sum(call.elements for call in calls)), chain(*steps)


def _pieces(whole: Tensor, size: int) -> list[Tensor]:
    if whole.numel() % size:
        raise ValueError(f"{whole.numel()} elements cannot be divided evenly over {size} ranks.")
    return list(whole.split(whole.numel() // size)) if whole.numel() else [whole] * size


def _check_number(tensors: Sequence[Tensor], size: int) -> None:
    if len(tensors) != size:
        raise ValueError(f"there must be one tensor for each of the {size} ranks, and there are {len(tensors)}.")


def _alike(tensors: Sequence[Tensor], other: Tensor, size: int) -> list[Tensor]:
    _check_number(tensors, size)
    for tensor in tensors:
        if tensor.numel() != other.numel() or tensor.dtype != other.dtype:
            raise ValueError(
                f"all tensors must have as many elements, of one dtype: {tensor.numel()} of {tensor.dtype} beside "
                f"{other.numel()} of {other.dtype}."
            )
    return [flat(tensor) for tensor in tensors]
