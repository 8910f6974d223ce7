"""The library's verbs on a model in memory: plan, parallelize, unparallelize."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shardwise.adapters import adapted_model
from shardwise.coverage import LARGE, check_coverage, unnamed_share
from shardwise.errors import PlanError, describe
from shardwise.generation import same_random_state
from shardwise.hf import (
    base_prefixes,
    build_on_meta,
    check_head,
    config_text,
    frozen_model_rules,
    has_expert_plan,
    hidden_states_are_recorded,
    model_rules,
    origin_of,
)
from shardwise.infer import LEAST, cut_share, infer_plan, plan_rest, plan_unknown, prove_rules
from shardwise.layers import ColwiseParallel, Stream
from shardwise.layers.registry import style_named
from shardwise.mesh import expert_axis, local_device, tp_mesh
from shardwise.model import ShardedModel
from shardwise.model_state import ModelState, refuse_parallel, state_of
from shardwise.parallelize import apply_plan, put_adapters_back, remove_plan, take_adapters_out
from shardwise.plan import Plan
from shardwise.plan_file import Written, is_plan_file, read
from shardwise.rendezvous import START_TIMEOUT, meet
from shardwise.replicas import check_same, check_same_weights, together
from shardwise.resolve import resolve
from shardwise.sequence import has_sequence, with_sequence
from shardwise.spec import Rule, ShardSpec
from shardwise.state import gather_full

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PlanLike = str | os.PathLike[str] | Mapping[str, str] | Plan


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
    rules = _user_rules(model, plan)
    _check_experts(model, tp_size, ep_size, rules)
    brought = model_rules(model, tp_size, expert_parallel=ep_size is not None)
    infers = plan == "auto" and tp_size > 1 and ep_size is None and isinstance(model, PreTrainedModel)
    if infers:
        if (kept := _frozen(model, tp_size)) is not None:
            return kept
        if not brought:
            return plan_unknown(model, tp_size)
    rules = [*brought, *rules]
    if tp_size == 1:
        rules = [rule for rule in rules if rule.source == "user" or style_named(rule.style, str(rule)).axis == "ep"]
    table = resolve(model, rules, tp_size, ep_size)
    if infers and (whole := _completed(model, table, rules)) is not None:
        return whole
    check_coverage(model, table)
    check_head(model, table)
    return replace(table, origin=origin_of(model))


def proven_plan(model: nn.Module, tp_size: int, plan: PlanLike, ep_size: int | None) -> Plan:
    """As `make_plan`; the rules that the user wrote are shown to go together, where that can be shown. A `Plan` is taken as
    it is.
    """
    table = make_plan(model, tp_size, plan, ep_size=ep_size)
    if not isinstance(plan, Plan):
        prove_rules(table, model, edited=is_plan_file(plan))
    return table


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    plan: PlanLike = "auto",
    *,
    ep_size: int | None = None,
    overlap: bool = False,
    sequence_parallel: bool = False,
) -> nn.Module:
    """Turn a model that every rank has in memory into each rank's part of it, in place, and return it.

    Args:
        model: the same on every rank, weights included (checked: a `MismatchError` names the first parameter that differs).
            Adapters that PEFT has put into it become parallel too; where they differ, the first rank's are taken.
        mesh: the tp axis (a one-dimensional mesh, or one with an axis named "tp"); by default all processes that torchrun
            started.
        plan: as in `shardwise.plan`.
        ep_size: as in `shardwise.plan`.
        overlap: in training, the all-reduce of an input's gradient runs while the weights' gradients of the linears that read
            the input are computed. The same collectives and gradients; worth it where an all-reduce takes longer than some
            ten microseconds of host time a linear. Compiled code is as without.
        sequence_parallel: in training, each rank keeps its slice of the sequence between attention and MLP: the residual
            stream takes 1/tp of the memory, for as many bytes sent. Not together with `overlap`.

    What is on meta stays there, at its local shape: `model.to_empty(device=...)` then gives memory of that shape, for buffers
    too, whose values are the caller's to fill in. Everything else goes to the rank's device.

    The ranks go on with the first rank's random state, so that they drop out the same elements of what they have in common.
    Raises `PlanError` before anything is changed. Collective: every rank of the mesh must call it.
    """
    _check_model(model)
    ep_size = asked_ep_size(plan, ep_size)
    axis = tp_mesh(device_mesh=mesh, ep_size=ep_size)
    if axis is None or max(axis.size(), ep_size or 1) == 1:
        return model
    refuse_parallel(model)
    inner = adapted_model(model)
    ep = expert_axis(axis, ep_size)
    meet(ep, "parallelize", START_TIMEOUT)
    adapters = take_adapters_out(inner)
    try:

        def planned() -> ModelState:
            table = proven_plan(inner, axis.size(), plan, ep_size)
            return model_state(inner, table, axis, ep, overlap, sequence_parallel)

        state = together(ep, "parallelize", planned)
        check_same_weights(inner, ep)
        check_same(ep, "parallelize", same_everywhere(inner, state))
        device = local_device(axis)

        def shard(row: ShardSpec, tensor: Tensor) -> Tensor:
            on = state.axis_of(row)
            local = row.layout.shard(tensor, on.get_local_rank(), on.size()) if row.sharded else tensor
            return local if local.is_meta else local.to(device)

        apply_plan(inner, state, shard, ShardedModel.for_model(inner))
    finally:
        put_adapters_back(adapters)
    if adapters:
        inner.peft_config = inner.peft_config  # what PEFT does when it has added adapters
    same_random_state(axis)
    return model


def unparallelize(model: nn.Module) -> nn.Module:
    """Gather the shards and give the ordinary model back, in place: classes, names, attributes and values. Collective.

    An ordinary model is returned as it is.
    """
    state = state_of(model)
    if state is None:
        return model
    meet(state.ep, "unparallelize")
    remove_plan(model, lambda row, tensor: gather_full(row, tensor, state.axis_of(row)))
    return model


def _check_model(model: object) -> None:
    """Raise `PlanError` for what is no model."""
    if not isinstance(model, nn.Module):
        raise PlanError(
            describe(
                f"parallelize: a model is needed, not {type(model).__name__}.",
                either=[
                    'shardwise.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto") for a checkpoint, or',
                    'shardwise.AutoModelForCausalLM.from_config(config, tp_plan="auto") for a config',
                ],
            )
        )


def same_everywhere(model: nn.Module, state: ModelState) -> dict[str, object]:
    """What of a parallel model, or one that becomes so with `state`, must be the same on every rank, for `check_same`."""
    rows = map(repr, (*state.plan.tensors, *state.plan.modules))
    return {
        "the class of the model": type(model).__name__,
        "the plan, its shapes or dtypes": "\n".join(sorted(rows)),
        "the config of the model": config_text(model),
        "the argument overlap": state.overlap,
        "the argument sequence_parallel": state.stream is not None,
    }


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


def model_state(
    model: nn.Module, table: Plan, mesh: DeviceMesh, ep: DeviceMesh, overlap: object, sequence_parallel: object
) -> ModelState:
    """What a parallel `model` carries, of what was asked for.

    Raises `PlanError` for keywords that are neither True nor False, that `table` has nothing for, or that exclude each other.
    """
    _check_overlap(table, overlap)
    if not isinstance(sequence_parallel, bool):
        raise PlanError(f"sequence_parallel={sequence_parallel!r}: True or False.")
    sequence_parallel = sequence_parallel or has_sequence(table)
    if sequence_parallel and overlap:
        raise PlanError(
            describe(
                "overlap=True: with sequence_parallel=True there is no all-reduce of an input's gradient that could overlap.",
                either=["overlap=True, or", "sequence_parallel=True"],
            )
        )
    if not sequence_parallel:
        return ModelState(table, mesh, ep, bool(overlap))
    return ModelState(with_sequence(model, table), mesh, ep, stream=Stream(recorded=hidden_states_are_recorded))


def _check_overlap(table: Plan, overlap: object) -> None:
    """Raise `PlanError` for an `overlap` that is neither True nor False, or that `table` has nothing for."""
    if not isinstance(overlap, bool):
        raise PlanError(f"overlap={overlap!r}: True or False.")
    if overlap and not any(issubclass(row.style, ColwiseParallel) for row in table.modules):
        raise PlanError(
            describe(
                "overlap=True would do nothing: the plan has no column-wise linear layer, whose input's gradient is summed.",
                either=["leave it out, or", 'give linear layers the style "colwise"'],
            )
        )


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
