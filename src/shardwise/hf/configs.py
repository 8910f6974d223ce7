"""The configs in a config, and a config as a text, to be compared between processes."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_OWN = frozenset({"_name_or_path", "transformers_version"})
"""What may differ between ranks: the same files may lie in other places."""


def config_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """`config`, and the configs inside of it (of its text model, of its towers)."""
    inside = (getattr(config, name, None) for name in config.sub_configs)
    return [config, *(part for part in inside if isinstance(part, PreTrainedConfig))]


def config_text(model: nn.Module) -> str:
    """The fields of a transformers model's config: in every process the same text for the same values. Of others none."""
    return _spelled(model.config.to_dict()) if isinstance(model, PreTrainedModel) else ""


def _spelled(value: object) -> str:
    if isinstance(value, PreTrainedConfig):
        return _spelled(value.to_dict())
    if isinstance(value, dict):
        return "{" + ", ".join(sorted(f"{key!s}: {_spelled(one)}" for key, one in value.items() if key not in _OWN)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_spelled, value)) + "]"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(_spelled, value))) + "}"
    if value is None or isinstance(value, (str, int, float)):
        return repr(value)
    return type(value).__name__  # what else there is may be spelled with its address
