"""Rules of several models of a type, as lines for all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from shardwise.freeze.express import Sample, express
from shardwise.layers.registry import style_named
from shardwise.layout import Block, local_numbers
from shardwise.plan import Line, wildcard
from shardwise.plans.frozen.expand import number
from shardwise.plans.frozen.scope import LENGTH, cut_length
from shardwise.spec import Rule

ENDS = ("embedding_rowwise", "colwise_gather_output")
"""Styles of the ends of a model, outside of its layers, which `hf.rules` knows."""
WORDS = {"split": "", "share": " shared", "whole": " on every rank", "pad": " padded"}


class NotFrozen(Exception):
    """Why the plan of a type can't be kept, in words."""


@dataclass(frozen=True)
class Found:
    """What was inferred of one model.

    Args:
        model: the base model.
        rules: by the name of the module or parameter, relative to it.
        size: on how many ranks.
    """

    model: nn.Module
    rules: Mapping[str, Rule]
    size: int


@dataclass(frozen=True)
class _Use:
    """A rule of a family, where it was found."""

    found: Found
    name: str
    rule: Rule
    length: int | None


def lines(found: Sequence[Found]) -> Iterator[Line]:
    """The rules that all of `found` have, their numbers as expressions. Raises `NotFrozen` where they differ in more."""
    families: dict[str, list[_Use]] = {}
    for one in found:
        for name, rule in one.rules.items():
            if rule.style not in ENDS or "*" in wildcard(name):
                length = cut_length(one.model, name, style_named(rule.style, name)) if rule.cut is not None else None
                families.setdefault(wildcard(name), []).append(_Use(one, name, rule, length))
    for family, uses in _apart(families):
        if kept := _cut_inside(uses):
            yield _with_numbers(_line(family, kept), kept, families)


def _apart(families: Mapping[str, Sequence[_Use]]) -> Iterator[tuple[str, Sequence[_Use]]]:
    """The families, and where members of one are cut in several ways (`ffn.0` and `ffn.2` of a layer), those by themselves."""
    for family, uses in families.items():
        if len({use.rule.style for use in _cut_inside(uses)}) < 2:
            yield family, uses
            continue
        parts: dict[str, list[_Use]] = {}
        for use in uses:
            parts.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", use.name, count=1), []).append(use)
        yield from parts.items()


def _cut_inside(uses: Sequence[_Use]) -> list[_Use]:
    """Those that are cut as part of something that can be computed apart; else those whose outputs are gathered. One model may
    run what another leaves out (cross-attention), and what is large depends on the size.
    """
    inside = [use for use in uses if use.rule.style not in (*ENDS, "replicate")]
    return inside or [use for use in uses if use.rule.style in ENDS]


def _line(family: str, uses: Sequence[_Use]) -> Line:
    if len(styles := {use.rule.style for use in uses}) > 1:
        raise NotFrozen(f"{family} is {' or '.join(sorted(styles))}, by the size or the layer")
    rule = uses[0].rule
    return Line(family, rule.style, _cut(family, uses), source="frozen", reason=_reason(rule.reason))


def _reason(text: str) -> str:
    """Without the numbers of one model."""
    return " ".join("so many" if word.isdigit() else word for word in text.split(" "))


def _cut(family: str, uses: Sequence[_Use]) -> str:
    cuts = [use.rule.cut for use in uses]
    if all(cut is None for cut in cuts):
        return ""
    blocks = [cut.blocks for cut in cuts if cut is not None]
    if len(blocks) < len(cuts) or len({len(one) for one in blocks}) > 1:
        raise NotFrozen(f"{family}: the number of its blocks depends on the size")
    if not blocks[0]:
        units = [cut.unit for cut in cuts if cut is not None]
        words = {cut.spread for cut in cuts if cut is not None}
        if len(words) > 1:
            raise NotFrozen(f"{family}: {' or '.join(sorted(words))}, by the size")
        word = WORDS[words.pop()]
        if set(units) == {1}:
            return f"units of 1{word}"
        return f"{_said(family, uses, [(use.length or 0) // unit for use, unit in zip(uses, units, strict=True)])} units{word}"
    return " | ".join(_block(family, uses, [one[at] for one in blocks]) for at in range(len(blocks[0])))


