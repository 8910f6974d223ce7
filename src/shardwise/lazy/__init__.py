"""Tensors with a shape and a dtype but no data: what code does to them is recorded, and done when a part of the result is read.

    weights = {"w1.0": lazy(source), "w1.1": lazy(source)}          # nothing is read
    experts = torch.stack([weights["w1.0"], weights["w1.1"]])       # a LazyTensor of shape (2, ...)
    read(experts, ((1, 2), (0, 8), (0, 16)))                        # reads rows 0 to 8 of w1.1

So a model can be converted, renamed, tied and initialised at its full shapes, and then loaded shard by shard. What can't wait
is done at once: an operation that writes (`weight[pad].zero_()`) reads its tensor whole and keeps it in memory, for its views
too; one whose result depends on the values (`torch.equal`, `.item()`) reads what it needs and keeps nothing.
"""

from shardwise.lazy.expr import Source
from shardwise.lazy.tensor import LazyTensor, lazy, read, read_into, sources
from shardwise.lazy.views import Box

__all__ = ["Box", "LazyTensor", "Source", "lazy", "read", "read_into", "sources"]
