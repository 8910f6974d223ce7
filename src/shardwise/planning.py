"""From what was asked for to a plan: a model's own rules, those of its user, frozen and inferred ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shardwise.coverage import LARGE, check_coverage, unnamed_share
from shardwise.errors import PlanError, describe
from shardwise.hf import (
    base_prefixes,
    build_on_meta,
    check_head,
    frozen_model_rules,
    has_expert_plan,
    is_of_transformers,
    model_rules,
    origin_of,
)
from shardwise.infer import LEAST, cut_share, infer_plan, plan_brought, plan_rest, plan_unknown, prove_rules
from shardwise.layers.registry import style_named
from shardwise.plan import Plan
from shardwise.plan_file import Written, is_plan_file, read
from shardwise.resolve import resolve
from shardwise.spec import Rule

PlanLike = str | os.PathLike[str] | Mapping[str, str] | Plan
"""What a `tp_plan` may be, see `make_plan`."""


def make_plan(
    model_or_config: nn.Module | PreTrainedConfig, tp_size: int, plan: PlanLike = "auto", *, ep_size: int | None = None
) -> Plan:
    """What each of `tp_size` ranks would hold and do. Nothing is read, allocated or changed.

    Args:
        model_or_config: a model (its tensors may be on meta), or a transformers config, of which the model is built on meta:
            the causal LM, or the model around one that reads images or sounds.
        tp_size: ranks on the tp axis.
        plan: `"auto"` for the model's own plan with our corrections; where there is none, or a lesser one, for the one that is
            frozen for its type, or else `"infer"`; what the model's own leaves out is inferred beside it. `"infer"` for one
            that is found from what the model computes, and proven (see `shardwise.infer_plan`); a dict of pattern: style,
            merged over the model's own; a `Plan`; or the path of a file that `Plan.save` wrote, ending in ".json" (or of such
            a dict).
        ep_size: ranks over which experts are dealt: `tp_size`, or a multiple of it; None to split every expert instead.

    Raises `PlanError` where it can't be done, naming the module, the numbers and the rule.
    """
    if tp_size < 1:
        raise PlanError(f"tp_size={tp_size}: the number of ranks on the tp axis is at least 1.")
    ep_size = asked_ep_size(plan, ep_size)
    model = build_on_meta(model_or_config) if isinstance(model_or_config, PreTrainedConfig) else model_or_config
    if is_plan_file(plan):
        found = read(plan)  # type: ignore[arg-type]
        plan = found.resolved(model) if isinstance(found, Written) else found
    if isinstance(plan, Plan):
        return _in_dtypes_of(model, _given(plan, tp_size, ep_size))
    if isinstance(plan, str) and plan == "infer":
        if ep_size is not None:
            raise PlanError('tp_plan="infer" splits every expert: leave ep_size out.')
        return infer_plan(model, tp_size)
    if plan == "auto" and tp_size > 1 and ep_size is None and isinstance(model, PreTrainedModel):
        kept = _frozen(model, tp_size)
        return _auto(model, tp_size) if kept is None else _checked(model, kept)
    return _merged(model, tp_size, ep_size, _user_rules(model, plan))


def _merged(model: nn.Module, size: int, ep_size: int | None, own: list[Rule]) -> Plan:
    """By the rules that the model brings, with our corrections, and over these the user's `own`."""
    _check_experts(model, size, ep_size, own)
    rules = [*model_rules(model, size, expert_parallel=ep_size is not None), *own]
    if size == 1:
        rules = [rule for rule in rules if rule.source == "user" or style_named(rule.style, str(rule)).axis == "ep"]
    return _finished(model, resolve(model, rules, size, ep_size))


def _auto(model: nn.Module, size: int) -> Plan:
    """By the rules that the model brings, with our corrections, and the rest inferred; all of it, where it brings none."""
    brought = model_rules(model, size)
    if not brought:
        return plan_unknown(model, size)
    table = resolve(model, brought, size)
    return _completed(model, table, brought) or _checked(model, _finished(model, table))


def _finished(model: nn.Module, table: Plan) -> Plan:
    """`table`, which knows what it was made of. Raises `PlanError` for one that leaves much unsaid, or parts of the logits."""
    check_coverage(model, table)
    check_head(model, table)
    return replace(table, origin=origin_of(model))


def _checked(model: nn.Module, table: Plan) -> Plan:
    """`table` of a model of transformers'; of any other one that is shown to be right."""
    return table if is_of_transformers(model) else plan_brought(model, table)


def proven_plan(model: nn.Module, tp_size: int, plan: PlanLike, ep_size: int | None) -> Plan:
    """As `make_plan`; the rules that the user wrote are shown to go together, where that can be shown. A `Plan` is taken as
    it is.
    """
    table = make_plan(model, tp_size, plan, ep_size=ep_size)
    if not isinstance(plan, Plan):
        prove_rules(table, model, edited=is_plan_file(plan))
    return table


