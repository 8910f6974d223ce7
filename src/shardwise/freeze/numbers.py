"""The numbers in rules of several models as text that holds for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from shardwise.freeze.express import Values, express, matching
from shardwise.freeze.found import Families, NotFrozen, Use
from shardwise.layers import ALIGNED
from shardwise.layout import Block, local_numbers
from shardwise.plans.frozen.expand import number
from shardwise.plans.frozen.scope import LENGTH

WORDS = {"split": "", "share": " shared", "whole": " on every rank", "pad": " padded"}


def cut_text(family: str, uses: Sequence[Use], literals: bool) -> str:
    """The cut of a family, "" where its style says it. Raises `NotFrozen` where `uses` differ in more than numbers.

    Args:
        literals: whether a number that is the same in all of them may stand there as it is.
    """
    cuts = [use.rule.cut for use in uses if use.rule.cut is not None]
    if not cuts:
        return ""
    if len(cuts) < len(uses) or len({(cut.dim, bool(cut.blocks)) for cut in cuts}) > 1:
        raise NotFrozen(f"{family} is cut in several ways")
    writer = _Writer(family, uses, literals)
    along = "" if cuts[0].dim is None else f"dim {cuts[0].dim}: "
    return along + (writer.blocks([cut.blocks for cut in cuts]) if cuts[0].blocks else writer.units())


class _Writer:
    def __init__(self, family: str, uses: Sequence[Use], literals: bool) -> None:
        self.family, self.uses, self.literals = family, uses, literals

    def units(self) -> str:
        cuts = [use.rule.cut for use in self.uses if use.rule.cut is not None]
        word = self.word([cut.spread for cut in cuts])
        if all(cut.unit == 1 for cut in cuts):
            return f"units of 1{word}"
        units = [cut.unit for cut in cuts]
        counts = [(use.length or 0) // unit for use, unit in zip(self.uses, units, strict=True)]
        if self.aligned(units) or (self.is_constant(units) and len(set(counts)) > 1 and self.expressed(counts) is None):
            return f"units of {units[0]}{word}"
        return f"{self.said(counts)} units{word}"

    def blocks(self, blocks: Sequence[Sequence[Block]]) -> str:
        counts = list(map(len, blocks))
        alike = all(len(set(one)) == 1 for one in blocks)
        if len(set(counts)) > 1 or (alike and counts[0] > len(WORDS)):
            if not alike:
                raise NotFrozen(f"{self.family}: the number of its blocks depends on the size")
            return f"{self.said(counts)} times {self.block([one[0] for one in blocks])}"
        return " | ".join(self.block([one[at] for one in blocks]) for at in range(counts[0]))

    def block(self, blocks: Sequence[Block]) -> str:
        word = self.word([block.spread for block in blocks])
        if all(block.unit == 1 for block in blocks):
            return f"{self.said([block.length for block in blocks])}{word}"
        if self.aligned([block.unit for block in blocks]):
            return f"{_bracketed(self.said([block.length for block in blocks]))} / {ALIGNED} x {ALIGNED}{word}"
        units = _bracketed(self.said([block.unit for block in blocks]))
        return f"{self.said([block.units for block in blocks])} x {units}{word}"

    def word(self, spreads: Sequence[str]) -> str:
        if len(set(spreads)) > 1:
            raise NotFrozen(f"{self.family}: {' or '.join(sorted(set(spreads)))}, by the size")
        return WORDS[spreads[0]]

    def is_constant(self, values: Sequence[int]) -> bool:
        """Whether a number may stand there as it is."""
        return self.literals and len(set(values)) == 1

    def aligned(self, units: Sequence[int]) -> bool:
        """Whether these are rows of stacked experts, which inference cuts so."""
        return not self.literals and set(units) == {ALIGNED}

    def expressed(self, values: Sequence[int]) -> str | None:
        also = [LENGTH] if all(use.length == value for use, value in zip(self.uses, values, strict=True)) else []
        return express([use.sample for use in self.uses], values, also)

    def said(self, values: Sequence[int]) -> str:
        text = self.expressed(values)
        if text is None and self.is_constant(values):
            return str(values[0])
        if text is None:
            wanted = " or ".join(map(str, dict.fromkeys(values)))
            raise NotFrozen(f"{self.family}: nothing of the module or its config says {wanted}")
        return text


def _bracketed(text: str) -> str:
    return text if text.isidentifier() or text.isdigit() else f"({text})"


def local_texts(family: str, uses: Sequence[Use], families: Families, literals: bool, parents: bool) -> dict[str, str]:
    """The numbers that become local, of the modules or of the `parents` around them, each in as many parts as something that
    is cut below. Raises `NotFrozen` where nothing says in how many.
    """
    texts: dict[str, str] = {}
    for name in dict.fromkeys(name for use in uses for name in _numbers(use, parents)):
        places = [_Place(use, use.name.rpartition(".")[0] if parents else use.name, name, parents) for use in uses]
        if literals and all(place.unchanged for place in places):
            continue
        text = (_in_own_parts(places) if literals else None) or _in_parts(places, families)
        text = text or (_in_any_parts(places) if literals else None)
        if text is None:
            raise NotFrozen(f"{family}: nothing says into how many parts its {name} falls")
        made_up = not all(place.known is not None for place in places)
        said = f"{_Writer(family, uses, literals).said([place.whole for place in places])} " if made_up else ""
        texts[name] = f"{said}in {text} parts"
    return texts


def _numbers(use: Use, parents: bool) -> Mapping[str, tuple[int, ...]]:
    return use.rule.parent_attributes if parents else use.rule.attributes


class _Place:
    """A number of one module that becomes local."""

    def __init__(self, use: Use, module: str, name: str, parents: bool) -> None:
        self.use, self.module, self.size = use, module, use.found.size
        self.values = _numbers(use, parents).get(name)
        self.known = number(use.found.model.get_submodule(module), name)
        self.whole = self.known if self.known is not None else sum(self.values or ())

    @property
    def unchanged(self) -> bool:
        return self.values is None or set(self.values) == {self.known}

    def splits(self, count: int | None) -> bool:
        if count is None or self.values is None or count < self.size or self.whole % count:
            return False
        return self.values == local_numbers(self.whole, count, self.size)


def _in_parts(places: Sequence[_Place], families: Families) -> str | None:
    inside = f"{places[0].module}."
    below = [others for others in families.values() if any(other.name.startswith(inside) for other in others)]
    for others in below:
        for kind in (_units, _all_units):
            counts = _counts(places, others, kind)
            text = _in_so_many(places, counts) if counts is not None else None
            if text is not None:
                return text
    return None


def _in_own_parts(places: Sequence[_Place]) -> str | None:
    """As the weights of the module itself."""
    if any(place.use.rule.cut is None for place in places):
        return None
    return _in_so_many(places, [_units(place.use) for place in places])


def _in_so_many(places: Sequence[_Place], counts: Sequence[int]) -> str | None:
    if not all(place.splits(count) for place, count in zip(places, counts, strict=True)):
        return None
    return express([place.use.sample for place in places], counts)


def _in_any_parts(places: Sequence[_Place]) -> str | None:
    def fits(values: Values) -> bool:
        return all(place.splits(value) for place, value in zip(places, values, strict=True))

    return matching([place.use.sample for place in places], fits)


def _counts(places: Sequence[_Place], others: Sequence[Use], count: Callable[[Use], int]) -> list[int] | None:
    """Into how many parts what is cut below each of `places` falls; None where there is nothing, or parts of several sizes."""
    found: list[int] = []
    for place in places:
        inside = (o for o in others if o.found is place.use.found and o.name.startswith(f"{place.module}."))
        here = {count(other) for other in inside if other.rule.cut is not None}
        if len(here) != 1:
            return None
        found += here
    return found


def _units(use: Use) -> int:
    assert use.rule.cut is not None
    blocks = [block.units for block in use.rule.cut.blocks if block.spread != "whole"]
    return max(blocks, default=(use.length or 0) // use.rule.cut.unit)


def _all_units(use: Use) -> int:
    assert use.rule.cut is not None
    return sum(block.units for block in use.rule.cut.blocks if block.spread != "whole") or _units(use)
