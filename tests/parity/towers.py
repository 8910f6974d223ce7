"""How a line of the tables of wrappers looks, and what the towers are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

FOUR, ONE = (5,) * 4, (5,)
"""Placeholders of an image: a token for each of its patches, or for the four together."""
PATCH = 3 * 14 * 14
SIGLIP = {"vision_config": ("siglip_vision_model", {"vision_use_head": False})}
CLIP = {"vision_config": ("clip_vision_model", {})}

Features = Callable[[Tensor, torch.Generator], dict[str, Tensor]]
"""The inputs of a batch beside its ids, which it is given, (2, sequence) int64."""


@dataclass(frozen=True)
class Wrapper:
    """A type with towers around a text model.

    Args:
        text: the text model's type.
        towers: the types of the towers, and what they need besides `wrappers.TOWER`, by their name in the config.
        placeholders: the ids that stand in each row for what a tower gives.
        features: makes the towers' inputs.
        options: what the wrapper's config needs besides.
        text_options: what the text model's needs besides.
        auto: the Auto class.
        filled: what the wrapper's default config leaves open.
        reads_text: it takes text alone; else the second micro-batch has features too.
    """

    text: str
    towers: Mapping[str, tuple[str, Mapping[str, object]]]
    placeholders: tuple[int, ...]
    features: Features
    options: Mapping[str, object] = field(default_factory=dict)
    text_options: Mapping[str, object] = field(default_factory=dict)
    auto: str = "AutoModelForImageTextToText"
    filled: Mapping[str, object] = field(default_factory=dict)
    reads_text: bool = True

    @property
    def reads(self) -> str:
        """What the tower is given, in a word."""
        known = {5: "image", 6: "video", 7: "audio"}
        return ", ".join(word for token, word in known.items() if token in self.placeholders) or "text only"


def feed(types: str = "", **inputs: tuple[int, ...] | list[object]) -> Features:
    """Makes these inputs: random numbers of a shape, or the integers in a list.

    Args:
        types: the name of an input that says of each token whether it is text, 0, or a placeholder, 1.
        inputs: by name.
    """

    def made(ids: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        said = {types: ((ids >= 5) & (ids < 8)).long()} if types else {}
        return said | {
            name: torch.randn(given, generator=draw) if isinstance(given, tuple) else torch.tensor(given)
            for name, given in inputs.items()
        }

    return made
