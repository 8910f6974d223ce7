"""Other configs of each type, and the proof of their plans: other sizes, and every flag the other way round, as far as
transformers' own model runs so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedConfig

import shardwise
from parity.types import every
from shardwise import tiny
from shardwise.errors import PlanError
from shardwise.freeze.sizes import other_sizes
from shardwise.infer import examine

VOCABULARY = 133
"""Odd, and not the one of the other runs."""
WIDER = {"hidden_size": 96, "intermediate_size": 152, "num_attention_heads": 12, "num_key_value_heads": 4}
MAMBA = {"mamba_n_heads": 12, "mamba_d_head": 16}
SIZES: dict[str, dict[str, object]] = {
    "bamba": WIDER | MAMBA,
    "dots3_note": WIDER | {"num_attention_heads": 8, "num_key_value_heads": 8},
    "dots3_note_text": WIDER | {"num_attention_heads": 8, "num_key_value_heads": 8},
    "falcon_h1": WIDER | MAMBA | {"mamba_d_ssm": 192},
    "granitemoehybrid": WIDER | MAMBA,
    "zamba2": WIDER | {"num_key_value_heads": 12, "attention_hidden_size": 192, "attention_head_dim": 16, "n_mamba_heads": 12},
}
"""Of types whose sizes depend on each other in a way of their own."""

KEPT: dict[str, tuple[str, ...]] = {
    "dbrx": ("tie_word_embeddings",),  # which its config refuses
    "falcon": ("multi_query",),  # which goes without the new architecture alone
    "gemma4_text": ("enable_moe_block",),  # which asks for numbers of experts
    "gpt_bigcode": ("add_cross_attention",),  # whose code takes all heads for one
    "laguna": ("moe_apply_router_weight_on_input",),  # which its code refuses
    "reformer": ("axial_pos_embds", "is_decoder"),  # which asks for a shape of positions; and it is a decoder
    "xlm": ("is_encoder", "asm"),  # which its code refuses
}
"""Flags of which the plain model runs one way round alone."""
EVEN_ALONE = ("dbrx",)
"""Types of two KV heads at other sizes, which 3 ranks can't share."""
HOW_IT_RUNS = (
    *("use_cache", "torchscript", "gradient_checkpointing", "remove_invalid_values", "tie_encoder_decoder"),
    *("is_encoder_decoder", "cross_attention_hidden_size"),
)
"""Flags that say how a model is run, not what it computes."""


class Inferred(Exception):
    """The automatic plan is found by inference, which takes seconds, and proves what it finds."""


def resized(name: str) -> Iterator[PreTrainedConfig]:
    """Configs with other heads, widths and vocabulary, the best first; of every second type the first has one KV head."""
    if name in SIZES:
        yield tiny.config(tiny.PARTS.get(name, name), vocab_size=VOCABULARY, **SIZES[name])
        return
    base = _config(name)
    for made in other_sizes(base.get_text_config()):
        made.vocab_size = VOCABULARY
        if every().index(name) % 2 and "num_key_value_heads" in vars(made):
            one = copy.deepcopy(made)
            one.num_key_value_heads = 1
            yield _within(base, one)
        yield _within(base, made)


def flipped(name: str) -> PreTrainedConfig:
    """The tiny config with all flags the other way round."""
    options: dict[str, object] = {}
    for field, value in vars(_config(name)).items():
        is_option = not field.startswith(("_", "output_", "return_")) and field not in (*HOW_IT_RUNS, *KEPT.get(name, ()))
        if isinstance(value, bool) and is_option:
            options[field] = not value
    return tiny.config(tiny.PARTS.get(name, name), **options)


def problem_of_sizes(name: str) -> str:
    """What is wrong with the automatic plan of other sizes, on 4 ranks that share a KV head, or on 3 with uneven parts; "" of
    one that is right.

    Raises what the plain model says to the last sizes if it runs with none.
    """
    said: Exception | None = None
    for config in resized(name):
        shared = getattr(config.get_text_config(), "num_key_value_heads", None) == 1
        try:
            return problem(config, 4 if shared or name in EVEN_ALONE else 3)
        except (PlanError, Inferred):
            raise
        except Exception as error:  # whatever a model's code says to sizes that it is not made for
            said = error
    assert said is not None
    raise said


def problem_of_flags(name: str) -> str:
    """What is wrong with the automatic plan of all flags the other way round on 2 ranks; "" of one that is right."""
    return problem(flipped(name), 2)


def problem(config: PreTrainedConfig, size: int) -> str:
    """What is wrong with the automatic plan of `config`; "" of one that is right.

    Raises `Inferred` where it would be inferred, `PlanError` where there is none, and what the plain model raises.
    """
    model = on_meta(config)
    with patch("shardwise.planning.plan_unknown", side_effect=Inferred):
        plan = shardwise.plan(model, size)
    proof = examine(plan, model)
    return "" if proof.problem is None else f"tp={size}: {proof.problem}"


def on_meta(config: PreTrainedConfig) -> nn.Module:
    """The causal LM of `config`, without memory."""
    with torch.device("meta"):
        return tiny.empty(copy.deepcopy(config), torch.float32)


def _config(name: str) -> PreTrainedConfig:
    return copy.deepcopy(tiny.config(tiny.PARTS.get(name, name)))


def _within(config: PreTrainedConfig, text: PreTrainedConfig) -> PreTrainedConfig:
    """`config` with `text` in the place of its text model's, where that is not itself."""
    own = config.get_text_config()
    if own is config:
        return text
    made = copy.deepcopy(config)
    for field in config.sub_configs:
        if getattr(config, field, None) is own:
            setattr(made, field, text)
    return made
