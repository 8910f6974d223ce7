"""A frozen plan's rules for one model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from shardwise.layers.registry import style_named
from shardwise.layout import local_numbers
from shardwise.names import Names
from shardwise.notation import Lookup, cut_dim, evaluate, read_cut
from shardwise.plans.frozen.record import FrozenLine, Variant
from shardwise.plans.frozen.scope import around, cut_length, lookup
from shardwise.spec import Rule


def expand_rules(variant: Variant, model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The rules for `model`, the base model, whose names start with `prefix`, on `size` ranks.

    Raises `ValueError` where an expression has no value here.
    """
    return expand_lines(variant.rules, model, prefix, size)


def expand_lines(lines: Sequence[FrozenLine], model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The same of lines whose patterns are relative to `model`."""
    names = names_in(model)
    return [_rule(line, model, name, prefix, size) for line in lines for name in members(model, line.pattern, line.of, names)]


def names_in(model: nn.Module) -> Names:
    """What rules can name."""
    parts = (model.named_modules, model.named_parameters, model.named_buffers)
    return Names(dict.fromkeys(name for named in parts for name, _ in named(remove_duplicate=False)))


def members(model: nn.Module, pattern: str, of: str, names: Names | None = None) -> list[str]:
    """What a line with this pattern and this `of` is for."""
    named = (names or names_in(model)).matching(Rule(pattern, "", "frozen"))
    return [name for name in named if not of or any(_is(module, of) for module in around(model, name))]


def _is(module: nn.Module, of: str) -> bool:
    return type(module).__name__ == of or bool(vars(module).get(of))


def _rule(line: FrozenLine, model: nn.Module, name: str, prefix: str, size: int) -> Rule:
    length = cut_length(model, name, style_named(line.style, line.pattern), cut_dim(line.cut)) if line.cut else None
    numbers = lookup(model, name, length)
    cut = read_cut(line.cut, length, numbers) if line.cut else None
    here, *outside = around(model, name)
    attributes = {key: _local(here, key, text, numbers, size) for key, text in line.attributes.items()}
    parents = {key: _local(outside[0], key, text, numbers, size) for key, text in line.parent_attributes.items()}
    return Rule(prefix + name, line.style, line.source, cut, attributes, parents, line.reason)


def parts(text: str) -> tuple[str, str]:
    """The two expressions in "hidden_size in num_heads parts", the first "" where the number is one of the module's. Raises
    `ValueError` for what is not written so.
    """
    found = re.fullmatch(r"(?:(.+) )?in (.+) parts", text)
    if found is None:
        raise ValueError(f"{text!r}: a number falls into so many parts, as in 'in num_heads parts'")
    return found[1] or "", found[2]


def _local(module: nn.Module, name: str, text: str, numbers: Lookup, size: int) -> tuple[int, ...]:
    said, count = parts(text)
    value = evaluate(said, numbers) if said else number(module, name)
    here = evaluate(count, numbers)
    if value is None or here < 1 or value % here:
        raise ValueError(f"{type(module).__name__}.{name} is {value}, which does not fall into {here} parts")
    return local_numbers(value, here, size)


def number(module: nn.Module, name: str) -> int | None:
    """The integer of a module that is called `name`, or "config.NAME"; None where it has none."""
    value: object = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
