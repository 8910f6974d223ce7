"""What one process, or one rank, finds: logits, losses, gradients, tokens, and what it writes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import shardwise
from shardwise.model_state import state_of
from shardwise.verify.load import Feed

_SEED = 0


@dataclass(frozen=True)
class Found:
    """Of one micro-batch: its outputs (float32, on the CPU), the loss, and the gradients accumulated so far.

    The gradients of the ranks are full, and on the first rank; elsewhere None.
    """

    outputs: Tensor
    loss: float
    gradients: dict[str, Tensor] | None


@dataclass(frozen=True)
class Generated:
    """Greedy tokens (batch, tokens) and the logits that they were the largest of, (batch, tokens, vocabulary)."""

    tokens: Tensor
    logits: Tensor | None


def step(model: nn.Module, called: nn.Module, feed: Feed) -> Found:
    """Forward and backward of one micro-batch; the gradients add to those that are there. Collective, of a parallel model.

    Args:
        model: the model itself, in training mode.
        called: what is called: the model, or its compiled form.
        feed: its inputs.
    """
    outputs, loss = forward(model, called, feed)
    loss.backward()
    gradients = shardwise.full_gradients(model)
    if gradients is not None and state_of(model) is None:  # those of the ordinary model go on growing
        gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    return Found(outputs.detach().float().cpu(), float(loss.detach()), gradients)


def forward(model: nn.Module, called: nn.Module, feed: Feed) -> tuple[Tensor, Tensor]:
    """The outputs (logits, or the last hidden states) and the loss: the model's own, or else a fixed sum of the outputs."""
    torch.manual_seed(_SEED)  # for a router that draws
    given = dict(feed)
    known = inspect.signature(type(model).forward).parameters
    if "labels" in given and "labels" not in known and "kwargs" not in known:
        del given["labels"]
    if "use_cache" in known:
        given["use_cache"] = False  # type: ignore[assignment]
    result: Any = called(**given)
    outputs = _outputs(result)
    loss = getattr(result, "loss", None)
    if not isinstance(loss, Tensor):
        weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(_SEED)).to(outputs)
        loss = (outputs * weights).mean()
    return outputs, loss


def why_not_generate(model: PreTrainedModel) -> str:
    """Why a model makes no tokens, in words; "" where it does."""
    return "" if model.can_generate() else f"{type(model).__name__} does not generate"


def generate(model: PreTrainedModel, feed: Feed, count: int) -> Generated:
    """`count` greedy tokens behind a prompt. Collective, of a parallel model."""
    prompt = {name: tensor for name, tensor in feed.items() if name != "labels"}
    options: Mapping[str, Any] = {
        "max_new_tokens": count,
        "min_new_tokens": count,
        "do_sample": False,
        "num_beams": 1,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    model.eval()
    result: Any = model.generate(**prompt, **options)
    model.train()
    logits = torch.stack([step.float().cpu() for step in result.logits], 1) if result.logits is not None else None
    return Generated(result.sequences[:, -count:].cpu(), logits)


def save(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained`. Collective, of a parallel model."""
    model.save_pretrained(folder, max_shard_size="1TB")


def _outputs(result: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        found = getattr(result, name, None)
        if isinstance(found, Tensor):
            return found
    values = result.values() if isinstance(result, Mapping) else result
    first: Tensor = next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())
    return first
