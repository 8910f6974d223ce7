"""The table of wrappers: which text model, which towers, and what the towers are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    """

    text: str
    towers: Mapping[str, tuple[str, Mapping[str, object]]]
    placeholders: tuple[int, ...]
    features: Features
    options: Mapping[str, object] = field(default_factory=dict)
    text_options: Mapping[str, object] = field(default_factory=dict)
    auto: str = "AutoModelForImageTextToText"
    filled: Mapping[str, object] = field(default_factory=dict)

    @property
    def reads(self) -> str:
        """What the tower is given, in a word."""
        known = {5: "image", 6: "video", 7: "audio"}
        return ", ".join(word for token, word in known.items() if token in self.placeholders) or "text only"


def pixels(ids: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """An image of 28 x 28 for each row."""
    return {"pixel_values": torch.randn(2, 3, 28, 28, generator=draw)}


def typed_pixels(ids: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """As `pixels`; which tokens are the image's is said besides."""
    return pixels(ids, draw) | {"token_type_ids": (ids == 5).long()}


def patches(ids: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """For each row an image of 4 x 4 patches of 14 x 14, each doubled in time."""
    return {
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 14 * 14, generator=draw),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == 5).long(),
    }


FOUR = (5,) * 4
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
SIGLIP = {"vision_config": ("siglip_vision_model", {"vision_use_head": False})}
CLIP = {"vision_config": ("clip_vision_model", {})}

DEEPSTACK = {"vision_config": ("qwen3_vl_vision", {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]})}

WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper("gemma3_text", SIGLIP, FOUR, typed_pixels, {"mm_tokens_per_image": 4}),
    "llava": Wrapper("llama", CLIP, FOUR, pixels, {"vision_feature_layer": -1}),
    "qwen2_vl": Wrapper(
        "qwen2_vl_text", {"vision_config": ("qwen2_vl_vision", {"hidden_size": 64})}, FOUR, patches, text_options=MROPE
    ),
    "qwen3_vl": Wrapper("qwen3_vl_text", DEEPSTACK, FOUR, patches, text_options=MROPE),
}
