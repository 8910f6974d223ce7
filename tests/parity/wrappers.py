"""Vision-language and audio models around a text model that has a plan, each tiny and with an image or a sound to read.

`images.py`, `grids.py` and `sounds.py` have the tables. What is here makes a model of a line of it, and the two micro-batches:
one with placeholders for the features of the tower, one of text alone, padded on the left.
"""

from __future__ import annotations

from functools import cache

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from parity import types
from parity.grids import GRIDS
from parity.images import IMAGES
from parity.job import Subject
from parity.sounds import SOUNDS
from parity.towers import Wrapper
from shardwise import tiny

WRAPPERS: dict[str, Wrapper] = {**IMAGES, **GRIDS, **SOUNDS}
IMAGE, VIDEO, AUDIO, START, END = 5, 6, 7, 8, 9
"""Ids of the placeholders; text is drawn from those above."""
IDS: dict[str, int] = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "audio_token_id": AUDIO,
    "audio_token_index": AUDIO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}
# What a tower's config does not know is left out.
TOWER: dict[str, object] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "initializer_range": 0.2,
}


def names() -> tuple[str, ...]:
    """All of them, in alphabetical order."""
    return tuple(sorted(WRAPPERS))


def config(name: str) -> PreTrainedConfig:
    """The tiny config of a wrapper."""
    wrapper = WRAPPERS[name]
    parts: dict[str, object] = {"text_config": tiny.config(wrapper.text, **wrapper.text_options).to_dict()}
    for part, (kind, options) in wrapper.towers.items():
        known = tiny.known(kind)
        parts[part] = {"model_type": kind} | {k: v for k, v in TOWER.items() if k in known} | dict(options)
    ids = {key: value for key, value in IDS.items() if key in tiny.known(name)}
    return AutoConfig.for_model(name, **{**ids, **parts, **wrapper.options})


def build(name: str) -> PreTrainedModel:
    """The tiny model in float32, the same in every process."""
    auto = getattr(transformers, WRAPPERS[name].auto)
    return tiny.randomised(lambda: auto.from_config(config(name), dtype=torch.float32))


def at_default_size(name: str) -> PreTrainedModel:
    """The model of the type's default config, its open fields filled, on meta."""
    auto = getattr(transformers, WRAPPERS[name].auto)
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(AutoConfig.for_model(name, **filled(name)))
    return model


def filled(name: str) -> dict[str, object]:
    """What the default config of a wrapper, or of its text model, leaves open: the sizes that are filled in."""
    wrapper = WRAPPERS[name]
    text = types.FILLED.get(wrapper.text)
    return {**({"text_config": {"model_type": wrapper.text, **text}} if text else {}), **wrapper.filled}


@cache
def subject(name: str) -> Subject:
    """How a wrapper is loaded and called."""
    wrapper = WRAPPERS[name]
    second = _text_alone() if wrapper.reads_text else _with_features(wrapper, seed=8)
    return Subject(wrapper.auto, (_with_features(wrapper), second))


def _with_features(wrapper: Wrapper, seed: int = 7) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 127, (2, 9), generator=draw)
    placed = torch.tensor(wrapper.placeholders, dtype=torch.long).expand(2, -1)
    ids = torch.cat([ids[:, :3], placed, ids[:, 3:]], dim=1)
    labels = torch.where(ids < 10, -100, ids)
    feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return feed | wrapper.features(ids, draw)


def _text_alone() -> dict[str, Tensor]:
    ids = torch.randint(10, 127, (3, 7), generator=torch.Generator().manual_seed(8))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, :3], labels[0, :3] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
