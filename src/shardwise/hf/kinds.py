"""Layers that do the same, and a config with fewer of them."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence

from torch import nn
from transformers import PreTrainedConfig

from shardwise.hf.configs import config_parts
from shardwise.names import layer_of

_DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
    *("num_blocks", "num_layers_per_stack"),
)
_SHARED = "num_kv_shared_layers"
"""How many of the last layers take the keys and values of one before them."""


def cut(config: PreTrainedConfig, layers: int, towers: bool = False) -> PreTrainedConfig:
    """A copy of `config` with the first `layers` of its layers; of an encoder and of a decoder, where there are two; with
    `towers`, of every model that it has a config for.
    """
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    for part in [text, *(part for part in config_parts(shorter) if towers and part is not text)]:
        _keep(part, range(layers))
    return shorter


def pick(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """A copy of `config` with some `layers` of its text model's alone, by their numbers."""
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    depth = max((getattr(text, name) for name in _depths(text)), default=0)
    if shared := getattr(text, _SHARED, 0):
        setattr(text, _SHARED, sum(1 for layer in layers if layer >= depth - shared))
    _keep(text, layers)
    return shorter


def _keep(config: PreTrainedConfig, layers: Sequence[int]) -> None:
    names = [name for name in _depths(config) if isinstance(getattr(config, name), int)]
    depths = {getattr(config, name) for name in names}
    for field, value in vars(config).items():
        if isinstance(value, list) and len(value) in depths:
            setattr(config, field, [value[layer] for layer in layers if layer < len(value)])
    for name in names:
        setattr(config, name, min(len(layers), getattr(config, name)))


def _depths(text: PreTrainedConfig) -> list[str]:
    """The fields of a text model's config that say how many layers there are."""
    names = [name for name in _DEPTHS if isinstance(vars(text).get(name), int)]
    return names or [name for name in _DEPTHS if hasattr(text, name)][:1]


def layer_kinds(model: nn.Module) -> dict[str, Hashable]:
    """What makes a layer alike another, by its path: its modules' classes, its parameters' shapes, and what lists in the
    model's config have for it. "" stands for all that is outside of layers.
    """
    lists = _lists(model)
    return {
        layer: (parts, *(value[number] for value in lists if 0 <= (number := _number(layer)) < len(value)))
        for layer, parts in structures(model).items()
    }


def structures(model: nn.Module) -> dict[str, Hashable]:
    """Of each layer, by its path, its modules' classes and its parameters' shapes; under "" of all that is in none."""
    found: dict[str, list[Hashable]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        layer = layer_of(name)
        own = tuple((child, tuple(p.shape)) for child, p in module._parameters.items() if p is not None)
        found.setdefault(layer, []).append((name.removeprefix(layer), type(module), own))
    return {layer: tuple(parts) for layer, parts in found.items()}


def _number(layer: str) -> int:
    return int(layer.rpartition(".")[2]) if layer else -1


def _lists(model: nn.Module) -> list[list[Hashable]]:
    """Those in the config that have an item for each layer."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return []
    text = config.get_text_config()
    fields: Mapping[str, object] = vars(text)
    depths = {getattr(text, name) for name in _depths(text)}
    lists = [value for value in fields.values() if isinstance(value, list) and len(value) in depths]
    lists = [value for value in lists if all(isinstance(item, str | int | float | None) for item in value)]
    return [value for value in lists if value != list(range(len(value)))]  # that one names layers, all of them


def needed_layers(model: nn.Module, besides: Mapping[str, Hashable]) -> int:
    """How many of the first layers have one of each kind, where layers also differ by what is `besides`, by their paths."""
    return max(_firsts(model, besides), default=0) + 1


def one_of_each(model: nn.Module) -> list[int]:
    """The numbers of the first layers of each kind."""
    return sorted(_firsts(model, {}))


def _firsts(model: nn.Module, besides: Mapping[str, Hashable]) -> set[int]:
    first: dict[Hashable, int] = {}
    for layer, kind in layer_kinds(model).items():
        if layer:
            first.setdefault((layer.rpartition(".")[0], kind, besides.get(layer)), _number(layer))
    return set(first.values())
