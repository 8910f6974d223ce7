"""How a type is called that drafts for another model: with that model's last hidden states, its keys and its values."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models import batches

SHARING: dict[str, object] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
"""What a target's config says besides: two layers that read the keys of the two before, which are handed to the drafter."""


def drafted(target: PreTrainedModel) -> tuple[dict[str, object], ...]:
    """Two micro-batches, of what `target` makes of texts, of their last tokens. On ranks, the keys and values are the local
    heads', as those of a sharded target are.
    """
    return tuple(_drafted(target.eval(), batch.input_ids) for batch in batches()[:2])


def _drafted(target: PreTrainedModel, ids: Tensor) -> dict[str, object]:
    with torch.no_grad():
        seen = target(input_ids=ids, output_hidden_states=True, return_shared_kv_states=True)
        embedded = target.get_input_embeddings()(ids)
    inputs = torch.cat([embedded, seen.hidden_states[-1]], -1)[:, -1:]
    return {
        "inputs_embeds": inputs,
        "position_ids": torch.tensor([[ids.shape[1] - 1]]),
        "shared_kv_states": dict(seen.shared_kv_states),
    }


def assisted(model: PreTrainedModel, target: PreTrainedModel) -> Tensor:
    """Eight tokens of `target`, for which `model` drafts three at a time."""
    model.generation_config.num_assistant_tokens = 3
    ids = batches()[0].input_ids[:1]
    found: Tensor = target.eval().generate(ids, assistant_model=model, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return found
