"""Files that `auto` uses: of what is inferred."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedConfig

from shardwise.errors import PlanError
from shardwise.freeze.found import Found, NotFrozen
from shardwise.freeze.rules import inferred_lines
from shardwise.freeze.sizes import SIZE, models, other_options, other_sizes, unrelated_sizes
from shardwise.hf import base_model, frozen_model_rules
from shardwise.infer import cut_share, infer, prove
from shardwise.plan import Plan
from shardwise.plans.frozen import Frozen, Variant, expand_rules
from shardwise.plans.frozen.fits import classes, matrices, options
from shardwise.resolve import resolve
from shardwise.spec import Rule

LEAST = 0.5
"""A plan that cuts less of a model is not worth keeping."""


def inferred(config: PreTrainedConfig, own: float | None, why: str) -> Frozen:
    """The plan that is inferred on the tiny model of a type and on one of other sizes, and proven on both and for what other
    options can be; `own` and `why` as in `Frozen`. Raises `NotFrozen`.
    """
    return _Freezing(config).run(own, why)


@dataclass
class _Freezing:
    config: PreTrainedConfig
    allowed: dict[str, dict[str, None]] = field(default_factory=dict)
    kinds: dict[str, dict[str, None]] = field(default_factory=dict)
    known: dict[str, None] = field(default_factory=dict)

    def run(self, own: float | None, why: str) -> Frozen:
        pairs = [(self.config, self._infer(self.config)), self._other()]
        found = [one for _, of_config in pairs for one in of_config]
        variant = Variant({}, {}, (), tuple(inferred_lines(found)))
        for config, size in ((pairs[0][0], 2), (pairs[1][0], 2), (pairs[1][0], 3), (pairs[1][0], 4)):
            for model in models(config):
                self._prove(variant, model, size)
        for what, change in other_options(self.config):
            self._allow(variant, what, change(self.config))
        model = models(self.config)[0]
        cut = cut_share(self._plan(variant, model, SIZE))
        if cut < LEAST:
            raise NotFrozen(f"it cuts {cut:.0%} alone")
        proven = _lists(self.allowed), _lists(self.kinds), tuple(sorted(self.known))
        whole = Variant(*proven, variant.rules)
        return Frozen(base_model(model).config.model_type, round(cut, 3), own, why, (whole,))

    def _infer(self, config: PreTrainedConfig) -> list[Found]:
        found = []
        for model in models(config):
            plan = infer(model, SIZE).plan
            base, rules = base_model(model), dict(plan.rules)
            prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
            inside = {name.removeprefix(prefix): rule for name, rule in rules.items() if name.startswith(prefix)}
            found.append(Found(base, inside, SIZE))
        return found

    def _other(self) -> tuple[PreTrainedConfig, list[Found]]:
        """Another config, and what is inferred of it."""
        why = ""
        for config in other_sizes(self.config):
            try:
                config = unrelated_sizes(config, lambda made: models(made)[0])
                return config, self._infer(config)
            except Exception as error:  # whatever a model's code says to sizes that it is not made for
                why = (str(error).splitlines() or [repr(error)])[0]
        raise NotFrozen(f"no other sizes run: {why}")

    def _plan(self, variant: Variant, model: nn.Module, size: int) -> Plan:
        def kept(_: str, base: nn.Module, prefix: str, size: int) -> list[Rule]:
            return expand_rules(variant, base, prefix, size) if base is base_model(model) else []

        return resolve(model, frozen_model_rules(model, size, kept), size)

    def _prove(self, variant: Variant, model: nn.Module, size: int) -> None:
        try:
            plan = self._plan(variant, model, size)
        except PlanError as error:
            if size > SIZE:
                return  # too few heads
            raise NotFrozen(str(error).splitlines()[0]) from error
        except ValueError as error:
            raise NotFrozen(str(error)) from error
        try:
            prove(plan, model)
        except PlanError as error:
            raise NotFrozen(f"tp={size}: {str(error).splitlines()[0]}") from error
        self._note(variant, base_model(model))

    def _allow(self, variant: Variant, what: str, config: PreTrainedConfig) -> None:
        """Take an option, too, if the plan is right with it."""
        try:
            model = models(config)[0]
            wanted = dict(options(base_model(model).config))
            changed = {name for name, value in wanted.items() if value not in self.allowed.get(name, ())}
            if changed <= {what} and cut_share(self._plan(variant, model, SIZE)) > LEAST:
                self._prove(variant, model, SIZE)
        except Exception:  # whatever a model's code says to options that exclude each other: it is not taken
            return

    def _note(self, variant: Variant, base: nn.Module) -> None:
        for name, value in options(base.config):
            self.allowed.setdefault(name, {})[value] = None
        places = dict.fromkeys(line.pattern.rpartition(".")[0] for line in variant.rules)
        for name, found in classes(base, [place for place in places if place]).items():
            self.kinds.setdefault(name, {}).update(dict.fromkeys(found))
        self.known.update(dict.fromkeys(name for name in matrices(base) if "*" in name))


def _lists(given: Mapping[str, Mapping[str, None]]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(sorted(values)) for name, values in sorted(given.items())}
