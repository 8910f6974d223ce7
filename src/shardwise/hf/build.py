"""The model of a config, when nobody says of which class."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextToWaveform,
    PreTrainedConfig,
    PreTrainedModel,
)

from shardwise.errors import PlanError, describe


def build_on_meta(config: PreTrainedConfig) -> nn.Module:
    """The model of `config` on meta: every name and shape, no memory. Of the classes that transformers has for it the one that
    its `architectures` name, else the one for causal LMs, else one that makes text of images or sounds.

    Raises `PlanError` where transformers has none.
    """
    with torch.device("meta"):
        model: nn.Module = build(config)
    return model


def build(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of `config`, as transformers initialises it: of the class that `build_on_meta` says. By default in the config's
    own dtype.
    """
    kind = class_of(config)
    given = {} if dtype is None else {"dtype": dtype}  # None would stand before what the config says
    made: PreTrainedModel = (kind._from_config if issubclass(kind, PreTrainedModel) else kind.from_config)(config, **given)
    return made


def class_of(config: PreTrainedConfig) -> Any:
    """The class of transformers by which a tool makes or loads the model of `config`: an Auto class, see `build_on_meta`, or
    where none knows the config, the class that its `architectures` name.

    Raises `PlanError` where transformers has none.
    """
    known = [auto for auto in _AUTO_CLASSES if type(config) in auto._model_mapping]
    named = [auto for auto in known if auto._model_mapping[type(config)].__name__ in (config.architectures or ())]
    own = getattr(transformers, (config.architectures or [""])[0] or "none", None)
    if not known and isinstance(own, type) and issubclass(own, PreTrainedModel):
        return own
    if not known:
        raise PlanError(
            describe(
                f"transformers has no Auto class that makes a text model of a {type(config).__name__}.",
                either=["build the model yourself, under torch.device('meta'), and pass that"],
            )
        )
    return (named or known)[0]


_AUTO_CLASSES = (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForSeq2SeqLM,
    AutoModelForTextToWaveform,
    AutoModel,
)
