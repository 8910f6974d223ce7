"""What a step takes on one rank: bytes by kind, and every collective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from shardwise.debug.record import Collective
from shardwise.estimate import show
from shardwise.estimate.flow import Node
from shardwise.estimate.kinds import LayerKind, kinds, ring_bytes
from shardwise.estimate.step import Step
from shardwise.plan import Plan
from shardwise.report import as_text


@dataclass(frozen=True)
class Estimate:
    """What a step takes on the rank that holds the most. All in bytes; `print` shows it, `to_html` gives a page.

    Attributes:
        model: the class of the model.
        plan: the table.
        step: what was simulated.
        parameters: of this rank's shards, buffers included.
        gradients: of its parameters, in their dtype; all of them, after backward.
        optimizer: of the optimizer's states.
        cache: of the KV cache after a prefill; 0 in training.
        activations: the most that anything else takes at one time of the step: what forward keeps for backward, and what is
            in work.
        peak: the most that all of the above take at one time, of a step that is not the first.
        peak_in: "forward", "backward" or "optimizer".
        attention: the names of the attention kernels that ran: fused ones, or the softmax over scores that are kept.
        collectives: in order, forward and backward.
        flows: of a layer of each kind, what happens in its forward: see `shardwise.estimate.flow.Node`.
    """

    model: str
    plan: Plan
    step: Step
    parameters: int
    gradients: int
    optimizer: int
    cache: int
    activations: int
    peak: int
    peak_in: str
    attention: tuple[str, ...]
    collectives: tuple[Collective, ...]
    flows: Mapping[str, tuple[Node, ...]] = field(repr=False, default_factory=dict)

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers, and what one of each communicates; at the end what is outside of layers."""
        return kinds(self.plan, self.collectives, self.flows)

    @property
    def put_in(self) -> int:
        """Bytes that a rank puts into all collectives of the step."""
        return sum(record.bytes for record in self.collectives)

    @property
    def sent(self) -> int:
        """Bytes that leave a rank in the step if rings carry the collectives out."""
        return sum(map(ring_bytes, self.collectives))

    def __str__(self) -> str:
        return as_text(*show.text(self))

    def to_html(self) -> str:
        """A page that stands alone."""
        return show.page(self).to_html()
