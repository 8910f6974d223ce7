"""Everything that a model drops, or changes, at random: switched off, where two runs are compared."""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedConfig

from shardwise.hf.configs import config_parts

_MASKS = "apply_spec_augment"
"""Whether a speech model in training leaves out some of what it hears: numpy draws which."""


def without_dropout(model: nn.Module) -> None:
    """Set every rate of dropout, of layers that are left out, and of noise on routers to zero, and mask no sounds: in modules,
    and in their configs, which code reads too.
    """
    for module in model.modules():
        _silence(module)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(config := vars(module).get("config"), PreTrainedConfig):
            _silence(config)


def config_without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of `config` in which every rate is zero: of its own, and of the configs inside."""
    config = copy.deepcopy(config)
    for part in config_parts(config):
        _silence(part)
    return config


def _silence(owner: object) -> None:
    for name, value in list(vars(owner).items()):
        if _is_rate(name, value):
            setattr(owner, name, 0.0)
        elif name == _MASKS:
            setattr(owner, name, False)


def _is_rate(name: str, value: object) -> bool:
    """Whether the attribute `name`, of this `value`, says how much is dropped at random, or changed."""
    return ("drop" in name or "jitter" in name) and isinstance(value, float)
