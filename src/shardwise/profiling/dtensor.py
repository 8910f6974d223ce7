"""The peer that torch's own tensor parallelism is: `parallelize_module`, by the rules of the model's own plan."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate  # noqa: TID251  # the peer is made of it; our own model never is
from torch.distributed.tensor.parallel import (  # noqa: TID251
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

import shardwise
from shardwise.errors import PlanError, describe
from shardwise.plan import Plan


def parallelized(model: Any, mesh: DeviceMesh) -> Any:
    """An ordinary transformers model, made parallel in place. Collective."""
    parallelize_module(model, mesh, styles(shardwise.plan(model, mesh.size())))
    return model


def styles(plan: Plan) -> dict[str, ParallelStyle]:
    """By module. What only a correction of ours says is left whole.

    Raises `PlanError` for a rule that torch has no style for, where the rule splits a parameter; one that does not (a norm's)
    is passed over.
    """
    found: dict[str, ParallelStyle] = {}
    for module in plan.modules:
        if module.rule is None or module.rule.source != "model":
            continue
        style = _style(module.rule.style)
        if style is not None:
            found[module.name] = style
        elif any(row.sharded for row in plan if row.name.startswith(f"{module.name}.")):
            raise PlanError(
                describe(
                    f"{module.name}: torch's parallelize_module has no style that does this.",
                    rule=str(module.rule),
                    either=["leave dtensor out of --against, or", "profile a model without it"],
                )
            )
    return found


def _style(name: str) -> ParallelStyle | None:
    if name == "colwise":
        return ColwiseParallel()
    if name in ("colwise_gather_output", "colwise_rep"):
        return ColwiseParallel(output_layouts=Replicate())
    if name == "rowwise":
        return RowwiseParallel()
    if name == "embedding_rowwise":
        return RowwiseParallel(input_layouts=Replicate())
    return None
