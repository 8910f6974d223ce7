"""What plans are tried out on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shardwise.errors import PlanError, describe
from shardwise.hf import LARGE_MODEL, LARGE_WEIGHT, Feed, elements, in_training, layer_kinds, sample_feeds, specimens
from shardwise.infer.feeds import floats
from shardwise.infer.given import Given
from shardwise.infer.values import randomise, with_values

_SHORT = 4
_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Subject:
    """What plans are tried out on.

    Args:
        model: with random weights where the model's are on meta or constant, in evaluation mode; of a large one, large weights
            are on meta.
        feeds: what it is called with, one micro-batch after the other.
        short: as the first of them, as short as may be.
        words: what it is, beside the model that plans are for.
    """

    model: nn.Module
    feeds: Sequence[Feed]
    short: Feed
    words: str


def subject(
    model: nn.Module,
    example_inputs: Feed | Sequence[Feed] | None,
    kinds: Mapping[str, Hashable] = MappingProxyType({}),
    picked: bool = False,
) -> Subject:
    """What to try plans for `model` out on, whose layers also differ by `kinds`, by their paths; if `picked`, its layers may
    have other numbers than there.

    Of a transformers model it is another one of the same config, of a large one the first layers of it; of any other, and of
    one that is not as its config says, the model itself. Raises `PlanError` where inputs are missing, or weights.
    """
    tries = specimens(model, kinds, picked)
    made: nn.Module | None = next(tries, None)
    if made is None and any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError(f"{type(model).__name__} is on meta, and no config says how it is made: build it on the CPU.")
    feeds_of: Callable[[Any], Sequence[Feed]] = sample_feeds
    if example_inputs is not None:
        given = [example_inputs] if isinstance(example_inputs, Mapping) or callable(example_inputs) else list(example_inputs)
        made, feeds_of = made if made is not None else model, lambda _: [_plain(feed) for feed in given]
    if made is None:
        raise PlanError(
            describe(
                f"{type(model).__name__} is not what a config of transformers makes: its inputs have to be said.",
                either=['shardwise.infer_plan(model, tp_size=..., example_inputs={"x": ...}), and parallelize with that plan'],
            )
        )
    while True:
        try:
            return _subject(made, feeds_of, model)
        except Exception:  # whatever code says that looks for a layer which is not there
            made = next(tries, None)
            if made is None:
                raise


def _subject(made: _Model, feeds_of: Callable[[_Model], Sequence[Feed]], model: nn.Module) -> Subject:
    tried = randomise(made)

    def feeds() -> Sequence[Feed]:
        with Given(dict(tried.named_parameters())):
            found = feeds_of(tried)
        with torch.no_grad():
            floats(tried, found[0])
        return found

    found = with_values(tried, feeds) if any(parameter.is_meta for parameter in tried.parameters()) else feeds_of(tried)
    found = _with_training(tried, found)
    return Subject(tried, found, _short(found[0]) if elements(model) > LARGE_MODEL else found[0], _words(tried, model))


def _with_training(model: nn.Module, feeds: Sequence[Feed]) -> Sequence[Feed]:
    """`feeds`, the second of which is called as in training, but for dropout; of one alone, that besides, where something else
    comes of it. They are left as they are where what comes of it changes from call to call, or changes the model.
    """
    plain = [number for number, feed in enumerate(feeds) if not callable(feed)]
    if not plain:
        return feeds
    number = plain[:2][-1]
    trained = in_training(feeds[number])  # type: ignore[arg-type]  # is none that is called
    before = [buffer._version for buffer in model.buffers()]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, second = floats(model, trained), floats(model, trained)
            evaluated = floats(model, feeds[number])
    except Exception:  # whatever a model's code says that is not made to be trained
        return feeds
    if not _same(first, second) or before != [buffer._version for buffer in model.buffers()]:
        return feeds
    if len(plain) > 1:
        return [trained if at == number else feed for at, feed in enumerate(feeds)]
    return feeds if _same(first, evaluated) else [*feeds, trained]


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def _short(feed: Feed) -> Feed:
    """A few tokens of one sequence: where that is not what `feed` has, `feed` itself."""
    if callable(feed) or not all(_is_ids(given) for given in feed.values()):
        return feed
    return {name: given[:1, :_SHORT] for name, given in feed.items()}


def _is_ids(given: object) -> bool:
    return isinstance(given, Tensor) and given.dim() == 2 and not given.is_floating_point()


def _words(tried: nn.Module, model: nn.Module) -> str:
    """How what is tried out differs from `model`."""
    all_layers, layers = (sum(1 for layer in layer_kinds(one) if layer) for one in (model, tried))
    some = f"{layers} of {all_layers} layers" if layers < all_layers else "the whole model"
    if elements(model) <= LARGE_MODEL:
        return some
    return f"{some} at full width; outputs of products with weights of {LARGE_WEIGHT:,} elements or more are given"


def _plain(feed: Feed) -> Feed:
    """Numbers on the CPU and in float32, as the model is tried out there."""
    if callable(feed):
        return feed
    return {name: _plain_value(value) for name, value in feed.items()}


def _plain_value(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.float().cpu() if value.is_floating_point() else value.cpu()
