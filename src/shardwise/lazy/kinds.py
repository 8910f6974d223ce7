"""Which operations can be recorded, and which have to be done at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch._ops import OpOverload

from shardwise.errors import CheckpointError, describe, first_of
from shardwise.lazy.views import Shape


def makes_new_values(func: OpOverload) -> bool:
    """`zeros_like`, `new_empty` and so on: of the argument, only shape and dtype count."""
    name = str(func.overloadpacket).removeprefix("aten.")
    return name.startswith("new_") or name.endswith("_like")


def depends_on_values(func: OpOverload) -> bool:
    """Whether the result's type or shape depends on values (`equal`, `item`, `nonzero`), or numbers are drawn for it."""
    now = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
    returned = {str(result.type) for result in func._schema.returns}
    return bool(now & set(func.tags)) or not returned <= {"Tensor", "List[Tensor]"}


def device_type(kwargs: Mapping[str, object]) -> str | None:
    """The type of the device that a call asks for; None where it asks for none."""
    device = kwargs.get("device")
    return device.type if isinstance(device, torch.device) else None


def misfit(func: OpOverload, parts: Sequence[tuple[str, Shape]], error: RuntimeError) -> CheckpointError:
    """The error for tensors, as names and shapes, that `func` can't put together: the odd ones out first."""
    usual = Counter(shape for _, shape in parts).most_common(1)[0][0] if len(parts) > 2 else None
    ordered = sorted(parts, key=lambda part: part[1] == usual)
    shown = [f"{name}: {list(shape)}" for name, shape in ordered]
    return CheckpointError(
        describe(
            f"{str(func.overloadpacket).removeprefix('aten.')}: these tensors of the checkpoint do not fit together.",
            tensors=first_of(shown, most=8),
            torch=str(error).splitlines()[0],
        )
    )
