"""`measure`: everything that a test compares between the plain model in one process and the shards on many ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import shardwise
from models import batches

SEED = 31


@dataclass(frozen=True)
class Figures:
    """What `measure` found, on one rank. What only the first rank has is None on the others.

    Lists have an entry for each micro-batch; `gradients` are those accumulated so far.
    """

    logits: list[Tensor]
    losses: list[Tensor]
    gradients: list[dict[str, Tensor] | None]
    held_in_common: dict[str, Tensor]
    norms: dict[str, Tensor]
    clipped: dict[str, Tensor] | None
    greedy: Tensor
    sampled: Tensor
    state: dict[str, Tensor] | None


def measure_plain(path: Path, device: str = "cpu", **overrides: object) -> Figures:
    """Of the ordinary model, in this process."""
    return measure(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **overrides).to(device))


def load_sharded(path: Path, dtype: torch.dtype = torch.float32, **keywords: object) -> PreTrainedModel:
    """On every rank: this rank's shards, by the public way."""
    return shardwise.AutoModelForCausalLM.from_pretrained(path, **{"dtype": dtype, "tp_plan": "auto", **keywords})


def measure_sharded(path: Path, saved: Path | None = None, **keywords: object) -> Figures:
    """On every rank, of the shards that `from_pretrained(path, **keywords)` loads, which are saved to `saved`."""
    model = load_sharded(path, **keywords)
    if saved is not None:
        model.save_pretrained(saved)
    return measure(model)


def measure(model: PreTrainedModel) -> Figures:
    """Logits, then the gradients of one, two and three accumulated micro-batches, clipping, tokens, weights."""
    logits, losses, accumulated = [], [], []
    model.train()
    for batch in batches(model.device):
        with torch.no_grad():
            logits.append(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits)
        loss = batch.loss(model)
        loss.backward()
        losses.append(loss.detach())
        accumulated.append(gradients(model))
    common = held_in_common(model)
    norms = {
        "largest": shardwise.clip_grad_norm_(model, 1e-3, float("inf")),
        "euclidean": shardwise.clip_grad_norm_(model, 1e-3),
        "after both": shardwise.clip_grad_norm_(model, 1e3),
    }
    clipped = gradients(model)
    model.zero_grad()
    greedy, sampled = _generate(model.eval())
    state = shardwise.full_state_dict(model) if _is_sharded(model) else model.state_dict()
    return Figures(logits, losses, accumulated, common, norms, clipped, greedy, sampled, state)


def gradients(model: nn.Module) -> dict[str, Tensor] | None:
    """A copy of the full gradients by name, of tied parameters under each; on several ranks, on the first one."""
    if _is_sharded(model):
        return shardwise.full_gradients(model)
    return {name: p.grad.clone() for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}


def gradient_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of any gradient, relative to that gradient's largest value, or, of a tiny one, to 1e-3 of the
    model's largest.

    A gradient that should be zero is the noise of the sums that cancel in it; against its own size any error would be large.
    """
    assert actual.keys() == expected.keys(), (
        f"missing {expected.keys() - actual.keys()}, extra {actual.keys() - expected.keys()}"
    )
    largest = max(gradient.abs().max() for gradient in expected.values())
    return max(
        ((actual[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3 * largest)).item()
        for name, gradient in expected.items()
    )


def _is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "_shardwise")


def held_in_common(model: nn.Module) -> dict[str, Tensor]:
    """This rank's gradients of what other ranks hold too, by the parameter's name and where the piece starts in the full
    tensor.
    """
    if not _is_sharded(model):
        return {}
    plan, rank, found = model._shardwise.plan, dist.get_rank(), {}
    for name, parameter in model.named_parameters():
        layout, shape = plan[name].layout, plan[name].shape
        cut = layout.cut(shape)
        if cut is None:
            found[name] = parameter.grad
            continue
        for piece in layout.pieces(shape, rank, plan.size):
            if piece.copies > 1:
                length = piece.local.stop - piece.local.start
                found[f"{name} from {piece.full.start}"] = parameter.grad.narrow(cut[0], piece.local.start, length)
    return found


def _generate(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Eight greedy tokens, and eight sampled ones, for which the ranks start from different seeds: the first one's is to
    count.
    """
    first = batches(model.device)[0]
    prompt = {"input_ids": first.input_ids, "attention_mask": first.attention_mask, "max_new_tokens": 8}
    greedy = model.generate(**prompt, do_sample=False)
    torch.manual_seed(SEED + (dist.get_rank() if dist.is_initialized() else 0))
    return greedy, model.generate(**prompt, do_sample=True)


def train(model: PreTrainedModel, steps: int = 3) -> dict[str, Tensor] | None:
    """The parameters after some steps of AdamW with clipping; on several ranks, on the first one."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2, weight_decay=0.1)
    for batch in batches(model.device)[:steps]:
        batch.loss(model).backward()
        shardwise.clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return shardwise.full_state_dict(model) if _is_sharded(model) else model.state_dict()


def train_sharded(path: Path) -> dict[str, Tensor] | None:
    """On every rank, of the shards."""
    return train(load_sharded(path))


@dataclass(frozen=True)
class Rounded:
    """What `measure_rounded` found on one rank, in float32."""

    logits: Tensor
    gradients: dict[str, Tensor] | None


def measure_rounded(model: nn.Module) -> Rounded:
    """Logits and gradients of one micro-batch, in the model's own dtype."""
    batch = batches(next(model.parameters()).device)[0]
    logits = model.train()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    batch.loss(model).backward()
    found = gradients(model)
    return Rounded(logits.detach().float(), found and {name: gradient.float() for name, gradient in found.items()})


def measure_rounded_sharded(path: Path, **overrides: object) -> Rounded:
    """On every rank, of the shards in bfloat16."""
    return measure_rounded(load_sharded(path, torch.bfloat16, **overrides))
