"""What rules name that are there already: the rest is inferred."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from shardwise.names import Names
from shardwise.spec import Rule


@dataclass(frozen=True)
class Named:
    """Rules that hold whatever is inferred.

    Args:
        rules: their patterns may match nothing.
        names: the modules and parameters that they match, of tied ones all.
    """

    rules: tuple[Rule, ...] = ()
    names: frozenset[str] = frozenset()

    @classmethod
    def by(cls, rules: Sequence[Rule], model: nn.Module) -> Named:
        """By `rules`, in `model`."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        known = Names(dict.fromkeys([*(name for name, _ in model.named_modules(remove_duplicate=False)), *parameters]))
        hits = {name for rule in rules for name in known.matching(rule)}
        tensors = {id(p) for name, p in parameters.items() if name in hits or name.rpartition(".")[0] in hits}
        tied = {name for name, parameter in parameters.items() if id(parameter) in tensors}
        return cls(tuple(rules), frozenset(hits | tied))

    def touches(self, matrices: Iterable[str]) -> bool:
        """Whether a rule names one of `matrices`: modules or parameters."""
        return any(name in self.names or f"{name}.weight" in self.names for name in matrices)
