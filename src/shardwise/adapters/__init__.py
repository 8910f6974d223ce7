"""Adapters that PEFT puts around the layers of a parallel model: where they are, and how their tensors lie on the ranks.

    base layer            A (rank, in)       B (out, rank)
    column-wise           whole              column-wise: cut as the base's outputs
    row-wise              row-wise: cut as   whole
                          the base's inputs
    kept whole            whole              whole
    an embedding          whole              whole
    stacked experts       cut as their inputs, or B as their outputs; the other one whole

DoRA's magnitudes are cut as the base's outputs, or whole; a prefix of keys and values is whole, and each rank reads its heads'.

PEFT makes every adapter as long as the layer is in one process (it reads `in_features` and `out_features`), so the same seed
gives the same adapter; then each rank keeps its part. What is no LoRA, or changes the base layer's weight, is refused, before
PEFT has put it into the model.
"""

from shardwise.adapters.checks import check_config, whole_as_planned
from shardwise.adapters.coming import config_being_added
from shardwise.adapters.find import (
    PROMPTS,
    adapted_model,
    copied_layers,
    has_adapters,
    ordinary_name,
    type_of,
    unwrapped,
    wrappers,
)
from shardwise.adapters.prefix import PREFIXES, prefix_layouts
from shardwise.adapters.rows import adapter_plan

__all__ = [
    "PREFIXES",
    "PROMPTS",
    "adapted_model",
    "adapter_plan",
    "check_config",
    "config_being_added",
    "copied_layers",
    "has_adapters",
    "ordinary_name",
    "prefix_layouts",
    "type_of",
    "unwrapped",
    "whole_as_planned",
    "wrappers",
]
