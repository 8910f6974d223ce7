"""A model of the same class and config that may be tried out, and what to call it with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardwise.errors import PlanError, describe

LARGEST = 200_000_000
"""Elements of a model that is built for a trial: a handful of copies of it are held at once, in float32."""
_TOKENS = 12
_FIRST = 10


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


def sample_feeds(model: PreTrainedModel) -> list[Mapping[str, Any] | Callable[[nn.Module], object]]:
    """Two micro-batches for a model of texts, the second padded on the left; and, where it generates, a token after the others,
    from the cache.

    Raises `PlanError` for a model that reads something else.
    """
    if model.main_input_name != "input_ids":
        raise PlanError(
            describe(
                f"{type(model).__name__} reads {model.main_input_name}, and what that looks like is not known.",
                either=["shardwise.infer_plan(model, tp_size=..., example_inputs={...})", 'or tp_plan="auto"'],
            )
        )
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(min(_FIRST, vocabulary - 1), vocabulary, (2, _TOKENS), generator=generator) for _ in range(2)]
    mask = torch.ones_like(ids[1])
    mask[0, : _TOKENS // 4] = 0
    feeds: list[Mapping[str, Any] | Callable[[nn.Module], object]] = [
        _inputs(model, ids[0]),
        _inputs(model, ids[1]) | {"attention_mask": mask},
    ]
    if model.can_generate() and not model.config.is_encoder_decoder:
        from_cache = _from_cache(ids[0])
        if _runs(model, from_cache):
            feeds.append(from_cache)
    return feeds


def _runs(model: PreTrainedModel, feed: Callable[[nn.Module], object]) -> bool:
    """Whether a decoder can go on from a cache: some that are half of an encoder-decoder make one that is not for them."""
    try:
        feed(model)
    except (IndexError, RuntimeError, TypeError, ValueError, AttributeError):
        return False
    return True


def _inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids} | decoder


def _from_cache(ids: Tensor) -> Callable[[nn.Module], object]:
    def run(model: nn.Module) -> object:
        with torch.no_grad():
            first = model(input_ids=ids[:, :-1], use_cache=True)
            cache = getattr(first, "past_key_values", None)
            if cache is None:
                return ()
            return model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits

    return run
