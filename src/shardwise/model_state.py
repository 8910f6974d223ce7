"""What a parallel model carries: its table and axes, and how they are found in it, whatever wraps it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from shardwise.adapters import ordinary_name
from shardwise.errors import PlanError, ShardwiseError, describe
from shardwise.layers import Stream, is_parallel
from shardwise.lockstep import Lockstep
from shardwise.plan import Plan
from shardwise.spec import ModuleSpec, ShardSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STATE = "_shardwise"


@dataclass(frozen=True)
class ModelState:
    """What a parallel model carries: the table, and the axes that it lies on.

    Args:
        plan: the table.
        mesh: the tp axis, whose ranks compute the same tokens.
        ep: the ranks to which experts are dealt: the tp axis, or several neighbouring ones. A rank's model lies on all of them.
        overlap: the all-reduces of input gradients overlap with weight gradients.
        stream: what the modules of a sequence-parallel model share; None of another.
        adapters: the table of the adapters that PEFT has put into the model, by their names there; None where it has none.
        lockstep: what this rank remembers of its calls.
    """

    plan: Plan
    mesh: DeviceMesh
    ep: DeviceMesh
    overlap: bool = False
    stream: Stream | None = None
    adapters: Plan | None = None
    lockstep: Lockstep = field(default_factory=Lockstep, compare=False)

    def row(self, name: str) -> ShardSpec | None:
        """The row of the tensor that has `name` in the model as it is now, adapters included."""
        own = self.adapters.get(name) if self.adapters is not None else None
        return own or self.plan.get(name) or self.plan.get(ordinary_name(name))

    def axis_of(self, row: ShardSpec | ModuleSpec) -> DeviceMesh:
        """The mesh that `row` lies on."""
        return self.ep if row.axis == "ep" else self.mesh

    def local_shape(self, row: ShardSpec) -> tuple[int, ...]:
        """The shape of this rank's shard of `row`."""
        axis = self.axis_of(row)
        return row.local_shape(axis.get_local_rank(), axis.size())


def state_of(model: nn.Module) -> ModelState | None:
    """The table and the axis of a parallel model, also through the wrappers of DDP and torch.compile; None of an ordinary one.

    Raises `ShardwiseError` for a module that has a parallel model somewhere inside.
    """
    for attribute in ("_orig_mod", "module"):
        if STATE not in model.__dict__ and attribute in model._modules:
            inner = model._modules[attribute]
            return state_of(inner) if inner is not None else None
    state = model.__dict__.get(STATE)
    assert state is None or isinstance(state, ModelState)
    if state is None and (inner := next((name for name, m in model.named_modules() if STATE in m.__dict__), None)):
        raise ShardwiseError(
            describe(
                f"{type(model).__name__} is not parallel itself: the parallel model is its {inner!r}.",
                either=[f"pass model.{inner}, or", "for clipping, shardwise.clip_grad_norm_ takes the whole"],
            )
        )
    if state is None:
        refuse_part(model)
    return state


def refuse_part(model: nn.Module) -> None:
    """Raise `ShardwiseError` for a part of a parallel model, or what is around one: its tensors are a rank's, and it has no
    table that says of what.
    """
    cut = next((name or "itself" for name, module in model.named_modules() if is_parallel(module)), None)
    if cut is not None:
        raise ShardwiseError(
            describe(
                f"{type(model).__name__} has layers of a parallel model ({cut}), and not the model itself.",
                why="its parameters are this rank's parts, and how they are cut is known to the whole model",
                either=[
                    "pass the whole parallel model, or",
                    "make this part parallel itself: shardwise.AutoModel, or shardwise.parallelize, of it alone",
                ],
            )
        )


def parallel_parts(model: nn.Module) -> Iterator[tuple[ModelState, nn.Module]]:
    """The parallel models in `model`: itself, or what it wraps (a reward model's backbone)."""
    for module in model.modules():
        state = module.__dict__.get(STATE)
        if isinstance(state, ModelState):
            yield state, module


def replicated(model: nn.Module, state: ModelState) -> Iterator[tuple[str, Tensor]]:
    """The trainable parameters of which every rank of the tp axis has a copy."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (row := state.row(name)) is not None and not row.sharded:
            yield name, parameter


def plain_name(name: str) -> str:
    """A tensor's name in the model itself, without what DDP ("module.") and torch.compile ("_orig_mod.") put into it."""
    parts = name.split(".")
    return ".".join(part for i, part in enumerate(parts) if part != "_orig_mod" and not (i == 0 and part == "module"))


def check_summed(state: ModelState, model: nn.Module) -> None:
    """Raise `ShardwiseError` where a module of the parallel `model` that summed its gradients over the ranks has been replaced
    by an ordinary one: its gradients are parts, and nothing shows it.
    """
    for row in state.plan.modules:
        if not row.style.gradient_is_partial:
            continue
        try:
            module = model.get_submodule(row.name)
        except AttributeError:  # an adapter is around it
            continue
        if not is_parallel(module):
            raise ShardwiseError(
                describe(
                    f"{row.name} was replaced after the model became parallel: each rank's gradient of it is a part.",
                    rule=str(row.rule),
                    either=["change the ordinary model, and make it parallel then, or", "copy the values into the old module"],
                )
            )


def row_of(state: ModelState, name: str, tensor: Tensor) -> ShardSpec:
    """The row of the tensor that a parallel model has under `name`, whatever DDP or torch.compile wrapped it in.

    Raises `ShardwiseError` for one that was added or replaced after the model became parallel: the table does not know it.
    """
    name = plain_name(name)
    row = state.row(name)
    if row is not None and tuple(tensor.shape) == state.local_shape(row):
        return row
    raise ShardwiseError(
        describe(
            f"{name} was {'added' if row is None else 'replaced'} after the model became parallel.",
            found=f"shape {tuple(tensor.shape)}" + ("" if row is None else f", where {_part_in_words(state, row)}"),
            either=["change the ordinary model, and make it parallel then, or", "shardwise.unparallelize(model) first"],
        )
    )


def _part_in_words(state: ModelState, row: ShardSpec) -> str:
    return f"this rank's part of {row.shape} is {state.local_shape(row)}" if row.sharded else f"the plan says {row.shape}"


def required_state(model: nn.Module) -> ModelState:
    """As `state_of`; raises `ShardwiseError` for an ordinary model."""
    state = state_of(model)
    if state is None:
        raise ShardwiseError(
            f"{type(model).__name__} is not parallel: load it with tp_plan='auto', or call shardwise.parallelize(model, mesh)."
        )
    return state


def refuse_parallel(model: nn.Module) -> None:
    """Raise `PlanError` for a model that is parallel already."""
    if state_of(model) is not None:
        raise PlanError(f"{type(model).__name__} is parallel already: shardwise.unparallelize(model) first.")