def _block(family: str, uses: Sequence[_Use], blocks: Sequence[Block]) -> str:
    if len(spreads := {block.spread for block in blocks}) > 1:
        raise NotFrozen(f"{family}: {' or '.join(sorted(spreads))}, by the size")
    word = WORDS[spreads.pop()]
    if all(block.unit == 1 for block in blocks):
        return f"{_said(family, uses, [block.length for block in blocks])}{word}"
    units = _said(family, uses, [block.unit for block in blocks])
    return f"{_said(family, uses, [block.units for block in blocks])} x {units if units.isidentifier() else f'({units})'}{word}"


def _said(family: str, uses: Sequence[_Use], values: Sequence[int]) -> str:
    also = [LENGTH] if all(use.length == value for use, value in zip(uses, values, strict=True)) else []
    found = express([_sample(use, value) for use, value in zip(uses, values, strict=True)], also)
    if found is None:
        raise NotFrozen(f"{family}: nothing of the module or its config says {' or '.join(map(str, dict.fromkeys(values)))}")
    return found


def _sample(use: _Use, value: int) -> Sample:
    return Sample(use.found.model, use.name, use.length, value)


def _with_numbers(line: Line, uses: Sequence[_Use], families: Mapping[str, Sequence[_Use]]) -> Line:
    """With the numbers that become local, each in as many parts as something that is cut below."""
    attributes = {}
    below = [others for family, others in families.items() if family.startswith(f"{line.pattern}.")]
    for name in dict.fromkeys(name for use in uses for name in use.rule.attributes):
        ways = [
            counts for others in below for kind in (_units, _all_units) if (counts := _counts(uses, others, kind)) is not None
        ]
        texts = (
            express([_sample(use, count) for use, count in zip(uses, counts, strict=True)])
            for counts in ways
            if all(_splits(use, name, count) for use, count in zip(uses, counts, strict=True))
        )
        text = next((text for text in texts if text is not None), None)
        if text is None:
            raise NotFrozen(f"{line.pattern}: nothing says into how many parts its {name} falls")
        attributes[name] = f"{_made_up(line.pattern, uses, name)}in {text} parts"
    return replace(line, attributes=attributes)


def _made_up(family: str, uses: Sequence[_Use], name: str) -> str:
    """What a number is, in words, where it is none of the module's."""
    if all(number(use.found.model.get_submodule(use.name), name) is not None for use in uses):
        return ""
    return f"{_said(family, uses, [_whole(use, name) for use in uses])} "


def _counts(uses: Sequence[_Use], others: Sequence[_Use], count: Callable[[_Use], int]) -> list[int] | None:
    """Into how many parts what is cut below each of `uses` falls; None where there is nothing, or parts of several sizes."""
    found: list[int] = []
    for use in uses:
        below = (o for o in others if o.found is use.found and o.name.startswith(f"{use.name}.") and o.rule.cut is not None)
        here = {count(other) for other in below}
        if len(here) != 1:
            return None
        found += here
    return found


def _units(use: _Use) -> int:
    assert use.rule.cut is not None
    blocks = [block.units for block in use.rule.cut.blocks if block.spread != "whole"]
    return max(blocks, default=(use.length or 0) // use.rule.cut.unit)


def _all_units(use: _Use) -> int:
    assert use.rule.cut is not None
    return sum(block.units for block in use.rule.cut.blocks if block.spread != "whole") or _units(use)


def _splits(use: _Use, name: str, count: int) -> bool:
    values = use.rule.attributes.get(name)
    whole = _whole(use, name)
    return (
        values is not None
        and count >= use.found.size
        and whole % count == 0
        and values == local_numbers(whole, count, use.found.size)
    )


def _whole(use: _Use, name: str) -> int:
    """What a number is in one process: of the module, or of what a style has made up, the sum."""
    known = number(use.found.model.get_submodule(use.name), name)
    return known if known is not None else sum(use.rule.attributes.get(name, ()))
