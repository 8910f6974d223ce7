"""No large parameter stays whole without a word: each is covered by a rule, or named as replicated."""

from __future__ import annotations

from torch import nn

from shardwise.errors import PlanError, describe
from shardwise.plan import Plan, wildcard

LARGE = 0.10
"""A family of matrices (one of each layer) that takes more than this share of the model's bytes must have a rule; all that have
none, together, are inferred by "auto" from this share on."""


def check_coverage(model: nn.Module, plan: Plan) -> None:
    """Raise `PlanError` when matrices that no rule names would take much memory on every rank, or when nothing at all is
    cut. One rank holds everything in any case.
    """
    if plan.size == 1:
        return
    whole = _unnamed(plan)
    large = sorted((name for name, size in whole.items() if size > LARGE * plan.full_bytes), key=lambda name: -whole[name])
    nothing = not any(row.sharded for row in plan.tensors)
    if not large and not nothing:
        return
    found = [f"{name}: {whole[name] / 2**20:.2f} MiB, {whole[name] / plan.full_bytes:.0%} of the model" for name in large[:8]]
    examples = ", ".join(f'"{name.rpartition(".")[0]}": "replicate"' for name in large[:2])
    problem = "no rule cuts anything" if nothing else "no rule names these matrices, so every rank would keep them whole"
    raise PlanError(
        describe(
            f"{type(model).__name__}: {problem}.",
            **({"whole": found} if found else {}),
            either=[
                "give them a style: tp_plan={...}, merged over the model's own plan, or",
                f"keep them whole on purpose: tp_plan={{{examples or '...'}}}",
            ],
        )
    )


def unnamed_share(plan: Plan) -> float:
    """The share of the model's bytes in matrices that no rule names."""
    return sum(_unnamed(plan).values()) / max(plan.full_bytes, 1)


def _unnamed(plan: Plan) -> dict[str, int]:
    """The bytes of the matrices that no rule names, those of alike layers together."""
    whole: dict[str, int] = {}
    for row in plan.tensors:
        if not row.sharded and not row.buffer and row.rule is None and len(row.shape) > 1:
            whole[wildcard(row.name)] = whole.get(wildcard(row.name), 0) + row.bytes
    return whole
