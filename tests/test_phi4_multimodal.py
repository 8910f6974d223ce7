"""Phi-4 multimodal with an image and a sound to read: its encoders on several ranks are those of one process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import shardwise
from figures import gradient_error, gradients
from shardwise.tiny import build, on_meta

IMAGE, SOUND = 90, 91
IMAGE_TOKENS, SOUND_TOKENS = 5, 3
OPTIONS = {"vision_config": {"image_token_id": IMAGE}, "audio_config": {"audio_token_id": SOUND}}


@dataclass(frozen=True)
class Read:
    """Logits of two micro-batches, and their accumulated gradients (None on all ranks but the first)."""

    logits: list[Tensor]
    gradients: dict[str, Tensor] | None


def micro_batches() -> list[dict[str, object]]:
    """One with an image and a sound, which is joined as sounds beside images are, and one with a sound alone."""
    draw = torch.Generator().manual_seed(3)
    sound = {"audio_input_features": torch.randn(1, 24, 16, generator=draw), "audio_embed_sizes": torch.tensor([SOUND_TOKENS])}
    image = {
        "image_pixel_values": torch.randn(1, 2, 3, 28, 28, generator=draw),
        "image_sizes": torch.tensor([[28, 28]]),
        "image_attention_mask": torch.ones(1, 2, 2, 2),
    }
    both = torch.tensor([[3, *[IMAGE] * IMAGE_TOKENS, 7, *[SOUND] * SOUND_TOKENS, 9, 11]])
    alone = torch.tensor([[4, *[SOUND] * SOUND_TOKENS, 8, 12]])
    return [{"input_ids": both, **image, **sound}, {"input_ids": alone, **sound}]


def read(sharded: bool) -> Read:
    """Of the tiny model, in this process or on all ranks."""
    # Training, the encoder of sounds draws its mask from numpy, which nobody seeds.
    model = build("phi4_multimodal", **nested()).eval()
    if sharded:
        shardwise.parallelize(model)
    logits = []
    for batch in micro_batches():
        output = model(**batch, labels=batch["input_ids"])
        output.loss.backward()
        logits.append(output.logits.detach())
    return Read(logits, gradients(model))


def nested() -> dict[str, dict[str, object]]:
    """The tiny model's encoders, told which tokens are theirs."""
    made = on_meta("phi4_multimodal").config
    return {name: getattr(made, name).to_dict() | options for name, options in OPTIONS.items()}


@pytest.mark.parametrize("size", [2, 4], ids=["tp2", "tp4"])
def test_encoders(size, pool2, pool4):
    """Guards: an encoder's MLP with gate and up confused, heads that are given all heads' relative positions, the gradient of
    those positions of a rank's heads alone, a projection into the decoder whose bias is added twice.
    """
    actual, expected = {2: pool2, 4: pool4}[size].run(read, True)[0], read(False)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        assert (ours - theirs).abs().max() < 1e-4
    assert actual.gradients is not None
    assert expected.gradients is not None
    named = [name for name in expected.gradients if "audio_embed" in name or "img_processor.encoder" in name]
    assert len(named) > 60
    assert gradient_error(actual.gradients, expected.gradients) < 1e-3


def test_encoders_with_few_heads():
    """Guards: a model that is refused because its encoders have fewer heads than there are ranks."""
    few = {name: options | {"num_attention_heads": 2} for name, options in nested().items()}
    plan = shardwise.plan(on_meta("phi4_multimodal", **few), 4)
    names = [name for name in (row.name for row in plan) if "self_attn.q_proj.weight" in name]
    assert names
    assert not any(plan[name].sharded for name in names)
