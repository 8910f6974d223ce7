"""PEFT's layers in a model: where they are, what is in them, and the names that tensors have without them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from shardwise.errors import ShardwiseError, describe
from shardwise.layers import is_parallel

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "CPT", "MULTITASK_PROMPT_TUNING")
"""PEFT's types of adapters that are tokens in front of the others, outside of the model."""

_WRAPPED = ("base_layer", "original_module")


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put anything into `model`."""
    return next(wrappers(model), None) is not None


def adapted_model(model: nn.Module) -> nn.Module:
    """The model inside of a `PeftModel`; any other is returned as it is.

    Raises `ShardwiseError` where PEFT has put something into it that does not become parallel afterwards.
    """
    inner: nn.Module = model.get_base_model() if _is_peft_model(model) else model  # type: ignore[operator]
    for config in model.peft_config.values() if _is_peft_model(model) else ():  # type: ignore[operator]
        if (kind := type_of(config)) not in ("LORA", *PROMPTS):
            raise ShardwiseError(
                describe(
                    f"A model with an adapter of type {kind} cannot become parallel.",
                    either=[
                        "make the ordinary transformers model parallel, and add the adapter then, or",
                        "plain LoRA on linear layers and embeddings",
                    ],
                )
            )
    for name, wrapper in wrappers(inner):
        if kind_of(wrapper) not in ("lora", "experts") or not isinstance(inner, PreTrainedModel):
            raise ShardwiseError(
                describe(
                    f"{name}: a model with {type(wrapper).__name__} in it cannot become parallel.",
                    either=[
                        "make the ordinary transformers model parallel, and add the adapter then, or",
                        "plain LoRA on linear layers and embeddings",
                    ],
                )
            )
    return inner


def type_of(config: Any) -> str:
    """PEFT's name for an adapter's type, "LORA"."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def ordinary_name(name: str) -> str:
    """A tensor's name without what PEFT puts into it: "q_proj.base_layer.weight" gives "q_proj.weight"."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer inside of PEFT's layers around it."""
    while inner := next((module._modules[name] for name in _WRAPPED if module._modules.get(name) is not None), None):
        module = inner
    return module


def copied_layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The parallel layers that are trained whole (`modules_to_save`): the original, and an adapter's copy of it."""
    for _, wrapper in wrappers(model):
        for copy in wrapper.modules_to_save.values() if kind_of(wrapper) == "copy" else ():
            for name, module in wrapper.original_module.named_modules():
                if is_parallel(module):
                    yield module, copy.get_submodule(name)


def wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers in `model`, outermost first, by path."""
    kinds = _peft_kinds()
    last: str | None = None
    for name, module in model.named_modules() if kinds else ():
        if isinstance(module, kinds) and not (last is not None and name.startswith(f"{last}.")):
            last = name
            yield name, module


def nested(name: str, wrapper: Any) -> Iterator[tuple[str, Any]]:
    """The layer of PEFT's at path `name`, and those inside of it, one for each parameter of the same module."""
    while kind_of(wrapper) == "experts":
        yield name, wrapper
        name, wrapper = f"{name}.base_layer", wrapper.base_layer


def _peft_kinds() -> tuple[type, ...]:
    # Who has adapters has imported PEFT; nobody else needs it.
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return (BaseTunerLayer, AuxiliaryTrainingWrapper)


def _is_peft_model(model: nn.Module) -> bool:
    if "peft" not in sys.modules:
        return False
    from peft import PeftMixedModel, PeftModel

    return isinstance(model, PeftModel | PeftMixedModel)


def kind_of(wrapper: object) -> str:
    """What a layer of PEFT's is: "lora", "experts" (a LoRA of a parameter), a "copy" that is trained whole, or "other"."""
    from peft.tuners import lora
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(wrapper, lora.Linear | lora.Embedding):
        return "lora"
    if isinstance(wrapper, lora.ParamWrapper):
        return "experts"
    return "copy" if isinstance(wrapper, ModulesToSaveWrapper) else "other"
