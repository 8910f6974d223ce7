"""A model of the same class and config that may be tried out."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from shardwise.errors import PlanError, describe

LARGEST = 200_000_000
"""Elements of a model that is built for a trial: a handful of copies of it are held at once, in float32."""


def specimen(model: nn.Module) -> PreTrainedModel | None:
    """A new model of the class and config of `model`, with random weights in float32, on the CPU. The same in every process;
    torch's random state is left as it is. None where `model` is no transformers model, or not what its config says (it has
    adapters, say).

    Raises `PlanError` for a model too large to be built so.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    elements = sum(parameter.numel() for parameter in model.parameters())
    if elements > LARGEST:
        raise PlanError(
            describe(
                f"{type(model).__name__} has {elements / 1e6:.0f} million parameters, too many to try plans out on it.",
                most=f"{LARGEST / 1e6:.0f} million",
                either=[
                    "infer the plan of a smaller config of the same type, and write down its rules: tp_plan={...}, or",
                    'tp_plan="auto"',
                ],
            )
        )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False):
        torch.default_generator.manual_seed(0)
        made: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32)
    made.config.get_text_config().use_cache = False
    return made.eval() if _kinds(made) == _kinds(model) else None


def _kinds(model: nn.Module) -> dict[str, object]:
    """The class of each module, and the shape of each parameter."""
    kinds: dict[str, object] = {name: type(module) for name, module in model.named_modules()}
    return kinds | {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
