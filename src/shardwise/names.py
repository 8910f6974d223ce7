"""Dotted names in a model: the layer that one is in, families of alike ones, and those that a rule matches."""

from __future__ import annotations

import re
from collections.abc import Iterable

from shardwise.spec import Rule


def wildcard(name: str) -> str:
    """`name` with each segment that is a number as `*`: "model.layers.0.mlp.fc1" gives "model.layers.*.mlp.fc1"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def layer_of(name: str) -> str:
    """The path of the layer in which `name` is, up to its first number: "model.layers.3". "" outside of layers."""
    found = re.match(r"(.*?\.)?\d+(?=\.|$)", name)
    return found[0] if found else ""


def join(parent: str, child: str) -> str:
    """The name of `child` in the module called `parent`, which is "" for the model itself."""
    return f"{parent}.{child}" if parent else child


class Names:
    """Names of modules, parameters and buffers, matched once a family of alike layers, not once a layer.

    Args:
        names: dotted names, each once.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._families: dict[str, dict[str, None]] = {}
        for name in names:
            self._families.setdefault(wildcard(name), {})[name] = None

    def families(self) -> list[str]:
        """One name for all that differ in their numbers alone."""
        return list(self._families)

    def matching(self, rule: Rule) -> list[str]:
        """The names that `rule` matches."""
        wanted = rule.pattern.split(".")
        if "*" not in wanted:  # a rule for one layer alone: there may be as many of these as there are layers
            return [rule.pattern] if rule.pattern in self._families.get(wildcard(rule.pattern), {}) else []
        families = (family for family in self._families if _may_match(wanted, family.split(".")))
        return [name for family in families for name in self._families[family] if rule.matches(name)]


def _may_match(wanted: list[str], family: list[str]) -> bool:
    return len(wanted) == len(family) and all("*" in (w, f) or w == f for w, f in zip(wanted, family, strict=True))
