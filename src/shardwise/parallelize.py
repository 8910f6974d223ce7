"""The only file that changes a model: it assigns shards, classes and local attributes, and takes them back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.adapters import adapter_plan, copied_layers, has_adapters, ordinary_name, unwrapped, whole_as_planned, wrappers
from shardwise.errors import PlanError, ShardwiseError, describe
from shardwise.layers import (
    ColwiseGatherOutput,
    ColwiseParallel,
    Facts,
    LinearStyle,
    LocalConfig,
    OverlappedLinear,
    OverlappedRegion,
    ParallelStyle,
    PartOfModel,
    ReadWhole,
    Region,
    SequenceRowwise,
    ShardState,
    WholeWeight,
    is_parallel,
    is_plain,
    is_product,
    original_class,
    parallel_class,
    stores_transposed,
)
from shardwise.model_state import STATE, ModelState, refuse_parallel, required_state
from shardwise.plan import Plan
from shardwise.replicas import checksum, first_difference
from shardwise.spec import ModuleSpec, ShardSpec, sums_gradient

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ReadShard = Callable[[ShardSpec, Tensor], Tensor]
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


def apply_plan(model: nn.Module, state: ModelState, read: ReadShard, root: type[ParallelStyle] | None = None) -> None:
    """Turn `model` into this rank's part of it, in place.

    Args:
        model: an ordinary model, of which the plan was made.
        state: the table, and the axes of its sizes.
        read: gives this rank's shard of a tensor; called once for each row.
        root: what to mix in front of the model's own class.
    """
    refuse_parallel(model)
    plan, mesh = state.plan, state.mesh
    _check_fits(model, plan)
    _replace_tensors(model, plan, read)
    regions: dict[str, Region] = {}
    for row in plan.modules:
        module, parent = model.get_submodule(row.name), row.name.rpartition(".")[0]
        region = regions.setdefault(parent, _region(row, state)) if row.region else None
        _parallelize_module(module, row, state, region)
    if root is not None and not is_parallel(model):
        model.__dict__["_tp"] = ShardState(mesh, mesh)
        model.__class__ = parallel_class(root, type(model))
        _parallelize_parts(model, mesh)
        if _forward_is_replaced(model):
            let_weight_be_read(model.get_output_embeddings())  # type: ignore[operator]
    model.__dict__[STATE] = state
    _leave_experts_to_us(model, state)


def remove_plan(model: nn.Module, read: ReadShard) -> None:
    """Give the ordinary model back, in place; `read` gives the full tensor of a row from this rank's shard (a collective)."""
    state = required_state(model)
    _replace_tensors(model, state.plan, read)
    if state.adapters is not None:
        _replace_tensors(model, _present(state.adapters, model), read)
    for module in model.modules():
        if is_parallel(module):
            _restore_module(module)
    del model.__dict__[STATE]
    for name in (_DDP_IGNORES, "_coming", "_prefixes"):
        model.__dict__.pop(name, None)


