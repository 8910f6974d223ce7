"""The collectives, each as a generator of steps: `publish`, then `yield` until everybody has published that step.

Tensors are flat, contiguous and detached. Larger ones than a slot go in chunks, of which one is written while others still read
the one before (`channel`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from torch import Tensor

from shardwise.shm.channel import Channel

Steps: TypeAlias = Iterator[None]
Reduce: TypeAlias = Callable[[Tensor, Sequence[Tensor]], None]

# From here on, three and more ranks each reduce a part and gather the parts, instead of each reducing everything.
_SHARE_BYTES = 1 << 14


def _chunks(count: int, most: int) -> Iterator[tuple[int, int]]:
    """At least one, so that ranks meet over empty tensors too."""
    for start in range(0, max(count, 1), most):
        yield start, min(start + most, count)


def barrier(channel: Channel) -> Steps:
    """Nothing is moved."""
    channel.publish()
    yield


def all_reduce(channel: Channel, tensor: Tensor, reduce: Reduce) -> Steps:
    """In place. Every rank reduces everything."""
    size, item = tensor.numel(), tensor.itemsize
    two = channel.size == 2
    most = channel.slot_bytes // item
    for start, stop in _chunks(size, most):
        part = tensor if size <= most else tensor[start:stop]
        shape = (stop - start,)
        slots = channel.slots(tensor.dtype, shape)
        slots[channel.rank].copy_(part)
        channel.publish()
        yield
        # With two ranks the own one is still in the cache.
        reduce(part, (part, slots[1]) if two and channel.rank == 0 else (slots[0], part) if two else slots)


def shared_all_reduce(channel: Channel, tensor: Tensor, reduce: Reduce) -> Steps:
    """In place. Every rank reduces one part of each chunk, and reads the others'."""
    size, rank, dtype = channel.size, channel.rank, tensor.dtype
    for start, stop in _chunks(tensor.numel(), channel.slot_bytes // tensor.itemsize):
        chunk = tensor[start:stop]
        slots = channel.slots(dtype, (stop - start,))
        slots[rank].copy_(chunk)
        channel.publish()
        yield
        each = -(-(stop - start) // size)
        bounds = [(min(part * each, stop - start), min((part + 1) * each, stop - start)) for part in range(size)]
        low, high = bounds[rank]
        reduced = channel.slots(dtype, (stop - start,))
        reduce(reduced[rank][low:high], [slot[low:high] for slot in slots])
        channel.publish()
        yield
        for slot, (low, high) in zip(reduced, bounds, strict=True):
            chunk[low:high].copy_(slot[low:high])


def pick_all_reduce(channel: Channel, tensor: Tensor) -> Callable[[Channel, Tensor, Reduce], Steps]:
    """The faster of the two for this tensor: the same on every rank."""
    return shared_all_reduce if channel.size > 2 and tensor.numel() * tensor.itemsize > _SHARE_BYTES else all_reduce


def all_gather(channel: Channel, outputs: Sequence[Tensor], source: Tensor) -> Steps:
    """`source` of every rank into `outputs`, by rank; none on a rank that keeps nothing. It may be this rank's output."""
    for start, stop in _chunks(source.numel(), channel.slot_bytes // source.itemsize):
        slots = channel.slots(source.dtype, (stop - start,))
        slots[channel.rank].copy_(source[start:stop])
        channel.publish()
        yield
        for output, slot in zip(outputs, slots if outputs else (), strict=True):
            output[start:stop].copy_(slot)


def reduce_scatter(channel: Channel, output: Tensor, inputs: Sequence[Tensor], reduce: Reduce) -> Steps:
    """The reduction of the ranks' `inputs` for this rank into `output`, which may be this rank's input."""
    size, rank = channel.size, channel.rank
    for start, stop in _chunks(output.numel(), channel.slot_bytes // output.itemsize // size):
        slots = channel.slots(output.dtype, (size, stop - start))
        for part, source in zip(slots[rank], inputs, strict=True):
            part.copy_(source[start:stop])
        channel.publish()
        yield
        reduce(output[start:stop], [slot[rank] for slot in slots])


def broadcast(channel: Channel, tensor: Tensor, root: int) -> Steps:
    """In place, from `root`."""
    for start, stop in _chunks(tensor.numel(), channel.slot_bytes // tensor.itemsize):
        slot = channel.slots(tensor.dtype, (stop - start,))[root]
        if channel.rank == root:
            slot.copy_(tensor[start:stop])
        channel.publish()
        yield
        if channel.rank != root:
            tensor[start:stop].copy_(slot)


def reduce_to(channel: Channel, tensor: Tensor, root: int, reduce: Reduce) -> Steps:
    """In place, on `root`; the others keep what they had."""
    for start, stop in _chunks(tensor.numel(), channel.slot_bytes // tensor.itemsize):
        slots = channel.slots(tensor.dtype, (stop - start,))
        slots[channel.rank].copy_(tensor[start:stop])
        channel.publish()
        yield
        if channel.rank == root:
            reduce(tensor[start:stop], slots)


def scatter(channel: Channel, output: Tensor, inputs: Sequence[Tensor], root: int) -> Steps:
    """`inputs` of `root`, by rank, into `output`."""
    for start, stop in _chunks(output.numel(), channel.slot_bytes // output.itemsize // channel.size):
        slot = channel.slots(output.dtype, (channel.size, stop - start))[root]
        if channel.rank == root:
            for part, source in zip(slot, inputs, strict=True):
                part.copy_(source[start:stop])
        channel.publish()
        yield
        output[start:stop].copy_(slot[channel.rank])


def all_to_all(channel: Channel, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Steps:
    """`inputs[r]` of every rank to rank r, into `outputs` by sender. Sizes may differ from pair to pair."""
    size, rank = channel.size, channel.rank
    most = channel.slot_bytes // inputs[0].itemsize // size
    channel.say_splits([source.numel() for source in inputs], [output.numel() for output in outputs])
    sent = 0
    longest = 1
    while sent < longest:
        slots = channel.slots(inputs[0].dtype, (size, most))
        for part, source in zip(slots[rank], inputs, strict=True):
            piece = source[sent : sent + most]
            part[: piece.numel()].copy_(piece)
        channel.publish()
        yield
        if sent == 0:
            longest = channel.agree_on_splits()
        for slot, output in zip(slots, outputs, strict=True):
            piece = output[sent : sent + most]
            piece.copy_(slot[rank][: piece.numel()])
        sent += most
