"""Which of torch's operators are collectives, and what one call of them says.

Whoever communicates goes through these: `dist.*` and a group's own methods through `c10d`, traced code through
`_c10d_functional`, or through our own operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_reduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
    "barrier": "barrier",
}
"""Operator -> the collective, as `torch.distributed` calls it."""

_NAMESPACES = ("c10d", "_c10d_functional", "shardwise")
# What a rank puts in, where an operator has both; of the others, their first tensors.
_INPUTS = ("input", "inputs", "input_tensor", "input_tensors", "input_lists")


@dataclass(frozen=True)
class Call:
    """One call: the collective, the tensors that this rank puts in, the group, and the shapes that all ranks must agree on."""

    kind: str
    inputs: tuple[Tensor, ...]
    group: dist.ProcessGroup | None
    agreed: tuple[tuple[int, ...], ...]


def read_call(function: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> Call | None:
    """What `function` was called with, if it is a collective."""
    kind = KINDS.get(function.overloadpacket.__name__) if function.namespace in _NAMESPACES else None
    if kind is None:
        return None
    given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | dict(kwargs)
    inputs = next((found for name in _INPUTS if name in given and (found := _tensors(given[name]))), None)
    if inputs is None:
        inputs = next((found for value in given.values() if (found := _tensors(value))), ())
    outputs = _tensors(given.get("output_tensors", given.get("output_tensor")))
    return Call(kind, inputs, _group(given), agreed_shapes(kind, inputs, outputs))


def agreed_shapes(kind: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Ranks may gather pieces of different sizes, if they agree on all of them; and send each other any number of rows."""
    if kind == "all_to_all":
        return tuple({tuple(tensor.shape[1:]) for tensor in inputs})
    return tuple(tuple(tensor.shape) for tensor in (outputs if kind == "all_gather" and outputs else inputs))


def _tensors(value: object) -> tuple[Tensor, ...]:
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, (list, tuple)):
        return tuple(tensor for one in value for tensor in _tensors(one))
    return ()


def _group(given: Mapping[str, object]) -> dist.ProcessGroup | None:
    for name in ("process_group", "group", "group_name"):
        value = given.get(name)
        if isinstance(value, str):
            return _resolve_process_group(value)  # type: ignore[arg-type]
        if isinstance(value, torch.ScriptObject):
            return dist.ProcessGroup.unbox(value)
    return None


def collective_of(operator: str) -> str | None:
    """The collective that an operator is, by its qualified name: "all_reduce" for "c10d::allreduce_"."""
    namespace, _, name = operator.partition("::")
    return KINDS.get(name) if namespace in _NAMESPACES else None


def wait_for(result: object) -> None:
    """Until what a collective gave is there: its work is done, or its tensors are."""
    for one in result if isinstance(result, (list, tuple)) else (result,):
        if isinstance(one, torch.ScriptObject):
            dist.Work.unbox(one).wait()
        elif isinstance(one, dist.Work):
            one.wait()
        elif isinstance(one, Tensor):
            torch.ops._c10d_functional.wait_tensor(one)
        elif isinstance(one, (list, tuple)):
            wait_for(one)
