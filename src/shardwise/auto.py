"""The twins of transformers' Auto classes: the same names, with `tp_plan` understood by us."""

from __future__ import annotations

import os
from functools import cache
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from shardwise import loading


@cache
def auto_class(name: str) -> type | None:
    """The twin of the transformers Auto class called `name`: of a model class a subclass that shards, of any other
    (AutoTokenizer, AutoConfig, ...) the class itself; None where transformers has none of that name.
    """
    original = getattr(transformers, name, None) if name.startswith("Auto") else None
    if not isinstance(original, type):
        return None
    return _twin(name, original) if issubclass(original, _BaseAutoModelClass) else original


class _Twin:
    """In front of a transformers Auto class: `from_pretrained` and `from_config` understand `tp_plan` and its companions."""

    original: ClassVar[Any]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
        """See `shardwise.loading.from_pretrained`."""
        return loading.from_pretrained(cls.original, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> nn.Module:
        """See `shardwise.loading.from_config`."""
        return loading.from_config(cls.original, config, **kwargs)


def _twin(name: str, original: type) -> type:
    text = f'`transformers.{name}`, for tensor parallelism: `from_pretrained(..., tp_plan="auto")`.'
    return type(name, (_Twin, original), {"__module__": "shardwise", "__doc__": text, "original": original})