def asked_ep_size(plan: PlanLike | None, ep_size: object) -> int | None:
    """To how many ranks experts are to be dealt, by `ep_size` or by a `Plan` of more ranks than tp's; None for 1, which deals
    nothing. Raises `PlanError` for what is no number of ranks.
    """
    given = read(plan) if is_plan_file(plan) else plan  # type: ignore[arg-type]
    if ep_size is None and isinstance(given, Plan | Written) and given.ep_size > given.size:
        return given.ep_size
    if ep_size is not None and (not isinstance(ep_size, int) or isinstance(ep_size, bool) or ep_size < 1):
        raise PlanError(f"ep_size={ep_size!r}: the number of ranks to which experts are dealt is an integer of at least 1.")
    return None if ep_size == 1 else ep_size


def _given(plan: Plan, tp_size: int, ep_size: int | None) -> Plan:
    if plan.size != tp_size:
        raise PlanError(f"The plan is for tp={plan.size}, and the mesh has {tp_size} ranks: make the plan for this size.")
    if ep_size not in (None, plan.ep_size):
        raise PlanError(f"The plan deals experts to {plan.ep_size} ranks, and ep_size={ep_size} was asked for: leave it out.")
    return plan


def _in_dtypes_of(model: nn.Module, plan: Plan) -> Plan:
    """`plan`, which may have been made of a model in other dtypes."""
    dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    if all(dtypes.get(row.name, row.dtype) == row.dtype for row in plan.tensors):
        return plan
    return replace(plan, tensors=tuple(replace(row, dtype=dtypes.get(row.name, row.dtype)) for row in plan.tensors))


def _user_rules(model: nn.Module, plan: str | os.PathLike[str] | Mapping[str, str]) -> list[Rule]:
    if plan == "auto":
        return []
    if not isinstance(plan, Mapping):
        raise PlanError(
            describe(
                f"tp_plan={plan!r} is not a plan.",
                either=[
                    '"auto" or "infer", or',
                    'a file: "plan.json", or',
                    'a dict such as {"layers.*.self_attn.q_proj": "colwise"}',
                ],
            )
        )
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    prefixes = ["", *base_prefixes(model)]
    rules = []
    for pattern, style in plan.items():
        meant = [Rule(prefix + _pattern(pattern), style, "user") for prefix in prefixes]
        rules.append(next((rule for rule in meant if any(map(rule.matches, names))), meant[0]))
    return rules


def _pattern(given: object) -> str:
    if not isinstance(given, str):
        raise PlanError(f'tp_plan: {given!r} is no pattern, which is a text such as "layers.*.mlp.up_proj".')
    return given


def _check_experts(model: nn.Module, tp_size: int, ep_size: int | None, rules: list[Rule]) -> None:
    if ep_size is None:
        return
    if ep_size % tp_size:
        raise PlanError(
            describe(
                f"ep_size={ep_size} is not possible with tp_size={tp_size}.",
                either=[
                    f"ep_size={tp_size}: the experts are dealt to the tp axis, or",
                    f"ep_size={2 * tp_size}, ...: to several neighbouring replicas, or",
                    "leave it out: every expert is split",
                ],
            )
        )
    if not has_expert_plan(model) and not any(style_named(rule.style, str(rule)).axis == "ep" for rule in rules):
        raise PlanError(
            describe(
                f"{type(model).__name__} brings no rules for expert parallelism, so ep_size={ep_size} would do nothing.",
                either=[
                    "leave ep_size out: every expert is split, or",
                    'give the experts "grouped_gemm" and "ep_dispatch_experts"',
                ],
            )
        )


def _frozen(model: nn.Module, size: int) -> Plan | None:
    """By the frozen plans of the model's types; None where there are none, or they don't fit its options or its sizes, or cut
    too little.
    """
    rules = frozen_model_rules(model, size)
    if not rules:
        return None
    try:
        table = resolve(model, rules, size)
        check_head(model, table)
    except PlanError:
        return None
    return table if cut_share(table) >= LEAST else None


def _completed(model: nn.Module, table: Plan, rules: Sequence[Rule]) -> Plan | None:
    """With the rest inferred, where the model's own `rules` leave out much of what `table` has. None where they don't, or where
    no family of matrices is large and none can be inferred.
    """
    if unnamed_share(table) <= LARGE and cut_share(table) > 0:
        return None
    try:
        return plan_rest(model, table.size, rules)
    except PlanError as error:
        try:
            check_coverage(model, table)
        except PlanError as problem:
            raise PlanError(f"{problem}\n{error}") from error
    return None
