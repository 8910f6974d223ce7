"""Numbers as expressions of names: the shortest that has the right value everywhere it was looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations

from torch import nn

from shardwise.notation import evaluate
from shardwise.plans.frozen.scope import LENGTH, around, integer, lookup

_FACTORS = (2, 3, 4)
_MOST = 40


@dataclass(frozen=True)
class Sample:
    """A number that is to be expressed, in one model.

    Args:
        model: the base model.
        name: the module or parameter whose rule it is for.
        length: indices along the dim that is cut.
        value: the number.
    """

    model: nn.Module
    name: str
    length: int | None
    value: int


def express(samples: Sequence[Sample], also: Sequence[str] = ()) -> str | None:
    """An expression with the right value in each of `samples`; None where there is none, or where all say the same number (a
    constant, which names could meet by accident).
    """
    if len({sample.value for sample in samples}) == 1:
        return None
    for text in _candidates(samples[0], also):
        if all(_holds(text, sample) for sample in samples):
            return text
    return None


def _holds(text: str, sample: Sample) -> bool:
    try:
        return evaluate(text, lookup(sample.model, sample.name, sample.length)) == sample.value
    except ValueError:
        return False


def _candidates(sample: Sample, also: Sequence[str]) -> Iterator[str]:
    """Expressions that may be meant, the shortest first."""
    names = [*also, *_names(sample)][:_MOST]
    yield from names
    for name in names:
        yield from (f"{factor} * {name}" for factor in _FACTORS)
        yield from (f"{name} / {factor}" for factor in _FACTORS)
    yield from (f"{a} / {b}" for a, b in permutations(names, 2))
    yield from (f"{a} * {b}" for a, b in combinations_with_replacement(names, 2))
    if sample.length is not None:
        yield from (f"{LENGTH} / {name}" for name in names)
        yield from (f"{LENGTH} / {factor}" for factor in _FACTORS)
        yield from (f"{LENGTH} / ({factor} * {name})" for factor in _FACTORS for name in names)
    yield from (f"{a} / {b} + {factor}" for a, b in permutations(names, 2) for factor in _FACTORS)
    yield from (f"{a} * {b} / {c}" for a, b, c in permutations(names, 3))


def _names(sample: Sample) -> list[str]:
    """The integers of the modules around, the nearest first, then those of the config."""
    found: dict[str, None] = {}
    modules = list(around(sample.model, sample.name))
    for module in modules:
        numbers = {} if "weight" in module._parameters else vars(module)  # of a product: its own lengths
        found |= {name: None for name, value in numbers.items() if _counts(name, value)}
    config = next((config for module in modules if (config := getattr(module, "config", None)) is not None), None)
    found |= {
        f"config.{name}": None for name, value in (vars(config) if config is not None else {}).items() if _counts(name, value)
    }
    return list(found)


def _counts(name: str, value: object) -> bool:
    return integer(value) and not name.startswith("_") and not name.endswith(("_id", "_idx")) and int(str(value)) > 1
