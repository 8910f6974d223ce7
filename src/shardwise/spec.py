"""The rows that everything reads: what a rule asks for, where each tensor lies, what happens at each module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch

from shardwise.layers import Axis, Cut, ParallelStyle
from shardwise.layout import Layout, Shape

Source = Literal["model", "user", "shardwise", "inferred", "frozen"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a plan: which modules or parameters, and which style.

    Args:
        pattern: a dotted path, each `*` standing for exactly one segment ("layers.*.mlp.fc1": the 1 is part of a name).
        style: the style's name.
        source: who wrote it: the model's own plan, the user, a correction of ours, or nobody: it was inferred, now or
            when the plan of the type was frozen.
        cut: how to cut, where the style can't tell from the module (fused blocks).
        attributes: integers of the module (or, as "config.name", of its config) that become local, one value a rank.
        parent_attributes: the same of the module's parent, whose code reads this module's output by them.
        reason: why the rule is there; not in its `repr`, by which ranks compare their plans: what a trial that failed said may
            be what another of its ranks said.
    """

    pattern: str
    style: str
    source: Source
    cut: Cut | None = None
    attributes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parent_attributes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    reason: str = field(default="", repr=False)

    def matches(self, name: str) -> bool:
        """Whether the dotted `name` fits the pattern."""
        wanted, found = self.pattern.split("."), name.split(".")
        return len(wanted) == len(found) and all(w in ("*", f) for w, f in zip(wanted, found, strict=True))

    def __str__(self) -> str:
        return f"{self.pattern}: {self.style}   ({_WHOSE[self.source]})"


_WHOSE: dict[Source, str] = {
    "model": "from the model's own plan",
    "user": "yours",
    "shardwise": "a correction of shardwise",
    "inferred": "inferred from what the model computes",
    "frozen": "inferred and proven for this type",
}


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """One parameter or buffer: its full shape and how it lies on the ranks.

    Args:
        name: its dotted name; of tied ones, the first.
        shape: the full shape.
        dtype: its dtype.
        layout: how it is cut.
        partial: each rank's gradient of what it holds in common with others is a part, to be summed over the ranks.
        buffer: it is a buffer, not a parameter.
        rule: the rule that led to it; None where nothing was said.
        aliases: the other names of a tied parameter.
        axis: the ranks that it lies on.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    layout: Layout
    partial: bool = False
    buffer: bool = False
    rule: Rule | None = None
    aliases: tuple[str, ...] = ()
    axis: Axis = "tp"

    def local_shape(self, rank: int, size: int) -> Shape:
        """The shape of `rank`'s shard."""
        return self.layout.local_shape(self.shape, rank, size)

    def local_bytes(self, rank: int, size: int) -> int:
        """Bytes of `rank`'s shard."""
        return prod(self.local_shape(rank, size)) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the full tensor."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def sharded(self) -> bool:
        """Whether any dim is cut."""
        return self.layout.cut(self.shape) is not None


def sums_gradient(row: ShardSpec, size: int, ep_size: int) -> bool:
    """Whether the gradient of `row`'s parameter is more than one rank's backward gives: of a parameter that some ranks hold in
    common, each with a part of the gradient, and of experts that compute tokens of several batches.
    """
    if row.axis == "ep":
        return row.partial or (row.sharded and ep_size > size)
    return row.partial or (row.sharded and row.layout.copies(row.shape, size) > 1)


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One module that becomes parallel.

    Args:
        name: its dotted name.
        style: the class that is mixed in.
        rule: the rule that led to it; None where only a parameter of it has one.
        attributes: attributes that become local, one value a rank of its axis.
        options: what the style needs to know besides.
        transposed: its weight is kept as (in, out).
        region: the module opens or closes a parallel region with siblings (the children of one parent).
        local_dropout: between them the parent drops out elements of local activations.
        axis: the ranks that its parameters lie on.
        around: what a sequence-parallel model has in front of the style.
        stream_parameters: of a decoder layer of such a model, the parameters inside of it that see a slice of the positions.
        whole: the attributes as they are in one process.
    """

    name: str
    style: type[ParallelStyle]
    rule: Rule | None = None
    attributes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)
    transposed: bool = False
    region: bool = False
    local_dropout: bool = False
    axis: Axis = "tp"
    around: type[ParallelStyle] | None = None
    stream_parameters: tuple[str, ...] = ()
    whole: Mapping[str, int | None] = field(default_factory=dict)
