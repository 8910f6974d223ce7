"""How a type is called that does not take ids, a mask and labels alone; what its tiny config needs for it; what is not solved.

Types without a plan of transformers' or ours are here for the most part: decoders that read an encoder's states, and models
with towers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models import Batch, batches
from parity.stand_ins import all_keys_shared, small_tower

Inputs = dict[str, Tensor]
Around = Callable[[], AbstractContextManager[None]]
Feeds = Callable[[], tuple[Inputs, Inputs]]


@dataclass(frozen=True)
class Call:
    """How one type is called.

    Args:
        feeds: makes the two micro-batches.
        options: what its tiny config says besides.
        arguments: of every call of its forward.
        generates: whether it goes on with a text.
        around: what has to be on while it is made and runs.
        target: the type of the model for which it drafts.
    """

    feeds: Feeds = lambda: text_only()
    options: Mapping[str, object] = field(default_factory=dict)
    arguments: Mapping[str, object] = field(default_factory=dict)
    generates: bool = True
    around: Around = nullcontext
    target: str = ""


def text_only() -> tuple[Inputs, Inputs]:
    """Two micro-batches of ids, masks and labels; the second is padded on the left."""
    first, second, _ = batches()
    return inputs(first), inputs(second)


def inputs(batch: Batch) -> Inputs:
    """What a model is called with."""
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}


def states(width: int = 64, name: str = "encoder_hidden_states") -> Feeds:
    """The first micro-batch with the states of an encoder, five for each row; the second is text alone."""

    def make() -> tuple[Inputs, Inputs]:
        first, second = text_only()
        return first | {name: _drawn(2, 5, width)}, second

    return make


def pixels(*shape: int) -> Feeds:
    """Both micro-batches with an image of this shape for each row."""

    def make() -> tuple[Inputs, Inputs]:
        first, second = text_only()
        return first | {"pixel_values": _drawn(2, *shape)}, second | {"pixel_values": _drawn(3, *shape)}

    return make


def image_in_text() -> tuple[Inputs, Inputs]:
    """The first micro-batch with an image of four tokens in each row, the second text alone."""
    first, second = text_only()
    ids = torch.cat([first["input_ids"][:, :3], torch.full((2, 4), 5), first["input_ids"][:, 3:]], 1)
    ids, labels = ids.where(ids < 100, 11), torch.where(ids == 5, -100, ids)  # from 100 on it has ids of images and sounds
    seen = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": _drawn(2, 3, 28, 28)}
    return seen, second | {"input_ids": second["input_ids"].where(second["input_ids"] < 100, 11)}


def whole_chunks() -> tuple[Inputs, Inputs]:
    """Without padding, in lengths that are multiples of four."""
    ids = torch.randint(3, 127, (5, 12), generator=torch.Generator().manual_seed(7))
    first, second = ids[:2], ids[2:, :8]
    return {"input_ids": first, "labels": first}, {"input_ids": second, "labels": second}


def codebooks(count: int = 2) -> tuple[Inputs, Inputs]:
    """A row of ids for each of `count` codebooks of each sound, and the states of the text that it is made of."""
    made = []
    for ids in (
        torch.randint(3, 126, (sounds, 9, count), generator=torch.Generator().manual_seed(sounds)) for sounds in (2, 3)
    ):
        rows = ids.transpose(1, 2).reshape(-1, 9)
        made.append({"input_ids": rows, "labels": ids, "encoder_hidden_states": _drawn(len(ids), 5, 64)})
    return made[0], made[1]


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


READS_STATES = (
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "marian",
    "mbart",
    "mvp",
    "pegasus",
    "plbart",
    "prophetnet",
    "trocr",
)

CALLS: dict[str, Call] = {
    **dict.fromkeys(READS_STATES, Call(states())),
    # At lengths as short as these it replaces its sparse attention by another module.
    "big_bird": Call(options={"attention_type": "original_full"}),
    "blt": Call(arguments={"use_cache": False}, generates=False),
    "gemma3n": Call(image_in_text, {"vision_soft_tokens_per_image": 4}, around=small_tower),
    "gemma4_assistant": Call(options={"backbone_hidden_size": 64}, around=all_keys_shared, target="gemma4_text"),
    "gemma4_unified_assistant": Call(
        options={"backbone_hidden_size": 64}, around=all_keys_shared, target="gemma4_unified_text"
    ),
    "git": Call(pixels(3, 28, 28)),
    "lfm3": Call(options={"layer_types": ["conv", "full_attention"]}),
    "mllama": Call(states(name="cross_attention_states")),
    # What its config becomes when it is read.
    "moshi": Call(options={"audio_vocab_size": 2048, "depth_decoder_config": {"input_size": 64, "vocab_size": 127}}),
    "musicgen": Call(codebooks, generates=False),
    "musicgen_melody": Call(codebooks, generates=False),
    "recurrent_gemma": Call(options={"num_hidden_layers": 3}),
    "reformer": Call(whole_chunks, arguments={"use_cache": False}),
    "rwkv": Call(arguments={"use_cache": False}),
}

UNSOLVED: dict[tuple[str, int], str] = {}
"""Types that on so many ranks are not exact, or not cut, or of which no tiny model is made yet."""
