"""The proof of the plan in one process, before any rank starts; and what it says about ranks that differ."""

from __future__ import annotations

import torch
from torch import nn

from shardwise.errors import PlanError
from shardwise.infer import Island, Proof, examine
from shardwise.plan import Plan, wildcard
from shardwise.verify.settings import Settings


def prove_plan(settings: Settings, model: nn.Module, plan: Plan) -> Proof | str:
    """What is found of `plan`, for `model`, which may be on meta; or why nothing could be."""
    given = torch.load(settings.inputs) if settings.inputs else None
    try:
        return examine(plan, model, given)
    except PlanError as error:
        return str(error).splitlines()[0]


def island_of(proof: Proof, module: str) -> Island | None:
    """The part of the plan that has the module called `module` in it."""
    name = wildcard(module)
    for island in proof.islands:
        first, *others = island.name.split(", ")
        places = [first, *(f"{first.rpartition('.')[0]}.{other}".strip(".") for other in others)]
        if any(found == place or found.startswith(f"{place}.") for place in places for found in (module, name)):
            return island
    return None


def wrong_plan(proof: Proof) -> str:
    """What is wrong with the plan, and the way out."""
    where = _wrong_islands(proof)
    return f"The plan is wrong{f' in {where}' if where else ''}, in one process already: {proof.problem}. {_way_out(proof)}"


def it_is_the_plan(proof: Proof) -> str:
    """What that says of ranks that differ."""
    where = _wrong_islands(proof)
    return f"It is the plan, which is wrong in one process already{f', in {where}' if where else ''}. {_way_out(proof)}"


def _wrong_islands(proof: Proof) -> str:
    return " and ".join(island.name for island in proof.islands if island.problem is not None)


def _way_out(proof: Proof) -> str:
    yours = dict.fromkeys(rule for island in proof.islands if island.problem is not None for rule in island.yours)
    if yours:
        return f"Leave out {' or '.join(f'your rule {rule}' for rule in yours)}."
    return 'Take another one: tp_plan="infer", or "replicate" for the layers of what is wrong.'


def what_is_left(proof: Proof, module: str, settings: Settings) -> str:
    """Of ranks that differ where the plan is right: what may be wrong then, `module` being the first to differ; "" unknown."""
    island = island_of(proof, module) if module else None
    proven = f"The plan is right: {island.name} is proven in one process." if island else "The plan is proven in one process."
    apart = {
        "compiled code": settings.compiled,
        "slices of the sequence": settings.sequence_parallel,
        "collectives that overlap": settings.overlap,
        f"rounding in {settings.dtype}": settings.torch_dtype not in (torch.float32, torch.float64),
    }
    asked = [words for words, on in apart.items() if on]
    return f"{proven} Look at what only ranks do: {', '.join([*asked, 'the collectives between processes', 'loading'])}."
