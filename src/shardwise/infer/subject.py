"""What plans are tried out on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from shardwise.errors import PlanError, describe
from shardwise.hf import sample_feeds, specimen
from shardwise.infer.simulate import Feed


def subject(model: nn.Module, example_inputs: Feed | Sequence[Feed] | None) -> tuple[nn.Module, list[Feed]]:
    """What to try plans for `model` out on, and its inputs.

    Of a transformers model it is another one of the same config; of any other, and of one that is not as its config says, the
    model itself. Raises `PlanError` where inputs are missing, or weights.
    """
    made = specimen(model)
    if made is None and any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError(f"{type(model).__name__} is on meta, and no config says how it is made: build it on the CPU.")
    if example_inputs is not None:
        given = [example_inputs] if isinstance(example_inputs, Mapping) or callable(example_inputs) else list(example_inputs)
        return made if made is not None else model, [_plain(feed) for feed in given]
    if made is None:
        raise PlanError(
            describe(
                f"{type(model).__name__} is not what a config of transformers makes: its inputs have to be said.",
                either=['shardwise.infer_plan(model, tp_size=..., example_inputs={"x": ...}), and parallelize with that plan'],
            )
        )
    return made, list(sample_feeds(made))


def _plain(feed: Feed) -> Feed:
    """Numbers on the CPU and in float32, as the model is tried out there."""
    if callable(feed):
        return feed
    return {name: _plain_value(value) for name, value in feed.items()}


def _plain_value(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.float().cpu() if value.is_floating_point() else value.cpu()
