"""The file of a type."""

from __future__ import annotations

from shardwise.errors import PlanError
from shardwise.freeze.found import NotFrozen
from shardwise.freeze.inferred import inferred
from shardwise.freeze.own import brought
from shardwise.freeze.recorded import recorded
from shardwise.freeze.sizes import SIZE, models, tiny_config
from shardwise.infer import cut_share, prove
from shardwise.plans.frozen import Frozen


def freeze(name: str) -> Frozen:
    """The frozen plan of a type: of what it brings, with our corrections, where that is right, to be read; else one that is
    inferred, which `auto` then uses.

    Raises `NotFrozen`, saying why.
    """
    try:
        config = tiny_config(name)
        own, why = None, "it brings no plan"
        model = models(config)[0]
        try:
            if (plan := brought(model, SIZE)) is not None:
                own = round(cut_share(plan), 3)
                prove(plan, model)
                return recorded(config)
        except PlanError as error:
            why = f"its own plan is refused: {str(error).splitlines()[0]}"
        return inferred(config, own, why)
    except (PlanError, ImportError, ValueError, TypeError, AttributeError, AssertionError, KeyError, RuntimeError) as error:
        raise NotFrozen((str(error).splitlines() or [repr(error)])[0]) from error
