"""Numbers as expressions of names: the shortest that has the right value everywhere it was looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, permutations

from torch import nn
from transformers import PreTrainedConfig

from shardwise.plans.frozen.scope import LENGTH, around, integer, lookup

_FACTORS = (2, 3, 4)
_MOST = 40

Values = tuple[int | None, ...]
"""Of an expression, in each sample; None where it has none."""


@dataclass(frozen=True)
class Sample:
    """A place in one model where a number stands that is to be expressed.

    Args:
        model: the base model.
        name: the module or parameter whose rule it is for.
        length: indices along the dim that is cut.
    """

    model: nn.Module
    name: str
    length: int | None


def express(samples: Sequence[Sample], values: Sequence[int], also: Sequence[str] = ()) -> str | None:
    """An expression whose value is `values[i]` at `samples[i]`; None where there is none, or where all are the same number (a
    constant, which names could meet by accident).

    Args:
        also: names that are tried before those of the modules around, and of the config.
    """
    wanted = tuple(values)
    return None if len(set(wanted)) == 1 else matching(samples, wanted.__eq__, also)


def matching(samples: Sequence[Sample], fits: Callable[[Values], bool], also: Sequence[str] = ()) -> str | None:
    """The shortest expression whose values at `samples` are such that `fits`; None where there is none."""
    return next((text for text, values in _candidates(samples, also) if fits(values)), None)


def _candidates(samples: Sequence[Sample], also: Sequence[str]) -> Iterator[tuple[str, Values]]:
    """Expressions that may be meant, the shortest first."""
    names = {name: _values(name, samples) for name in [*also, *_all_names(samples)][:_MOST]}
    yield from names.items()
    for name, values in names.items():
        yield from ((f"{factor} * {name}", _times(values, factor)) for factor in _FACTORS)
        yield from ((f"{name} / {factor}", _over(values, factor)) for factor in _FACTORS)
    ratios = [(f"{a} / {b}", _by(names[a], names[b])) for a, b in permutations(names, 2)]
    products = {(a, b): _product(names[a], names[b]) for a, b in combinations_with_replacement(names, 2)}
    yield from ratios
    yield from ((f"{a} * {b}", values) for (a, b), values in products.items())
    if samples[0].length is not None:
        yield from _parts_of_length(samples, names)
    yield from ((f"{text} + {factor}", _plus(values, factor)) for text, values in ratios for factor in _FACTORS)
    for a, b, c in permutations(names, 3):
        yield f"{a} * {b} / {c}", _by(products.get((a, b)) or products[b, a], names[c])
    yield from ((f"{a} + {b}", _sum(names[a], names[b])) for a, b in combinations(names, 2))
    yield from ((f"{a} - {b}", _sum(names[a], _times(names[b], -1))) for a, b in permutations(names, 2))


def _parts_of_length(samples: Sequence[Sample], names: Mapping[str, Values]) -> Iterator[tuple[str, Values]]:
    lengths = tuple(sample.length for sample in samples)
    yield from ((f"{LENGTH} / {name}", _by(lengths, values)) for name, values in names.items())
    yield from ((f"{LENGTH} / {factor}", _over(lengths, factor)) for factor in _FACTORS)
    for factor in _FACTORS:
        yield from ((f"{LENGTH} / ({factor} * {name})", _by(lengths, _times(v, factor))) for name, v in names.items())


def _each(rule: Callable[[int, int], int | None], left: Values, right: Values) -> Values:
    return tuple(None if a is None or b is None else rule(a, b) for a, b in zip(left, right, strict=True))


def _by(left: Values, right: Values) -> Values:
    return _each(lambda a, b: a // b if b and a % b == 0 else None, left, right)


def _product(left: Values, right: Values) -> Values:
    return _each(lambda a, b: a * b, left, right)


def _sum(left: Values, right: Values) -> Values:
    return _each(lambda a, b: a + b, left, right)


def _times(values: Values, factor: int) -> Values:
    return tuple(None if value is None else factor * value for value in values)


def _over(values: Values, factor: int) -> Values:
    return _by(values, (factor,) * len(values))


def _plus(values: Values, number: int) -> Values:
    return tuple(None if value is None else value + number for value in values)


def _values(name: str, samples: Sequence[Sample]) -> Values:
    def value(sample: Sample) -> int | None:
        try:
            return lookup(sample.model, sample.name, sample.length)(name)
        except ValueError:
            return None

    return tuple(map(value, samples))


def _all_names(samples: Sequence[Sample]) -> Iterable[str]:
    """Those of the first, and those that count in others."""
    return dict.fromkeys(name for sample in samples for name in _names(sample))


def _names(sample: Sample) -> list[str]:
    """The integers of the modules around, the nearest first, then those of the config, and of the configs in it."""
    found: dict[str, None] = {}
    modules = list(around(sample.model, sample.name))
    for module in modules:
        numbers = {} if "weight" in module._parameters else vars(module)  # of a product: its own lengths
        found |= {name: None for name, value in numbers.items() if _counts(name, value)}
    config = next((config for module in modules if (config := getattr(module, "config", None)) is not None), None)
    return [*found, *_fields(config)]


def _fields(config: object, prefix: str = "config.") -> Iterable[str]:
    numbers = config if isinstance(config, Mapping) else vars(config) if config is not None else {}
    found = [f"{prefix}{name}" for name, value in numbers.items() if _counts(name, value)]
    inside = {name: value for name, value in numbers.items() if isinstance(value, PreTrainedConfig)}
    return [*found, *(field for name, value in inside.items() for field in _fields(value, f"{prefix}{name}."))]


def _counts(name: str, value: object) -> bool:
    return integer(value) and not name.startswith("_") and not name.endswith(("_id", "_idx")) and int(str(value)) > 1
