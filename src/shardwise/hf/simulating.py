"""What a model must be told when it runs on tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import masking_utils


@contextmanager
def unpacked_sequences() -> Iterator[None]:
    """In the block, every row of a batch is one sequence: positions without values can't say so, and transformers would make
    masks that it otherwise leaves out.
    """
    before = masking_utils.find_packed_sequence_indices

    def none(position_ids: Tensor) -> None:
        return None

    masking_utils.find_packed_sequence_indices = none
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def checkpoint_activations(model: nn.Module) -> None:
    """Turn activation checkpointing on: by the name that transformers has for it now, or by that which it had before."""
    name = "activation_checkpointing_enable"
    enable: Callable[[], None] = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable()
