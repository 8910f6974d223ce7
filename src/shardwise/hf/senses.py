"""Images and sounds as noise, of the shapes that a config says, and what goes with them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from shardwise.hf.configs import config_parts

Shape = tuple[int, ...]
ROWS = 2
_FRAMES = 48
_SAMPLES = 4_000
_SIDES = (64, 224)
_GRID = 2
_BANDS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
_NAMES = ("pixel_values", "input_features", "input_values")


def sensed(model: PreTrainedModel, generator: torch.Generator) -> Iterator[Mapping[str, Tensor]]:
    """What a model may be given beside or in the place of texts, for two rows, the likeliest first."""
    taken = inspect.signature(model.forward).parameters
    main = model.main_input_name
    names = [main] if main != "input_ids" else [name for name in _NAMES if name in taken]
    for name in names:
        if {"pixel_attention_mask", "spatial_shapes"} <= taken.keys():
            yield from _patches(model, name, generator)
        for shape in dict.fromkeys(_shapes(model, name)):
            yield {name: torch.randn(ROWS, *shape, generator=generator)}


def boxes(ids: Tensor) -> Tensor:
    """Where each of `ids` (rows, tokens) is on its page: (rows, tokens, 4) int64, each box of left, top, right and bottom."""
    corner = torch.arange(ids.numel()).view(*ids.shape, 1) % 16
    return torch.cat([corner, corner + 1, corner + 2, corner + 3], -1)


def _patches(model: PreTrainedModel, name: str, generator: torch.Generator) -> Iterator[Mapping[str, Tensor]]:
    """Images as patches, of any number."""
    for part in _parts(model.config):
        side = getattr(part, "patch_size", None)
        if isinstance(side, int):
            width = getattr(part, "num_channels", 3) * side**2
            yield {
                name: torch.randn(ROWS, _GRID**2, width, generator=generator),
                "pixel_attention_mask": torch.ones(ROWS, _GRID**2, dtype=torch.long),
                "spatial_shapes": torch.full((ROWS, 2), _GRID),
            }


def _shapes(model: PreTrainedModel, name: str) -> Iterator[Shape]:
    if name == "pixel_values":
        yield from _pictures(model.config)
        return
    for part in _parts(model.config):
        bands, positions = _bands(part), getattr(part, "max_source_positions", None)
        if bands is None:
            continue
        if isinstance(positions, int):
            yield bands, 2 * positions
        if isinstance(length := getattr(part, "max_length", None), int):
            yield length, bands
        yield _FRAMES, bands
        yield 1, _FRAMES, bands
    if name != "input_features":
        yield from _pictures(model.config)
    yield (_SAMPLES,)


def _pictures(config: PreTrainedConfig) -> Iterator[Shape]:
    """Of images, and of videos, where the config says how many frames these have."""
    for part in _parts(config):
        channels, given = getattr(part, "num_channels", 3), getattr(part, "image_size", None)
        sides = _SIDES if given is None else (given,)
        for side in sides:
            image = (channels, *(side if isinstance(side, list | tuple) else (side, side)))
            yield image
            if isinstance(frames := getattr(part, "num_frames", None), int):
                yield frames, *image


def _bands(part: object) -> int | None:
    found = (getattr(part, name, None) for name in _BANDS)
    return next((bands for bands in found if isinstance(bands, int)), None)


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """`config`, and the configs inside; the one that says how large an image is first."""
    return sorted(config_parts(config), key=lambda part: getattr(part, "image_size", None) is None)