def apply_adapters(model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Turn the adapters that PEFT has put into a parallel `model` into this rank's part of them, in place; those that are so
    already stay as they are. Collective: where the ranks' adapters differ, the first rank's are taken.

    Args:
        model: a parallel model.
        configs: the adapters' configs, by name.

    Raises `ShardwiseError` for an adapter that would be wrong on a parallel model.
    """
    state = required_state(model)
    if not has_adapters(model):
        model.__dict__[STATE] = replace(state, adapters=None)
        return
    if state.stream is not None:
        raise ShardwiseError("Adapters and sequence_parallel=True do not go together: leave sequence_parallel out.")
    whole_as_planned(model, configs, state.plan)
    table = adapter_plan(model, state.plan)
    fresh = [row for row in table if not _is_settled(model, state, row)]
    _replace_in_place(model, fresh, state)
    on = replace(state, plan=table, overlap=False)
    for row in table.modules:
        module = model.get_submodule(row.name)
        if not is_parallel(module):
            _parallelize_module(module, row, on, _region_around(model, row.name) if row.region else None)
    for original, copy in copied_layers(model) if not state.overlap else ():
        copy.__dict__["_tp"].region = original.__dict__["_tp"].region  # or the copy would open it and not close it
    model.__dict__[STATE] = replace(state, adapters=table)


def _parallelize_parts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Have the models inside of `model` refuse to be saved alone."""
    for module in model.modules():
        if hasattr(type(module), "save_pretrained") and not is_parallel(module):
            module.__dict__["_tp"] = ShardState(mesh, mesh)
            module.__class__ = parallel_class(PartOfModel, type(module))


def _forward_is_replaced(model: nn.Module) -> bool:
    """Whether somebody has put a forward of his own into `model`, or into its class (Liger)."""
    owner = next(kind for kind in original_class(model).__mro__ if "forward" in vars(kind))
    return "forward" in model.__dict__ or vars(owner)["forward"].__module__ != owner.__module__


def let_weight_be_read(layer: Any) -> None:
    """Let code that reads a column-wise `layer`'s weight, in place of calling it, have the whole one. See `ReadWhole`."""
    kind = type(layer)
    if issubclass(kind, ColwiseGatherOutput) and not issubclass(kind, ReadWhole) and is_parallel(layer):
        style, base, summed, between = vars(kind)["_recipe"]
        layer.__class__ = parallel_class(ReadWhole, base, summed, (style, *between))


def let_weights_be_read(model: nn.Module) -> None:
    """Let PEFT, which is about to make an adapter out of the layers' weights, have whole ones. See `WholeWeight`."""
    for module in _layers(model):
        state = module.__dict__.get("_tp")
        layout, shape = state.layouts.get("weight", (None, ())) if state is not None else (None, ())
        cut = layout is not None and len(shape) == 2 and layout.cut(shape) is not None and "weight" in module._parameters
        if cut and not isinstance(module, WholeWeight):
            module.__class__ = parallel_class(WholeWeight, type(module))


def end_reading(model: nn.Module) -> None:
    """Undo `let_weights_be_read`."""
    for module in _layers(model):
        if issubclass(type(module), WholeWeight):
            module.__class__ = original_class(module)


def _layers(model: nn.Module) -> list[nn.Module]:
    # past `named_modules` of the model, which prepares it for adapters
    return [module for child in model.children() for module in child.modules()]


def take_adapters_out(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put the ordinary layers back in place of PEFT's around them; gives what `put_adapters_back` needs."""
    found = []
    for name, wrapper in list(wrappers(model)):
        owner, _, child = name.rpartition(".")
        parent = model.get_submodule(owner)
        found.append((parent, child, wrapper))
        setattr(parent, child, unwrapped(wrapper))
    return found


def put_adapters_back(found: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """Undo `take_adapters_out`."""
    for parent, child, wrapper in found:
        setattr(parent, child, wrapper)


def _check_fits(model: nn.Module, plan: Plan) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    planned = {row.name: row.shape for row in plan.tensors}
    if found != planned:
        name = next(iter(name for name in {**planned, **found} if planned.get(name) != found.get(name)))
        raise PlanError(
            describe(
                f"The plan was made for another model: {name} is {planned.get(name, 'not there')} in the plan.",
                model=f"{found.get(name, 'not there')} in the {type(model).__name__}",
                either=["make the plan from this model or its config, or", 'plan="auto"'],
            )
        )


def _replace_tensors(model: nn.Module, plan: Plan, read: ReadShard) -> None:
    parameters, buffers = _by_row(model.named_parameters(), plan), _by_row(model.named_buffers(), plan)
    for row in plan.tensors:
        old = buffers[row.name] if row.buffer else parameters[row.name]
        with torch.no_grad():
            new = read(row, old)
        if new is old:
            continue
        if not row.buffer:
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for name in (row.name, *row.aliases):
            owner, _, child = name.rpartition(".")
            group = model.get_submodule(owner)
            group = group if child in group._parameters or child in group._buffers else unwrapped(group)
            (group._buffers if row.buffer else group._parameters)[child] = new  # type: ignore[assignment]


def _by_row(named: Iterable[tuple[str, Tensor]], plan: Plan) -> dict[str, Tensor]:
    """Tensors by the names that they have in `plan`."""
    return {name if name in plan else ordinary_name(name): tensor for name, tensor in named}


def _present(plan: Plan, model: nn.Module) -> Plan:
    """The rows of tensors that are there still: PEFT may have taken an adapter out since."""
    names = {name for name, _ in model.named_parameters()}
    return replace(plan, tensors=tuple(row for row in plan if row.name in names))


def _is_settled(model: nn.Module, state: ModelState, row: ShardSpec) -> bool:
    """Whether the adapter's tensor of `row` is this rank's part already: its module is parallel, or the table has it."""
    module = model.get_submodule(row.name.rpartition(".")[0])
    tensor = model.get_parameter(row.name)
    known = state.adapters is not None and row.name in state.adapters
    return is_parallel(module) or (known and tuple(tensor.shape) == state.local_shape(row))


def _replace_in_place(model: nn.Module, rows: list[ShardSpec], state: ModelState) -> None:
    """Cut new adapters, and keep the parameters' objects: an optimizer may have them already."""
    rank, size = state.mesh.get_local_rank(), state.mesh.size()
    named = {row: model.get_parameter(row.name) for row in rows}
    made_of_parts = {_layer(row) for row, p in named.items() if row.sharded and tuple(p.shape) == state.local_shape(row)}
    for row, parameter in named.items():
        if _layer(row) in made_of_parts:
            _check_parts(row, parameter, state)
            continue
        if not parameter.is_meta:
            dist.broadcast(parameter.data, group=state.mesh.get_group(), group_src=0)
        if row.sharded:
            parameter.data = row.layout.shard(parameter.data, rank, size)


def _layer(row: ShardSpec) -> tuple[str, str]:
    """Which layer's adapter a tensor belongs to, and which adapter's."""
    path, _, _ = row.name.rpartition(".")
    wrapper, _, adapter = path.rpartition(".")
    return wrapper.rpartition(".")[0], adapter


def _check_parts(row: ShardSpec, parameter: Tensor, state: ModelState) -> None:
    """Raise `ShardwiseError` for an adapter that was computed from the ranks' parts of others, and is another one on each."""
    if not row.sharded and first_difference(torch.tensor([checksum(parameter)]), state.mesh) is not None:
        raise ShardwiseError(
            describe(
                f"{row.name} was made of each rank's parts of other adapters, and differs between ranks.",
                either=['combination_type="linear" of add_weighted_adapter, or', "combine the adapters in one process"],
            )
        )


def _region(row: ModuleSpec, state: ModelState) -> Region:
    return OverlappedRegion(row.local_dropout) if state.overlap else Region(row.local_dropout, state.stream)


def _region_around(model: nn.Module, dropout: str) -> Region | None:
    """The parallel region that an adapter's dropout is in: that of its base layer, or of the layers beside it."""
    layer = dropout.rpartition(".lora_dropout.")[0]
    beside = map(unwrapped, model.get_submodule(layer.rpartition(".")[0]).children())
    states = (module.__dict__["_tp"] for module in (unwrapped(model.get_submodule(layer)), *beside) if is_parallel(module))
    return next((state.region for state in states if state.region is not None), None)


def _parallelize_module(module: nn.Module, row: ModuleSpec, model: ModelState, region: Region | None) -> None:
    plan, mesh, own = model.plan, model.axis_of(row), {}
    for child in (*module._parameters, *module._buffers):
        name = f"{row.name}.{child}" if row.name else child
        if name in plan:
            own[child] = plan[name]
    layouts = {child: (spec.layout, spec.shape) for child, spec in own.items()}
    paths = tuple((tuple(path), name) for *path, name in (full.split(".") for full in row.stream_parameters))
    _say_full_shapes(module, own)
    state = ShardState(
        mesh, model.mesh, layouts, row.transposed, dict(row.options), region, stream=model.stream, stream_parameters=paths
    )
    for attribute, values in row.attributes.items():
        _set_local(module, attribute, values[mesh.get_local_rank()], state)
    summed = tuple(child for child, spec in own.items() if not spec.buffer and sums_gradient(spec, plan.size, plan.ep_size))
    module.__dict__["_tp"] = state
    late = model.overlap and not summed and issubclass(row.style, ColwiseParallel) and is_product(module)
    if issubclass(row.style, LinearStyle):
        plain = is_plain(module)
        module.__dict__["_facts"] = Facts(
            group=mesh.get_group().group_name,
            plain=plain,
            direct=plain and not summed and not late and row.around is None,
            shares=region is not None,
        )
    if row.around is None:
        module.__class__ = parallel_class(row.style, type(module), summed, (OverlappedLinear,) if late else ())
    else:
        read = () if row.around is SequenceRowwise else summed  # that one's bias is no more than an addend
        module.__class__ = parallel_class(row.around, type(module), read, (row.style,))
    if isinstance(module, OverlappedLinear):
        state.region = region = region or OverlappedRegion(alone=True)
        assert isinstance(region, OverlappedRegion)
        region.join(module)


def _say_full_shapes(module: nn.Module, own: Mapping[str, ShardSpec]) -> None:
    """Where PEFT takes an adapter's width from a parameter, or knows the word embeddings by its length, say how long it is in
    all, by the attribute that PEFT reads first: the adapter then starts out as in one process.
    """
    asked = stores_transposed(module) or isinstance(module, nn.Embedding)
    for child, row in own.items():
        if row.sharded and not row.buffer and (asked or len(row.shape) == 3):
            module._parameters[child].ds_shape = torch.Size(row.shape)  # type: ignore[union-attr]


def _leave_experts_to_us(model: nn.Module, state: ModelState) -> None:
    """Tell DDP which parameters other replicas hold other parts of: it would make them all the first replica's."""
    if state.ep.size() > state.mesh.size():
        dealt = [name for row in state.plan if row.axis == "ep" and row.sharded for name in (row.name, *row.aliases)]
        model.__dict__[_DDP_IGNORES] = [*dealt, *(f"_orig_mod.{name}" for name in dealt)]  # the latter of torch.compile(model)


class _Absent:
    """Stands for the value of an attribute that a module has only where it is parallel."""


def _set_local(module: nn.Module, attribute: str, value: int | None, state: ShardState) -> None:
    if attribute.startswith("config."):
        name = attribute.removeprefix("config.")
        config = module.__dict__["config"]
        state.restore.setdefault("config", config)
        module.__dict__["config"] = LocalConfig(config, {name: value})
        return
    state.restore[attribute] = getattr(module, attribute, _Absent)
    setattr(module, attribute, value)


def _restore_module(module: nn.Module) -> None:
    state: ShardState = module.__dict__.pop("_tp")
    module.__dict__.pop("_facts", None)
    module.__class__ = original_class(module)
    for attribute, value in state.restore.items():
        if value is _Absent:
            delattr(module, attribute)
        else:
            setattr(module, attribute, value)
