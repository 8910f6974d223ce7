"""Whether a file still says what `auto` does."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from shardwise.errors import PlanError
from shardwise.freeze.own import difference, own, plan_difference
from shardwise.freeze.sizes import SIZE, models, tiny_config
from shardwise.hf import base_model, model_rules
from shardwise.infer import infer_plan
from shardwise.plan import Plan, wildcard
from shardwise.planning import make_plan
from shardwise.plans.frozen import Frozen, frozen, other_option


class NotBuilt(Exception):
    """Why there is no tiny model of a type here, in words."""


def drift(name: str, inferred: bool = True) -> str | None:
    """How the file of a type differs from what `auto` does of its tiny model, in words; None where it doesn't.

    Args:
        inferred: of a file that `auto` uses, whether to infer the plan again (seconds): it has to be what the file says.

    Raises `NotBuilt` where a package is missing, or transformers refuses the config.
    """
    model = _model(tiny_config(name))
    kept = frozen(base_model(model).config.model_type)
    if kept is None:
        return "it has no file"
    try:
        plan = make_plan(model, SIZE)
    except PlanError as error:
        return f"there is no plan: {str(error).splitlines()[0]}"
    if not kept.why:
        return _recorded(kept, model, plan)
    if kept.own is None and model_rules(model, SIZE):
        return "it brings a plan by now, and the file's is used in its place"
    if not any(rule.source == "frozen" for rule in plan.rules.values()):
        return "auto no longer uses the file"
    return _inferred(model, plan) if inferred else None


def _model(config: PreTrainedConfig) -> nn.Module:
    try:
        return models(config)[0]
    except (ImportError, ValueError) as error:
        raise NotBuilt(" ".join(str(error).split())) from error


def _recorded(kept: Frozen, model: nn.Module, plan: Plan) -> str | None:
    found = own(model, plan)
    reasons = [(variant, other_option(variant, base_model(model).config)) for variant in kept.variants]
    fitting = next((variant for variant, why in reasons if why is None), None)
    return reasons[0][1] if fitting is None else difference(fitting, found)


def _inferred(model: nn.Module, plan: Plan) -> str | None:
    """What lies in no layer is cut by its size."""
    return plan_difference(plan, infer_plan(model, SIZE), lambda name: "*" in wildcard(name), "what is inferred now")
