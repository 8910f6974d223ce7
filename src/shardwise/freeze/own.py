"""The plan of a model as rules that say all of it; and whether the lines of a file say the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from shardwise.coverage import check_coverage
from shardwise.errors import PlanError
from shardwise.freeze.found import Found
from shardwise.freeze.rules import ENDS
from shardwise.hf import base_model, check_head, model_rules
from shardwise.layers import Cut
from shardwise.layout import Packed, Sharded
from shardwise.plan import Plan
from shardwise.plans.frozen import Variant, expand_lines
from shardwise.resolve import resolve
from shardwise.spec import Rule, ShardSpec


@dataclass(frozen=True)
class Own:
    """A plan of a model.

    Args:
        model: the whole one.
        plan: its plan.
        base: the rules for what is in the base model, relative to it.
        head: those for what is outside, by their names in `model`.
    """

    model: nn.Module
    plan: Plan
    base: Found
    head: Found


def brought(model: nn.Module, size: int) -> Plan | None:
    """By the plan that `model` brings, with our corrections; None where it brings none. Raises `PlanError`, as `auto` does."""
    rules = model_rules(model, size)
    if not rules:
        return None
    plan = resolve(model, rules, size)
    check_coverage(model, plan)
    check_head(model, plan)
    return plan


def own(model: nn.Module, plan: Plan) -> Own:
    """All that `plan` says of `model`."""
    size = plan.size
    base, prefix = base_of(model)
    rules = {name: _said(name, rule, plan) for name, rule in plan.rules.items() if _is_needed(name, rule, plan)}
    inside = {name.removeprefix(prefix): rule for name, rule in rules.items() if name.startswith(prefix)}
    outside = {name: rule for name, rule in rules.items() if not name.startswith(prefix)}
    return Own(model, plan, Found(base, inside, size), Found(model, outside, size))


def _is_needed(name: str, rule: Rule, plan: Plan) -> bool:
    """Not of vectors that are whole as if no rule named them: there are many."""
    row = plan.get(name)
    is_vector = row is not None and len(row.shape) < 2 and not row.sharded and not row.partial
    return rule.matches(name) and not (is_vector and name.rpartition(".")[0] not in plan.rules)


def base_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The base model, and what the names of all that is in it start with."""
    base = base_model(model)
    return base, next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)


def _said(name: str, rule: Rule, plan: Plan) -> Rule:
    """`rule` with the cut that was worked out for it."""
    row = plan.get(name) or plan.get(f"{name}.weight")
    if rule.cut is not None:
        return replace(rule, cut=replace(rule.cut, transposed=False))
    # Of stacked experts, and of the ends of a model, the style says the cut.
    if row is None or not row.sharded or len(row.shape) > 2 or rule.style in ENDS:
        return rule
    return replace(rule, cut=_cut(row))


def _cut(row: ShardSpec) -> Cut | None:
    if isinstance(row.layout, Sharded):
        return Cut(row.layout.unit, row.layout.spread)
    return Cut(blocks=row.layout.blocks) if isinstance(row.layout, Packed) else None


def difference(variant: Variant, found: Own) -> str | None:
    """How what `variant` says of a model differs from what `auto` does, in words; None where it is the same."""
    model, plan = found.model, found.plan
    base, prefix = base_of(model)
    try:
        rules = [*expand_lines(variant.rules, base, prefix, plan.size), *expand_lines(variant.head, model, "", plan.size)]
        said = resolve(model, rules, plan.size)
    except (PlanError, ValueError) as error:
        return str(error).splitlines()[0]
    return plan_difference(said, plan)


def plan_difference(kept: Plan, now: Plan, counts: Callable[[str], bool] = lambda _: True, other: str = "auto") -> str | None:
    """The first tensor or module whose name `counts` of which the plan of a file, `kept`, says something else than `now`."""
    here, there = ({name: said for name, said in _said_by(plan) if counts(name)} for plan in (kept, now))
    for name in {**there, **here}:
        if here.get(name) != there.get(name):
            return f"{name} is {_words(here.get(name))} by the file, and {_words(there.get(name))} by {other}"
    return None


def _said_by(plan: Plan) -> Iterator[tuple[str, tuple[object, ...]]]:
    for row in plan.tensors:
        yield row.name, (row.layout.cut(row.shape), row.partial, row.axis)
    for module in plan.modules:
        numbers = dict(module.attributes), dict(module.options)
        yield module.name, (module.style.__name__, *numbers, module.region, module.local_dropout)


def _words(given: tuple[object, ...] | None) -> str:
    return "nothing" if given is None else ", ".join(map(str, given))
