"""The twins of transformers' Auto classes: the same names, with `tp_plan` understood by us."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from shardwise import loading


@cache
def auto_class(name: str) -> type | None:
    """The twin of the transformers Auto class called `name`: of a model class a subclass that shards, of any other (AutoTokenizer, AutoConfig, ...) the class itself; None where transformers has none of that name."""
    original = getattr(transformers, name, None) if name.startswith("Auto") else None
    if not isinstance(original, type):
        return None
    return _twin(name, original) if issubclass(original, _BaseAutoModelClass) else original


def _twin(name: str, original: Any) -> type:
    def from_pretrained(cls: type, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
        return loading.from_pretrained(original, pretrained_model_name_or_path, **kwargs)

    def from_config(cls: type, config: PreTrainedConfig, **kwargs: Any) -> nn.Module:
        return loading.from_config(original, config, **kwargs)

    from_pretrained.__doc__, from_config.__doc__ = loading.from_pretrained.__doc__, loading.from_config.__doc__
    namespace = {
        "__module__": "shardwise",
        "__doc__": f'`transformers.{name}` for tensor parallelism: `from_pretrained(..., tp_plan="auto")`.',
        "from_pretrained": classmethod(from_pretrained),
        "from_config": classmethod(from_config),
    }
    return type(name, (original,), namespace)
