"""What was found of several models of a type, a family of modules at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from shardwise.freeze.express import Sample
from shardwise.layers.registry import style_named
from shardwise.plan import wildcard
from shardwise.plans.frozen.scope import cut_length
from shardwise.spec import Rule


class NotFrozen(Exception):
    """Why the plan of a type can't be kept, in words."""


@dataclass(frozen=True)
class Found:
    """What was found of one model.

    Args:
        model: the module to which names are relative: the base model, or the whole one.
        rules: by the name of the module or parameter.
        size: on how many ranks.
    """

    model: nn.Module
    rules: Mapping[str, Rule]
    size: int


@dataclass(frozen=True)
class Use:
    """A rule of a family, where it was found."""

    found: Found
    name: str
    rule: Rule
    length: int | None

    @property
    def sample(self) -> Sample:
        """Where its numbers stand."""
        return Sample(self.found.model, self.name, self.length)


Families = Mapping[str, Sequence[Use]]
"""By the name that members have in common, with `*` for their numbers."""


def families_of(found: Sequence[Found]) -> Families:
    """The rules of all that was found."""
    families: dict[str, list[Use]] = {}
    for one in found:
        for name, rule in one.rules.items():
            families.setdefault(wildcard(name), []).append(Use(one, name, rule, _length(one, name, rule)))
    return families


def _length(found: Found, name: str, rule: Rule) -> int | None:
    if rule.cut is None:
        return None
    return cut_length(found.model, name, style_named(rule.style, name), rule.cut.dim)


def numbered(name: str) -> Iterator[str]:
    """The ways to put `*` for all numbers in `name` but some: of the last one, of the last two, ..."""
    parts = name.split(".")
    at = [place for place, part in enumerate(parts) if part.isdigit()]
    for count in range(1, len(at)):
        yield ".".join("*" if place in at[: len(at) - count] else part for place, part in enumerate(parts))
