"""What the tests of PEFT's adapters share: adapters, and what a model with one gives, on one process and on ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import shardwise
from figures import gradient_error, gradients
from models import batches
from on_ranks import load

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERYTHING = [*LINEARS, "embed_tokens", "lm_head"]


def lora(**changes: object) -> LoraConfig:
    """A config whose numbers are those of no other dimension."""
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **changes})


def adapter(path: Path, folder: Path, seed: int = 5, **changes: object) -> Path:
    """A directory with a trained-looking adapter (B is not zero) for the checkpoint at `path`."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), lora(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@dataclass
class Found:
    """What a model with an adapter gives; gradients of the adapter, accumulated over one, two and three micro-batches."""

    logits: Tensor
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor] | None] = field(default_factory=list)
    norm: float = 0.0
    tokens: Tensor | None = None
    merged: Tensor | None = None
    stepped: Tensor | None = None


def measure(model: PeftModel) -> Found:
    """Everything that is compared; the model is merged in the end."""
    inner, batch = model.get_base_model(), batches()[0]
    found = Found(logits_of(model.eval()))
    model.train()
    for micro in batches():
        loss = micro.loss(model)
        loss.backward()
        found.losses.append(loss.item())
        found.gradients.append(gradients(inner))
    found.norm = shardwise.clip_grad_norm_(model, 1e3).item()
    found.tokens = model.eval().generate(input_ids=batch.input_ids, max_new_tokens=6, do_sample=False)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    found.stepped = logits_of(model)
    found.merged = logits_of(model.merge_and_unload())
    return found


def logits_of(model: nn.Module) -> Tensor:
    """Of the first batch, without a graph."""
    with torch.no_grad():
        return model(input_ids=batches()[0].input_ids).logits


def plain(path: Path, folder: Path) -> PeftModel:
    """In this process."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def measure_sharded(path: Path, folder: Path, **keywords: object) -> Found:
    """On a rank."""
    return measure(PeftModel.from_pretrained(load(path, **keywords), folder, is_trainable=True))


def compare(ranks: list[Found], expected: Found) -> None:
    """Float32 noise of sums of some hundred terms; a part that is missing or doubled is the size of the value itself."""
    for found in ranks:
        torch.testing.assert_close(found.logits, expected.logits, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(found.stepped, expected.stepped, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.merged, expected.merged, atol=1e-3, rtol=1e-3)
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        assert found.norm == pytest.approx(expected.norm, rel=1e-4)
        assert torch.equal(found.tokens, expected.tokens)
    assert all(expected.gradients)
    for found, wanted in zip(ranks[0].gradients, expected.gradients, strict=True):
        assert gradient_error(found, wanted) < 1e-3
