"""How a type is called that does not take ids, a mask and labels alone; what its tiny config needs for it; what is not solved.

Types without a plan of transformers' or ours are here for the most part: decoders that read an encoder's states, and models
with towers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models import Batch, batches

Inputs = dict[str, Tensor]
Feeds = Callable[[], tuple[Inputs, Inputs]]


@dataclass(frozen=True)
class Call:
    """How one type is called.

    Args:
        feeds: makes the two micro-batches.
        options: what its tiny config says besides.
        arguments: of every call of its forward.
        generates: whether it goes on with a text.
    """

    feeds: Feeds = lambda: text_only()
    options: Mapping[str, object] = field(default_factory=dict)
    arguments: Mapping[str, object] = field(default_factory=dict)
    generates: bool = True


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

BOTH = (2, 4)
NO_KEYS = "transformers refuses layers that all read the keys of another model"
UNSOLVED: dict[tuple[str, int], str] = {
    (name, size): why
    for name, sizes, why in (
        ("gemma3n", BOTH, "a tower of timm's, which is not installed"),
        ("gemma4_assistant", BOTH, NO_KEYS),
        ("gemma4_unified_assistant", BOTH, NO_KEYS),
    )
    for size in sizes
}
"""Types that on so many ranks are not exact, or not cut, or of which no tiny model is made yet."""
