"""Files that are there to be read, and to be compared with: of what a type brings, with our corrections."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedConfig

from shardwise.errors import PlanError
from shardwise.freeze.found import NotFrozen
from shardwise.freeze.own import Own, brought, difference, own
from shardwise.freeze.rules import exact_lines
from shardwise.freeze.sizes import SIZE, Change, models, other_numbers, other_options, other_sizes, unrelated_sizes
from shardwise.hf import base_model
from shardwise.infer import cut_share, prove
from shardwise.plan import wildcard
from shardwise.plans.frozen import Frozen, Variant
from shardwise.plans.frozen.fits import options

MORE_RANKS = 4


def recorded(config: PreTrainedConfig) -> Frozen:
    """What the plan says that the type of `config` brings: its numbers as expressions that hold for other sizes too, and
    whenever a number of the config changes; a variant for each option with which it says something else.

    Raises `NotFrozen`.
    """
    first = _own(config)
    record = _Record(config, *_with_other_sizes(config, first))
    record.try_numbers()
    cut = round(cut_share(first.plan), 3)
    return Frozen(base_model(first.model).config.model_type, cut, cut, "", tuple(record.variants()))


def _own(config: PreTrainedConfig, size: int = SIZE) -> Own:
    model = models(config)[0]
    plan = brought(model, size)
    if plan is None:
        raise NotFrozen("no plan is brought with other sizes or options")
    return own(model, plan)


def _with_other_sizes(config: PreTrainedConfig, first: Own) -> tuple[PreTrainedConfig, list[Own], Variant]:
    """A config of other sizes, what was found of both, and the rules of both."""
    why: Exception | None = None
    for scaled in other_sizes(config):
        for other in (unrelated_sizes(scaled, lambda made: models(made)[0]), scaled):
            try:
                found = [first, _own(other)]
                variant = _variant(found)
                for size in (SIZE, MORE_RANKS):
                    _prove(other, size)
            except Exception as error:  # whatever a model's code says to sizes that it is not made for
                why = why or error
            else:
                return other, found, variant
    raise NotFrozen(f"no other sizes: {(str(why).splitlines() or [repr(why)])[0]}")


def _prove(config: PreTrainedConfig, size: int) -> None:
    try:
        found = _own(config, size)
    except PlanError:
        if size == SIZE:
            raise
        return  # too few heads
    prove(found.plan, found.model)


def _variant(found: Sequence[Own]) -> Variant:
    """The rules of all of `found`. Raises `NotFrozen` where they are not the same."""
    made = Variant({}, {}, (), tuple(exact_lines([one.base for one in found])), tuple(exact_lines([one.head for one in found])))
    if wrong := next((text for one in found if (text := difference(made, one)) is not None), None):
        raise NotFrozen(wrong)
    return made


@dataclass
class _Record:
    config: PreTrainedConfig
    other: PreTrainedConfig
    found: list[Own]
    variant: Variant
    held: list[Own] = field(default_factory=list)

    def try_numbers(self) -> None:
        """Try every number of the config: rules that hold by accident are made anew. Raises `NotFrozen` where nothing says
        what a number changes.
        """
        for config in other_numbers(self.config):
            near = self._unlike(config)
            if near is not None and _kinds(near) == _kinds(self.found[0]) and not self._has_fewer_heads(near):
                self._take(near)

    def variants(self) -> Iterator[Variant]:
        """The rules, and those for options with which they are others, each with the options that tell them apart."""
        apart: dict[tuple[str, str], Variant | None] = {}
        for what, change in other_options(self.config):
            near = self._unlike(change(self.config))
            if near is not None and not (what == "heads" and self._has_fewer_heads(near)):
                try:
                    self._take(near, *self._also(change))
                except NotFrozen:
                    apart[what, self._value(what, near)] = self._with_option(change, near)
        names = {what for what, _ in apart}
        usual = {name: (value,) for name, value in _options(self.found[0], names).items() if name in names}
        yield replace(self.variant, options=usual)
        for (what, value), variant in apart.items():
            if variant is not None:
                yield replace(variant, options=usual | {what: (value,)})

    def _with_option(self, change: Change, near: Own) -> Variant | None:
        """The rules for an option, as for the usual ones; None where it makes no models of other sizes."""
        config, other = change(self.config), change(self.other)
        try:
            found = [near, _own(other)]
            record = _Record(config, other, found, _variant(found))
            _prove(other, SIZE)
            record.try_numbers()
        except Exception:  # whatever a model's code says to options that exclude each other
            return None
        return record.variant

    def _value(self, what: str, near: Own) -> str:
        value = _options(near, {what}).get(what)
        if value is None or value == _options(self.found[0], {what}).get(what):
            raise NotFrozen(f"its rules are others with another {what}, and nothing says which")
        return value

    def _unlike(self, config: PreTrainedConfig) -> Own | None:
        """What is brought with `config`, where that is not what the rules say; None where it is, or no model that runs."""
        try:
            near = _own(config)
            if difference(self.variant, near) is None:
                self.held.append(near)
                return None
        except Exception:  # whatever a model's code says to numbers that it is not made for
            return None
        return near if _is_right(near) else None

    def _has_fewer_heads(self, near: Own) -> bool:
        """Whether neighbouring ranks share more of `near`'s KV heads: they are cut in another way then."""
        return _shared(near) > _shared(self.found[0])

    def _also(self, change: Change) -> list[Own]:
        """The same option in the model of other sizes."""
        try:
            return [_own(change(self.other))]
        except Exception as error:  # whatever a model's code says to options that exclude each other
            raise NotFrozen("no other sizes have this option") from error

    def _take(self, *near: Own) -> None:
        """Make the rules anew, so that they hold for `near` too, and for all that they held for. Raises `NotFrozen`."""
        variant, found = _variant([*self.found, *near]), [*self.found, *near]
        for one in self.held:
            if difference(variant, one) is not None and _is_right(one):
                return self._take(*near, one)
        self.variant, self.found = variant, found
        return None


def _is_right(found: Own) -> bool:
    try:
        prove(found.plan, found.model)
    except Exception:  # whatever a model's code says to numbers that it is not made for
        return False
    return True


def _options(found: Own, names: Collection[str]) -> dict[str, str]:
    return dict(options(base_model(found.model).config, names))


def _kinds(found: Own) -> dict[str, tuple[str, ...]]:
    """What is done, but for the numbers: sizes at which something else is done are not spoken of."""
    rules = found.plan.rules
    return {wildcard(name): (rule.style, *rule.attributes, *rule.parent_attributes) for name, rule in rules.items()}


def _shared(found: Own) -> int:
    return sum(row.sharded and row.layout.copies(row.shape, SIZE) > 1 for row in found.plan)
