"""The only place that touches transformers' internals: its models' plans, its loading, its saving.

| | |
|---|---|
| `rules` | the plan that a model brings |
| `towers` | what lies around the text model of a vision-language or audio model |
| `auto` | which class an Auto class stands for, generation config |
| `load`, `checks` | a model made of lazy tensors, and whether the checkpoint fitted it |
| `recording`, `attentions` | what is collected while a model runs |
| `adapters` | loading and saving of PEFT's adapters |
| `simulating` | what a model must be told when it runs on tensors without values |
| `configs` | a config as a text |
| `saving` | which tensors a checkpoint has, under which names |
| `kinds` | layers that do the same |
| `specimen`, `feeds` | a model to try plans out on, and what to call it with |
"""

from shardwise.hf.adapters import AdaptersSeen, adapter_and_base, load_adapter, save_adapter
from shardwise.hf.attentions import attentions_are_asked_for, gather_attentions
from shardwise.hf.auto import attach_generation_config, quantization, resolve_model_class, without_quantization
from shardwise.hf.configs import config_parts, config_text
from shardwise.hf.feeds import in_training, is_rate, sample_feeds, without_dropout
from shardwise.hf.kinds import cut, layer_kinds, layer_of
from shardwise.hf.load import load_lazily
from shardwise.hf.recording import hidden_states_are_recorded
from shardwise.hf.rules import (
    base_model,
    base_prefixes,
    build,
    build_on_meta,
    check_head,
    class_of,
    frozen_model_rules,
    has_expert_plan,
    model_rules,
)
from shardwise.hf.saving import checkpoint_tensors, description_files
from shardwise.hf.simulating import checkpoint_activations, unpacked_sequences
from shardwise.hf.specimen import LARGE, LARGE_WEIGHT, Feed, elements, origin_of, specimen

__all__ = [
    "LARGE",
    "LARGE_WEIGHT",
    "AdaptersSeen",
    "Feed",
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
    "cut",
    "description_files",
    "elements",
    "frozen_model_rules",
    "gather_attentions",
    "has_expert_plan",
    "hidden_states_are_recorded",
    "in_training",
    "is_rate",
    "layer_kinds",
    "layer_of",
    "load_adapter",
    "load_lazily",
    "model_rules",
    "origin_of",
    "quantization",
    "resolve_model_class",
    "sample_feeds",
    "save_adapter",
    "specimen",
    "unpacked_sequences",
    "without_dropout",
    "without_quantization",
]
