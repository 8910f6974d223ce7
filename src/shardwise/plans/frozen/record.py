"""What a frozen plan says, and how it is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shardwise.plan import Line

Names = Mapping[str, tuple[str, ...]]
NUMBER = '"a number"'


@dataclass(frozen=True)
class FrozenLine(Line):
    """A rule of a frozen plan: its cut and numbers are expressions; numbers as "in num_heads parts".

    Args:
        of: where not all that the pattern matches is meant: the class of the module, or of one around it; or an attribute of
            it that is true, or not 0.
    """

    of: str = ""


@dataclass(frozen=True)
class Variant:
    """The rules for some options of a type, relative to its base model.

    Args:
        options: for each option of the config, the values with which the rules were proven, as JSON; `NUMBER` for any number.
        modules: for each family of modules that a rule reaches into, their classes.
        matrices: the families of parameters of several dims that were there; of another one in the layers nothing is known.
        rules: the rules.
        head: of a file that is only read: those outside of the base model, by their names in the causal LM.
    """

    options: Names
    modules: Names
    matrices: tuple[str, ...]
    rules: tuple[FrozenLine, ...]
    head: tuple[FrozenLine, ...] = ()


@dataclass(frozen=True)
class Frozen:
    """What is kept of a type.

    Args:
        type: transformers' name.
        cut: the share of the parameters that was cut in the model that it was made from.
        own: the share that the plan cuts that the type brings, with our corrections; None where there is none that can be used.
        why: why `auto` uses this one in its place; "" where it does not, and the file is there to be read.
        variants: for different options.
    """

    type: str
    cut: float
    own: float | None
    why: str
    variants: tuple[Variant, ...]

    def to_json(self) -> str:
        """The file: a line for each option, class and rule."""
        variants = ",\n ".join(map(_written, self.variants))
        facts = json.dumps({"type": self.type, "cut": self.cut, "own": self.own, "why": self.why})
        return f'{facts[:-1]},\n "variants": [\n {variants}\n]}}\n'

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Frozen:
        """The inverse of `to_json`, of what the file holds."""
        variants = tuple(
            Variant(
                {name: tuple(map(json.dumps, values)) for name, values in one.get("options", {}).items()}
                | dict.fromkeys(one.get("numbers", ()), (NUMBER,)),
                {name: tuple(values) for name, values in one.get("modules", {}).items()},
                tuple(one.get("matrices", ())),
                *(
                    tuple(FrozenLine(**{"source": "frozen", **rule}) for rule in one.get(part, ()))
                    for part in ("rules", "head")
                ),
            )
            for one in given["variants"]
        )
        return cls(given["type"], given["cut"], given["own"], given["why"], variants)


def _lines(given: Iterable[Mapping[str, Any]]) -> tuple[FrozenLine, ...]:
    return tuple(FrozenLine(**{"source": "frozen", **rule}) for rule in given)


def _written(variant: Variant) -> str:
    numbers = [name for name, values in variant.options.items() if values == (NUMBER,)]
    options = {name: list(map(json.loads, values)) for name, values in variant.options.items() if values != (NUMBER,)}
    parts = {
        "options": _braced("{}", (f"{json.dumps(name)}: {json.dumps(values)}" for name, values in options.items())),
        "numbers": json.dumps(numbers) if numbers else "",
        "modules": _braced("{}", (f"{json.dumps(name)}: {json.dumps(kinds)}" for name, kinds in variant.modules.items())),
        "matrices": _braced("[]", map(json.dumps, variant.matrices)),
        "rules": _braced("[]", map(_rule, variant.rules)),
        "head": _braced("[]", map(_rule, variant.head)),
    }
    kept = {name: text for name, text in parts.items() if name == "rules" or text not in ("", "{}", "[]")}
    return "{" + ",\n  ".join(f'"{name}": {text}' for name, text in kept.items()) + "}"


def _braced(braces: str, lines: Iterable[str]) -> str:
    inside = ",\n   ".join(lines)
    return f"{braces[0]}\n   {inside}\n  {braces[1]}" if inside else braces


def _rule(line: Line) -> str:
    given = json.loads(line.to_json())
    if given["source"] == "frozen":
        del given["source"]
    return json.dumps(given)
