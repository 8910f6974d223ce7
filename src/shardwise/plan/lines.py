"""A plan as text that people read and edit: a line of JSON for each rule, alike layers in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import TYPE_CHECKING

from shardwise.names import wildcard
from shardwise.notation import write_cut, write_local
from shardwise.spec import Rule, ShardSpec, Source

if TYPE_CHECKING:
    from shardwise.plan.table import Plan

UNNAMED = "no rule names it"


@dataclass(frozen=True)
class Line:
    """A rule of a file; everything but the first two may be left out.

    Args:
        pattern: as in `Rule`; "{0-3,7}" for some numbers of a segment.
        style: the style's name.
        cut: see `shardwise.notation`.
        attributes: numbers of the module that become local, as "6, 6 of 12".
        parent_attributes: the same of its parent.
        shape: the full shape of the parameter, or of the module's weight, as "768 x 3072". Another one is an error.
        source: as in `Rule`; whoever edits a file need not say.
        reason: why the rule is there.
    """

    pattern: str
    style: str
    cut: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    parent_attributes: Mapping[str, str] = field(default_factory=dict)
    shape: str = ""
    source: Source = "user"
    reason: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps({name: value for name, value in asdict(self).items() if value}, ensure_ascii=False)

    @classmethod
    def fault(cls, given: object) -> str | None:
        """What is wrong with an entry of a file, in words; None where `Line(**given)` is one."""
        if not isinstance(given, dict) or not {"pattern", "style"} <= given.keys():
            return 'not an object with "pattern" and "style"'
        known = {one.name: Mapping if "attributes" in one.name else str for one in fields(cls)}
        if strange := [name for name in given if name not in known]:
            return f"{strange[0]!r} means nothing; known: {', '.join(known)}"
        wrong = next((name for name, value in given.items() if not isinstance(value, known[name])), None)
        return f"{wrong!r} is of another kind: {given[wrong]!r}" if wrong is not None else None


def to_json(plan: Plan) -> str:
    """The whole file."""
    lines = ",\n  ".join(line.to_json() for line in lines_of(plan))
    experts = f'"ep": {plan.ep_size}, ' if plan.ep_size != plan.size else ""
    return f'{{"tp": {plan.size}, {experts}"rules": [\n  {lines}\n]}}\n'


def lines_of(plan: Plan) -> list[Line]:
    """The rules that hold in `plan`, the user's last; and the matrices that none names, from here on whole on purpose."""
    families = _families(plan)
    found: dict[tuple[str, str], list[str]] = {}
    lines: dict[tuple[str, str], Line] = {}
    for name, rule in (*plan.rules.items(), *_unnamed(plan)):
        if rule.matches(name):  # else it holds because a module around it is kept whole, whose own line says so
            line = _line(plan, rule, name)
            key = (wildcard(name), repr(line))
            found.setdefault(key, []).append(name)
            lines[key] = line
    made = [
        Line(**{**vars(line), "pattern": pattern})
        for key, line in lines.items()
        for pattern in patterns(found[key], families[key[0]])
    ]
    return sorted(made, key=lambda line: line.source == "user")


def _line(plan: Plan, rule: Rule, name: str) -> Line:
    row = plan.get(name) or plan.get(f"{name}.weight")
    shape = " x ".join(map(str, row.shape)) if row is not None else ""
    return Line(
        "",
        rule.style,
        write_cut(rule.cut) if rule.cut is not None else "",
        _numbers(plan, rule.attributes, name),
        _numbers(plan, rule.parent_attributes, name.rpartition(".")[0]),
        shape,
        rule.source,
        rule.reason,
    )


def _numbers(plan: Plan, attributes: Mapping[str, Sequence[int]], module: str) -> dict[str, str]:
    whole = next((row.whole for row in plan.modules if row.name == module), {}) if attributes else {}
    return {key: write_local(values, whole.get(key, values[0])) for key, values in attributes.items()}


def _unnamed(plan: Plan) -> Iterator[tuple[str, Rule]]:
    for row in plan.tensors:
        if row.rule is None and not row.buffer and len(row.shape) > 1:
            yield row.name, Rule(row.name, "replicate", "shardwise", reason=UNNAMED)


def _families(plan: Plan) -> dict[str, set[str]]:
    """All names that differ in their numbers alone, of tensors and the modules around them."""
    found: dict[str, set[str]] = {}
    for name in {*_around(plan.tensors), *(row.name for row in plan.modules), *plan.rules}:
        found.setdefault(wildcard(name), set()).add(name)
    return found


def _around(rows: Iterable[ShardSpec]) -> Iterator[str]:
    for row in rows:
        for name in (row.name, *row.aliases):
            while name:
                yield name
                name = name.rpartition(".")[0]


def patterns(names: Sequence[str], family: set[str]) -> list[str]:
    """As few patterns as name these members of a family and no other."""
    if set(names) == family:
        return [wildcard(names[0])]
    segments = list(zip(*(name.split(".") for name in names), strict=True))
    found = [list(dict.fromkeys(here)) for here in segments]
    if prod(map(len, found)) != len(set(names)):
        return list(names)
    return [".".join(here[0] if len(here) == 1 else f"{{{_ranges(sorted(map(int, here)))}}}" for here in found)]


def expand(pattern: str) -> list[str]:
    """The patterns that one with "{0-3,7}" stands for. Raises `ValueError` for braces with something else."""
    found = re.search(r"\{([^}]*)\}", pattern)
    if found is None:
        return [pattern]
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", found[1].replace(" ", "")):
        raise ValueError(f"{pattern!r}: braces hold numbers, as in {{0-3,7}}")
    ends = [part.split("-") for part in found[1].replace(" ", "").split(",")]
    numbers = [number for first, *last in ends for number in range(int(first), int(last[0] if last else first) + 1)]
    return [name for n in numbers for name in expand(pattern[: found.start()] + str(n) + pattern[found.end() :])]


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
