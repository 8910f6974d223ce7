"""What `tp_plan="auto"` does of a model to which nobody has written a plan."""

from __future__ import annotations

import logging
from math import prod

import torch.distributed as dist
from torch import nn

from shardwise.errors import PlanError, describe
from shardwise.infer.choose import Inference
from shardwise.infer.plan import infer
from shardwise.plan import Plan, wildcard

APART = "no part of what reads it can be computed apart"
LEAST = 0.5
"""Of the model's elements: a plan that cuts fewer is no way to fit a model on more devices, and has to be asked for."""


def plan_unknown(model: nn.Module, size: int) -> Plan:
    """The plan for a transformers model that brings none, inferred and proven; the first rank's log says so.

    Raises `PlanError` where none can be inferred, or less than half of the model would be cut.
    """
    try:
        found = infer(model, size)
    except PlanError as error:
        raise PlanError(f"{type(model).__name__} brings no plan, and none can be inferred. {error}") from error
    share = cut_share(found.plan)
    if share < LEAST:
        raise PlanError(
            describe(
                f"{type(model).__name__} brings no plan, and one that is inferred cuts {share:.0%} of it alone.",
                whole=_largest_whole(found),
                either=['tp_plan="infer": take it, with all that is whole on every rank, or', "tp_plan={...}: one of your own"],
            )
        )
    if not dist.is_initialized() or dist.get_rank() == 0:
        logging.getLogger(__name__).warning(
            "%s brings no plan: one was inferred from what it computes, and proven on %d simulated ranks (outputs within %.0e, "
            "gradients within %.0e). It cuts %.0f %% of the model; print(shardwise.plan(...)) shows it.",
            type(model).__name__,
            size,
            found.proof.outputs,
            found.proof.gradients,
            100 * share,
        )
    return found.plan


def _largest_whole(found: Inference) -> list[str]:
    """The matrices that are whole, those of alike layers together, and why."""
    sizes: dict[str, int] = {}
    for row in found.plan:
        if not row.buffer and not row.sharded and len(row.shape) > 1:
            sizes[wildcard(row.name)] = sizes.get(wildcard(row.name), 0) + prod(row.shape)
    largest = sorted(sizes, key=lambda name: -sizes[name])[:8]
    return [f"{name}: {found.left.get(name) or found.left.get(name.rpartition('.')[0], APART)}" for name in largest]


def cut_share(plan: Plan) -> float:
    """The share of the parameters' elements that are cut."""
    rows = [row for row in plan if not row.buffer]
    return sum(prod(row.shape) for row in rows if row.sharded) / max(sum(prod(row.shape) for row in rows), 1)
