"""How a type's real-size model lies on eight ranks: what each keeps beyond its eighth, and why. On meta, without memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import nn
from transformers import PreTrainedConfig

import shardwise
from parity.types import default
from shardwise.errors import PlanError
from shardwise.plan import Plan, wildcard
from shardwise.spec import ShardSpec

RANKS = 8
EVEN = 1.15
"""The fullest rank may hold this much times an eighth, or the plan says what stays whole and why."""
LARGE = 0.01
"""A family of tensors (one of each layer) counts when what all ranks hold of it beyond one copy is this share of the model."""
TOWER = "computed whole by every rank"
"""What lies outside of a wrapper's text model counts together."""


@dataclass(frozen=True)
class Kept:
    """A family of tensors of which the ranks hold more than one copy: how much more, as a share of the model, and why.

    `reason` is empty where no rule says anything.
    """

    name: str
    excess: float
    reason: str


@dataclass(frozen=True)
class RealSize:
    """The fullest rank's bytes x 8 over the model's, and the families that make it more than 1; or why it can't be cut."""

    share: float = 0.0
    kept: tuple[Kept, ...] = ()
    problem: str = ""

    @property
    def unexplained(self) -> list[str]:
        """What each rank keeps too much of without a reason."""
        return [kept.name for kept in self.kept if not kept.reason] if self.share > EVEN else []

    def cells(self) -> tuple[str, str]:
        """As the documentation shows it: the share, and what stays whole."""
        if self.problem:
            return "-", self.problem
        names: dict[str, list[Kept]] = {}
        for kept in self.kept:
            names.setdefault(kept.reason or "no rule names it", []).append(kept)
        said = [
            f"{', '.join(f'`{kept.name}`' for kept in same[:4])}{f' and {len(same) - 4} more' if len(same) > 4 else ''}"
            f" (+{sum(kept.excess for kept in same):.1%}): {reason}"
            for reason, same in names.items()
        ]
        return f"{self.share:.3f}", "; ".join(said)


@cache
def real_size(name: str, make: Callable[[str], nn.Module | PreTrainedConfig] = default) -> RealSize:
    """Of the type's default config, or of what `make` gives for it."""
    try:
        plan = shardwise.plan(make(name), RANKS)
    except PlanError as error:
        return RealSize(problem=str(error).splitlines()[0])
    fullest = max(range(RANKS), key=plan.local_bytes)
    return RealSize(plan.local_bytes(fullest) * RANKS / plan.full_bytes, tuple(_kept(plan, fullest)))


def _kept(plan: Plan, rank: int) -> list[Kept]:
    families: dict[tuple[str, str], float] = {}
    for row in plan:
        excess = row.local_bytes(rank, RANKS) * RANKS - row.bytes
        reason = _reason(row)
        part = ".".join(row.name.split(".")[:2]) if reason.endswith(TOWER) else wildcard(row.name)
        key = part.removesuffix(".weight"), reason
        families[key] = families.get(key, 0.0) + excess / plan.full_bytes
    large = [Kept(name, excess, reason) for (name, reason), excess in families.items() if excess >= LARGE]
    return sorted(large, key=lambda kept: -kept.excess)


def _reason(row: ShardSpec) -> str:
    if row.sharded:
        return "KV heads that ranks share" if row.layout.copies(row.shape, RANKS) > 1 else "pieces of unequal size"
    if row.buffer:
        return "a buffer (a mask, or a table of positions)"
    if row.rule is None:
        return ""
    return row.rule.reason or f"{row.rule.style}, as the model's own plan has it"
