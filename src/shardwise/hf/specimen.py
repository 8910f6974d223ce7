"""A model of the same class and config that may be tried out."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from shardwise.hf.chunks import CHUNK
from shardwise.hf.kinds import cut, needed_layers, one_of_each, pick, structures
from shardwise.plan import Origin

LARGE_MODEL = 10_000_000
"""Elements of a model from which on it is tried out without its large weights."""
LARGE_WEIGHT = 2**20
"""Elements of a weight from which on such a model has none."""
_CHUNKS = frozenset({"chunk_size", "mamba_chunk_size"})
"""Fields that say how many tokens are computed at once, to which few are padded."""
_MANY = 12
"""Layers up to which the towers around a text model keep all of theirs."""
_FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand, torch.full})

Feed = Mapping[str, Any] | Callable[[nn.Module], object]
"""Keyword arguments of a model's forward; or what calls the model, and returns its outputs."""


def specimens(
    model: nn.Module, kinds: Mapping[str, Hashable] = MappingProxyType({}), picked: bool = False
) -> Iterator[PreTrainedModel]:
    """New models of the class and config of `model`, with random weights in float32, on the CPU, the smallest first: it may be
    too small to run. The same in every process; torch's random state is left as it is. Of a large model they have the first
    layers alone, so many that there is one of each kind, and their large weights are on meta.

    Args:
        kinds: what layers also differ by, by their paths.
        picked: where many of the first layers are needed, there may be one of each kind alone, with other numbers than in
            `model`.

    There are none where `model` is no transformers model, or not what its config says (it has adapters, say).
    """
    if not isinstance(model, PreTrainedModel):
        return
    if elements(model) <= LARGE_MODEL:
        made = _make(type(model), model.config)
        yield from [made] if _names(made) == _names(model) else []
        return
    found = list(_few_layers(model, kinds, picked))
    yield from (_without_large_weights(type(model), config) for config in found)
    if not found:
        yield from _whole(model)


def origin_of(model: nn.Module, inputs: object = None) -> Origin:
    """What a plan for `model`, tried out with `inputs`, was made of."""
    if not isinstance(model, PreTrainedModel):
        return Origin(module=weakref.ref(model), inputs=inputs)
    return Origin(make=partial(_on_meta, type(model), copy.deepcopy(model.config)), inputs=inputs)


def _on_meta(kind: type[PreTrainedModel], config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        made: nn.Module = kind._from_config(copy.deepcopy(config))
    return made


def elements(model: nn.Module) -> int:
    """Of all parameters, each tied one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _make(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False):
        torch.default_generator.manual_seed(0)
        made: PreTrainedModel = kind._from_config(copy.deepcopy(config), dtype=torch.float32)
    made.config.get_text_config().use_cache = False
    return made.eval()


def _few_layers(model: PreTrainedModel, besides: Mapping[str, Hashable], picked: bool) -> Iterator[PreTrainedConfig]:
    """Configs with few layers that are as the model's, and of each kind one at least; the smallest first."""
    layers, kinds = needed_layers(model, besides), structures(model)
    if picked and layers > _MANY and (config := _picked(model, kinds)) is not None:
        yield config
    text = _first_layers(model, layers, towers=False)
    many = text is not None and len(text[1]) > _MANY
    for made in (_first_layers(model, layers, towers=True), text) if many else (text,):
        if made is not None and made[1].items() <= kinds.items() and set(made[1].values()) == set(kinds.values()):
            yield made[0]


def _first_layers(model: PreTrainedModel, layers: int, towers: bool) -> tuple[PreTrainedConfig, dict[str, Hashable]] | None:
    """The config of the first `layers`, of `towers` too, and the structures that it makes; None where it makes none."""
    try:
        config = _in_small_chunks(cut(model.config, layers, towers))
        return config, structures(_on_meta(type(model), config))
    except Exception:  # configs check themselves in many ways
        return None


def _picked(model: PreTrainedModel, kinds: Mapping[str, Hashable]) -> PreTrainedConfig | None:
    """One layer of each kind; None where a config with these alone makes other layers. What is outside of layers may be of
    other lengths then (one embedding for all layers).
    """
    layers = one_of_each(model)
    rows = Counter(layer.rpartition(".")[0] for layer in kinds if layer)
    long = {row for row, count in rows.items() if count == max(rows.values())}
    try:
        config = _in_small_chunks(pick(model.config, layers))
        found = structures(_on_meta(type(model), config))
    except Exception:  # configs check themselves in many ways
        return None
    expected = {layer: kind for layer, kind in kinds.items() if layer and layer.rpartition(".")[0] not in long}
    expected |= {f"{row}.{number}": kinds[f"{row}.{layer}"] for row in long for number, layer in enumerate(layers)}
    if _without_lengths(found.pop("")) != _without_lengths(kinds[""]) or found != expected:
        return None
    return config


def _without_lengths(parts: Any) -> Hashable:
    return tuple((name, kind, tuple((child, len(shape)) for child, shape in own)) for name, kind, own in parts)


def _in_small_chunks(config: PreTrainedConfig) -> PreTrainedConfig:
    for field in _CHUNKS & vars(config.get_text_config()).keys():
        setattr(config.get_text_config(), field, CHUNK)
    return config


def _whole(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    made = _without_large_weights(type(model), model.config)
    if _names(made) == _names(model):
        yield made


def _without_large_weights(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with _LargeOnMeta():
        return _make(kind, config)


class _LargeOnMeta(TorchFunctionMode):
    """Makes large floating tensors on meta: weights, but no masks."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _FACTORIES:
            with torch.device("meta"):
                made = function(*args, **kwargs | {"device": "meta"})
            if made.is_floating_point() and made.dim() > 1 and made.numel() >= LARGE_WEIGHT:
                return made
        return function(*args, **kwargs)


def _names(model: nn.Module) -> dict[str, object]:
    """The class of each module, and the shape of each parameter."""
    # By name: a module with a parametrization has a class of its own.
    kinds: dict[str, object] = {name: type(module).__qualname__ for name, module in model.named_modules()}
    return kinds | {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
