"""A model in memory made parallel, and ordinary again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from shardwise.adapters import adapted_model
from shardwise.errors import PlanError, describe
from shardwise.gathering import gather_full
from shardwise.hf import config_text, hidden_states_are_recorded
from shardwise.layers import ColwiseParallel, Stream
from shardwise.mesh import expert_axis, local_device, tp_mesh
from shardwise.model import ShardedModel
from shardwise.model_state import ModelState, refuse_parallel, state_of
from shardwise.parallelize import apply_plan, put_adapters_back, remove_plan, take_adapters_out
from shardwise.plan import Plan
from shardwise.planning import PlanLike, asked_ep_size, proven_plan
from shardwise.random_state import same_random_state
from shardwise.rendezvous import START_TIMEOUT, meet
from shardwise.replicas import check_same, check_same_weights, together
from shardwise.sequence import has_sequence, with_sequence
from shardwise.spec import ShardSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
