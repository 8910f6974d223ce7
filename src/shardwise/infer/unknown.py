"""What `tp_plan="auto"` does of a model to which nobody has written a plan, or one for a part of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import prod

import torch.distributed as dist
from torch import nn

from shardwise.errors import PlanError, describe
from shardwise.infer.choose import Inference
from shardwise.infer.plan import infer
from shardwise.infer.prove import try_out
from shardwise.plan import Plan, wildcard
from shardwise.spec import Rule

APART = "no part of what reads it can be computed apart"
LEAST = 0.5
"""Of the model's elements: a plan that cuts fewer is no way to fit a model on more devices, and has to be asked for."""
_SHOWN = 4


def plan_unknown(model: nn.Module, size: int) -> Plan:
    """The plan for a transformers model that brings none, inferred and proven; the first rank's log says so.

    Raises `PlanError` where none can be inferred, or less than half of the model would be cut.
    """
    try:
        found = _infer(model, size)
    except PlanError as error:
        raise PlanError(f"{type(model).__name__} brings no plan, and none can be inferred. {error}") from error
    return _said(model, found, "brings no plan: one was inferred from what it computes")


def plan_rest(model: nn.Module, size: int, rules: Sequence[Rule]) -> Plan:
    """The plan for a transformers model whose `rules` name a part of it: as they say, and the rest inferred, all proven
    together; or all inferred, where the rules alone are wrong. The first rank's log says what was.

    Raises `PlanError` where that can't be done, or less than half of the model would be cut.
    """
    try:
        found, right = _infer_rest(model, size, rules)
    except PlanError as error:
        raise PlanError(
            f"{type(model).__name__} brings a plan for a part of it, and none for the rest can be inferred. {error}"
        ) from error
    if right:
        return _said(model, found, f"brings a plan for a part of it: that for {_inferred(found.plan)} was inferred")
    return _said(model, found, "brings a plan for a part of it, which is wrong: another one was inferred from what it computes")


def plan_brought(model: nn.Module, plan: Plan) -> Plan:
    """`plan`, which a model brings that is none of transformers'; or one that is inferred, where that is wrong. The first
    rank's log says so.

    Raises `PlanError` where none can be inferred, or less than half of the model would be cut.
    """
    proof = try_out(plan, model)
    if proof is None or proof.problem is None:
        return plan
    how = f"brings a plan that is wrong ({proof.problem}): another one was inferred from what it computes"
    try:
        found = _infer(model, plan.size)
    except PlanError as error:
        problem = f"The plan that {type(model).__name__} brings is wrong, and none can be inferred"
        raise PlanError(f"{problem}: {proof.problem}. {error}") from error
    return _said(model, found, how)


def _infer_rest(model: nn.Module, size: int, rules: Sequence[Rule]) -> tuple[Inference, bool]:
    """Beside `rules`; or without them (False)."""
    try:
        return _infer(model, size, rules), True
    except PlanError:
        return _infer(model, size), False


def _infer(model: nn.Module, size: int, rules: Sequence[Rule] = ()) -> Inference:
    try:
        return infer(model, size, given=rules)
    except PlanError:
        raise
    except Exception as error:  # of the model's own code, on inputs that are ours
        first = (str(error).splitlines() or [""])[0]
        raise PlanError(f"It does not run on inputs made up for it: {type(error).__name__}: {first}") from error


def _said(model: nn.Module, found: Inference, how: str) -> Plan:
    """The plan of `found`; `how` it was, is logged. Raises `PlanError` for one that cuts too little."""
    share = cut_share(found.plan)
    if share < LEAST:
        raise PlanError(
            describe(
                f"{type(model).__name__} {how}, which cuts {share:.0%} of it alone.",
                whole=_largest_whole(found),
                either=['tp_plan="infer": take it, with all that is whole on every rank, or', "tp_plan={...}: one of your own"],
            )
        )
    if not dist.is_initialized() or dist.get_rank() == 0:
        logging.getLogger(__name__).warning(
            "%s %s, and proven on %d simulated ranks (outputs within %.0e, gradients within %.0e). "
            "The plan cuts %.0f %% of the model; print(shardwise.plan(...)) shows it.",
            type(model).__name__,
            how,
            found.plan.size,
            found.proof.outputs,
            found.proof.gradients,
            100 * share,
        )
    return found.plan


def _inferred(plan: Plan) -> str:
    """What is cut by rules that were inferred, those of alike layers together."""
    names = {wildcard(row.name): row for row in plan if row.rule is not None and row.rule.source == "inferred" and row.sharded}
    shown = ", ".join(list(names)[:_SHOWN]) or "nothing"
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


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
