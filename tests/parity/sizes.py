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
from shardwise.plans.parts import LATENT
from shardwise.spec import ShardSpec

RANKS = 8
LARGE = 0.01
"""What is whole for one reason counts when what all ranks hold of it beyond one copy is this share of the model."""

IN_WORDS = {
    "mla_kv_a_proj": LATENT,
    "replicated_with_grad_allreduce": "a norm that sees the local heads",
}
"""Why a tensor is whole to which a rule of the model's own, which has no reason, gives a style."""

TOWER = "computed whole by every rank"
"""What lies outside of a wrapper's text model counts together."""


@dataclass(frozen=True)
class Kept:
    """Tensors of which the ranks hold more than one copy, for one reason: how much more, as a share of the model.

    `names` has the families (one of each layer) that matter, the largest first. `reason` is empty where no rule says anything.
    """

    names: tuple[str, ...]
    excess: float
    reason: str

    def __str__(self) -> str:
        shown = [f"`{name}`" for name in self.names[:4]] + ([f"{len(self.names) - 4} more"] if len(self.names) > 4 else [])
        return f"{', '.join(shown)} (+{self.excess:.1%}): {self.reason or 'no rule names it'}"


@dataclass(frozen=True)
class RealSize:
    """The fullest rank's bytes times the ranks over the model's, and what makes it more than 1; or why it can't be cut."""

    share: float | None = None
    kept: tuple[Kept, ...] = ()
    problem: str = ""

    @property
    def unexplained(self) -> list[str]:
        """What each rank keeps too much of without a reason."""
        return [name for kept in self.kept if not kept.reason for name in kept.names]

    def cells(self) -> tuple[str, str]:
        """As the documentation shows it: the share, and what stays whole."""
        return "-" if self.share is None else f"{self.share:.3f}", self.problem or "; ".join(map(str, self.kept))


@cache
def real_size(name: str, make: Callable[[str], nn.Module | PreTrainedConfig] = default) -> RealSize:
    """Of the type's default config, or of what `make` gives for it."""
    try:
        plan = shardwise.plan(make(name), RANKS)
    except PlanError as error:
        return RealSize(problem=str(error).splitlines()[0])
    fullest = max(range(RANKS), key=plan.local_bytes)
    return RealSize(plan.local_bytes(fullest) * RANKS / plan.full_bytes, kept(plan))


def kept(plan: Plan) -> tuple[Kept, ...]:
    """What the fullest rank of a plan holds too much of."""
    rank = max(range(plan.size), key=plan.local_bytes)
    reasons: dict[str, dict[str, float]] = {}
    for row in plan:
        families = reasons.setdefault(reason := _reason(row, plan.size), {})
        name = ".".join(row.name.split(".")[:2]) if reason.endswith(TOWER) else wildcard(row.name).removesuffix(".weight")
        families[name] = families.get(name, 0.0) + (row.local_bytes(rank, plan.size) * plan.size - row.bytes) / plan.full_bytes
    found = [_kept_for(reason, families) for reason, families in reasons.items()]
    return tuple(sorted((one for one in found if one.excess >= LARGE), key=lambda one: -one.excess))


def _kept_for(reason: str, families: dict[str, float]) -> Kept:
    total = sum(families.values())
    names = [name for name in sorted(families, key=lambda name: -families[name]) if families[name] >= 0.05 * total]
    return Kept(tuple(names), total, reason)


def _reason(row: ShardSpec, size: int) -> str:
    if row.sharded and row.rule is not None and "ranks share" in row.rule.reason:
        return row.rule.reason
    if row.sharded:
        return "KV heads that ranks share" if row.layout.copies(row.shape, size) > 1 else "pieces of unequal size"
    if row.buffer:
        return "a buffer (a mask, or a table of positions)"
    if row.rule is None:
        return ""
    return row.rule.reason or IN_WORDS.get(row.rule.style, f"{row.rule.style}, as the model's own plan has it")
