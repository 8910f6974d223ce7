"""Rules of several models of a type, as lines for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from shardwise.freeze.found import Families, Found, NotFrozen, Use, families_of, numbered
from shardwise.freeze.numbers import cut_text, local_texts
from shardwise.plan import wildcard
from shardwise.plans.frozen import FrozenLine, members
from shardwise.spec import Rule

ENDS = ("embedding_rowwise", "colwise_gather_output")
"""Styles of the ends of a model, outside of its layers, which `hf.rules` knows."""


def inferred_lines(found: Sequence[Found]) -> Iterator[FrozenLine]:
    """The rules inside of the layers that all of `found` have, their numbers as expressions. Raises `NotFrozen` where they
    differ in more.
    """
    families = families_of([replace(one, rules=_inside(one)) for one in found])
    for family, uses in families.items():
        if kept := _cut_inside(uses):
            yield from _Family(family, kept, families, exact=False).lines()


def exact_lines(found: Sequence[Found]) -> Iterator[FrozenLine]:
    """All rules of all of `found`, so that worked out again they name what they named, and nothing else. A number that is the
    same everywhere stands as it is. Raises `NotFrozen` where that can't be done.
    """
    families = families_of(found)
    for family, uses in families.items():
        yield from _Family(family, uses, families, exact=True).lines()


def _inside(found: Found) -> dict[str, Rule]:
    """Without what is cut by its size, outside of the layers."""
    return {name: rule for name, rule in found.rules.items() if rule.style not in ENDS or "*" in wildcard(name)}


def _cut_inside(uses: Sequence[Use]) -> list[Use]:
    """Those that are cut as part of something that can be computed apart; else those whose outputs are gathered. One model may
    run what another leaves out (cross-attention), and what is large depends on the size.
    """
    inside = [use for use in uses if use.rule.style not in (*ENDS, "replicate")]
    return inside or [use for use in uses if use.rule.style in ENDS]


class _Family:
    """The rules for names that differ in their numbers alone."""

    def __init__(self, family: str, uses: Sequence[Use], families: Families, exact: bool) -> None:
        self.family, self.uses, self.families, self.exact = family, uses, families, exact

    def lines(self) -> list[FrozenLine]:
        """One line; or, where members are cut in several ways (`ffn.0` and `ffn.2` of a layer), as few as tell them apart: by
        the last of their numbers, by their class or by what is true of them, or by the class of a module around them.
        """
        why: NotFrozen | None = None
        for grouped in self._groupings():
            try:
                return [self._line(pattern, of, uses) for (pattern, of), uses in grouped.items()]
            except NotFrozen as error:
                why = why or error
        raise why or NotFrozen(f"{self.family}: no rule")

    def _groupings(self) -> Iterator[dict[tuple[str, str], list[Use]]]:
        yield {(self.family, ""): list(self.uses)}
        for kept in range(len(list(numbered(self.uses[0].name)))):
            yield self._grouped([(list(numbered(use.name))[kept], "") for use in self.uses])
        for level in range(len(self.family.split("."))):
            yield self._grouped([(self.family, _kind(use.found, use.name, level)) for use in self.uses])
            for name in _true_of(self.uses) if level == 0 else ():
                yield {(self.family, name): list(self.uses)}

    def _grouped(self, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[Use]]:
        groups: dict[tuple[str, str], list[Use]] = {}
        for key, use in zip(keys, self.uses, strict=True):
            groups.setdefault(key, []).append(use)
        return groups

    def _line(self, pattern: str, of: str, uses: Sequence[Use]) -> FrozenLine:
        rule = uses[0].rule
        styles = {use.rule.style for use in uses}
        if len(styles) > 1:
            raise NotFrozen(f"{pattern} is {' or '.join(sorted(styles))}, by the size or the layer")
        self._check_members(pattern, of, uses)
        return FrozenLine(
            pattern,
            rule.style,
            cut_text(pattern, uses, self.exact),
            local_texts(pattern, uses, self.families, self.exact, parents=False),
            local_texts(pattern, uses, self.families, self.exact, parents=True),
            source=rule.source if self.exact else "frozen",
            reason=_reason(rule.reason),
            of=of,
        )

    def _check_members(self, pattern: str, of: str, uses: Sequence[Use]) -> None:
        """That the pattern names nothing else; of what is inferred, nothing of another kind: what one model has and another
        leaves whole is proven.
        """
        for found in {id(use.found): use.found for use in uses}.values():
            named = {use.name for use in uses if use.found is found}
            kinds = {_kind(found, name) for name in named}
            for name in members(found.model, pattern, of):
                if name not in named and (self.exact or _kind(found, name) not in kinds):
                    raise NotFrozen(f"{pattern}: no rule names {name}")


def _kind(found: Found, name: str, level: int = 0) -> str:
    """The class of what is at `name` without its last `level` segments."""
    return type(_at(found, name.rsplit(".", level)[0])).__name__


def _at(found: Found, name: str) -> object:
    at: object = found.model
    for part in name.split("."):
        at = getattr(at, part, None)
    return at


def _true_of(uses: Sequence[Use]) -> list[str]:
    """The attributes that are true, or not 0, of all modules."""
    modules = [at for use in uses if isinstance(at := _at(use.found, use.name), nn.Module)]
    named = [{name for name, value in vars(m).items() if isinstance(value, bool | int | float) and value} for m in modules]
    return sorted(set.intersection(*named)) if len(named) == len(uses) else []


def _reason(text: str) -> str:
    """Without the numbers of one model."""
    return " ".join("so many" if word.isdigit() else word for word in text.split(" "))
