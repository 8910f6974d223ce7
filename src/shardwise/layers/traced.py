"""What the linear styles do under torch.compile: the same as in eager code, reading next to nothing on the way.

At every call Dynamo checks what the code that it traced has read. Torch's modules and plain dicts of plain values it checks by
the version of a dict; objects of ours, a mesh among them, attribute by attribute, and what several modules share once for each
pair: 155 checks a decoder layer more than the model's own 178, which took longer than its collectives. So traced code reads
a dict of facts instead of a `ShardState`, and one object for the whole model instead of a `Region` for each part of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import linear

from shardwise.collectives import copy_to_tp, reduce_from_tp

if TYPE_CHECKING:
    from shardwise.layers.linear import LinearStyle


class Facts(TypedDict):
    """What the forward of a linear layer goes by: plain values, see above.

    Of these, `group` is the name of the process group; `plain`: the layer's own forward is torch's; `direct`: besides, nothing
    happens when its weight is read and nothing else is mixed in, so that eager code may multiply by what torch keeps in
    `_parameters` (nothing, where the layer is parametrized), which is faster than to ask the layer; `shares`: it has siblings
    that may read the same input, in front of a row-wise layer.
    """

    group: str
    plain: bool
    direct: bool
    shares: bool


def colwise(layer: LinearStyle, x: Tensor) -> Tensor:
    """As `ColwiseParallel.forward` of a layer whose own forward is torch's.  X (..., in) I -> Y (..., out/tp) S(-1)."""
    facts = layer._facts
    entered = _LAST_COPY.enter(x, facts["group"]) if facts["shares"] else copy_to_tp(x, facts["group"])
    return linear(entered, layer.weight, layer._parameters["bias"])


def rowwise(layer: LinearStyle, x: Tensor) -> Tensor:
    """As `RowwiseParallel.forward` of a layer whose own forward is torch's.  X (..., in/tp) S(-1) -> Y (..., out) I."""
    _LAST_COPY.leave()
    bias = layer._parameters["bias"]
    output = reduce_from_tp(linear(x, layer.weight), layer._facts["group"])
    return output if bias is None else output + bias


def say_gathered(gathered: bool) -> None:
    """Say whether what the column-wise layers of a region are given from here on was gathered, so that its gradient is summed
    where it was.
    """
    _LAST_COPY.gathered = gathered


class _LastCopy:
    """One `copy_to_tp` for all siblings that read the same tensor, as `Region` has it in eager code."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None
        self.gathered = False

    def enter(self, x: Tensor, group: str) -> Tensor:
        """`copy_to_tp(x, group)`, made once for one `x` in a row. Shapes: any, unchanged."""
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x
        if self.gathered:  # by the module, whose gather sums the gradient
            return x
        last = self._last
        if last is not None and last[0] is x:
            return last[1]
        copy = copy_to_tp(x, group)
        self._last = (x, copy)
        return copy

    def leave(self) -> None:
        """Let go of the activation."""
        self._last = None


# Empty whenever no compiler traces: one object, because a check of one costs less than of one for each decoder layer.
_LAST_COPY = _LastCopy()
