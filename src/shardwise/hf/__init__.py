"""The only place that touches transformers' internals: its models' plans, its loading, its saving.

| | |
|---|---|
| `rules`, `towers` | the plan that a model brings; what lies around the text model of a vision-language or audio model |
| `build` | the model of a config |
| `auto`, `quantization` | which class an Auto class stands for, generation config; whether weights are quantized |
| `load`, `checks` | a model made of lazy tensors, and whether the checkpoint fitted it |
| `saving` | which tensors a checkpoint has, under which names |
| `adapters`, `prefix` | loading and saving of PEFT's adapters; the caches that virtual tokens lie in |
| `recording`, `attentions` | what is collected while a model runs |
| `generating` | what `generate` has to do alike on all ranks |
| `configs`, `kinds` | the configs in a config, and one as a text; layers that do the same, and configs with fewer |
| `specimen`, `feeds`, `senses` | a model to try plans out on, and what to call it with: texts, images and sounds |
| `chunks` | how many tokens it computes at once |
| `dropout` | a model without dropout |
| `simulating` | what a model must be told when it runs on tensors without values |
"""

from shardwise.hf.adapters import AdaptersSeen, adapter_and_base, load_adapter, save_adapter
from shardwise.hf.attentions import attentions_are_asked_for, gather_attentions
from shardwise.hf.auto import attach_generation_config, resolve_model_class
from shardwise.hf.build import build, build_on_meta, class_of
from shardwise.hf.chunks import small_chunks
from shardwise.hf.configs import config_parts, config_text
from shardwise.hf.dropout import config_without_dropout, without_dropout
from shardwise.hf.feeds import in_training, sample_feeds
from shardwise.hf.generating import GeneratesTogether, streamed_together
from shardwise.hf.kinds import cut, layer_kinds
from shardwise.hf.load import load_lazily
from shardwise.hf.prefix import cut_prefix, mark_as_part
from shardwise.hf.quantization import quantization, without_quantization
from shardwise.hf.recording import hidden_states_are_recorded
from shardwise.hf.rules import (
    base_model,
    base_prefixes,
    check_head,
    frozen_model_rules,
    has_expert_plan,
    is_of_transformers,
    model_rules,
)
from shardwise.hf.saving import checkpoint_tensors, description_files
from shardwise.hf.simulating import checkpoint_activations, unpacked_sequences
from shardwise.hf.specimen import LARGE_MODEL, LARGE_WEIGHT, Feed, elements, origin_of, specimens

__all__ = [
    "LARGE_MODEL",
    "LARGE_WEIGHT",
    "AdaptersSeen",
    "Feed",
    "GeneratesTogether",
    "adapter_and_base",
    "attach_generation_config",
    "attentions_are_asked_for",
    "base_model",
    "base_prefixes",
    "build",
    "build_on_meta",
    "check_head",
    "checkpoint_activations",
    "checkpoint_tensors",
    "class_of",
    "config_parts",
    "config_text",
    "config_without_dropout",
    "cut",
    "cut_prefix",
    "description_files",
    "elements",
    "frozen_model_rules",
    "gather_attentions",
    "has_expert_plan",
    "hidden_states_are_recorded",
    "in_training",
    "is_of_transformers",
    "layer_kinds",
    "load_adapter",
    "load_lazily",
    "mark_as_part",
    "model_rules",
    "origin_of",
    "quantization",
    "resolve_model_class",
    "sample_feeds",
    "save_adapter",
    "small_chunks",
    "specimens",
    "streamed_together",
    "unpacked_sequences",
    "without_dropout",
    "without_quantization",
]
