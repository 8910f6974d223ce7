"""Everything that a model drops, or changes, at random: switched off, where two runs are compared."""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedConfig

from shardwise.hf.configs import config_parts


def without_dropout(model: nn.Module) -> None:
    """Set every rate of dropout, of layers that are left out, and of noise on routers to zero."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if _is_rate(name, value):
                setattr(module, name, 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def config_without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of `config` in which every rate is zero: of its own, and of the configs inside."""
    config = copy.deepcopy(config)
    for part in config_parts(config):
        for name, value in list(vars(part).items()):
            if _is_rate(name, value):
                setattr(part, name, 0.0)
    return config


def _is_rate(name: str, value: object) -> bool:
    """Whether the attribute `name`, of this `value`, says how much is dropped at random, or changed."""
    return ("drop" in name or "jitter" in name) and isinstance(value, float)
