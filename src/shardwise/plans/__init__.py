"""Our own corrections and additions to the models' plans: one small file a family, each rule with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from shardwise.plans import apertus, deepseek, phi3
from shardwise.spec import Rule

Corrections = Callable[[nn.Module, str, int], list[Rule]]

CORRECTIONS: Mapping[str, Corrections] = MappingProxyType(
    {"apertus": apertus.rules, "phi3": phi3.rules, "deepseek_v3": deepseek.rules}
)


def corrections(model_type: str, model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """What shardwise adds to the plan of a model of `model_type`, whose plan's patterns are relative to `prefix`."""
    family = CORRECTIONS.get(model_type)
    return family(model, prefix, size) if family else []
