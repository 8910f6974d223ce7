"""Attention weights that are asked for: those of all heads, on every rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import BartForConditionalGeneration, PreTrainedModel

import shardwise
from shardwise import tiny
from shardwise.errors import ShardwiseError
from shardwise.hf import gather_attentions

IDS = torch.arange(3, 27).view(2, 12)
KINDS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
UNEVEN = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}


def weights_of(model: PreTrainedModel) -> list[Tensor]:
    """Of every layer: what forward gives, by name and as a tuple, what it gives while it generates; and a gradient through."""
    model.eval()
    output = model(input_ids=IDS, output_attentions=True)
    found = [tensor for kind in KINDS for tensor in output.get(kind) or ()]
    plain = model(input_ids=IDS, output_attentions=True, return_dict=False, use_cache=False)
    found += [tensor for part in plain if isinstance(part, tuple) for tensor in part]
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}
    generated = model.generate(input_ids=IDS, max_new_tokens=2, output_attentions=True, **options)
    found += [tensor for kind in KINDS[:2] for step in generated.get(kind) or () for tensor in step]
    sum((tensor * torch.arange(tensor.shape[1]).view(-1, 1, 1) * tensor).sum() for tensor in found[:2]).backward()
    return [tensor.detach() for tensor in found if tensor is not None]


def build(name: str, options: dict[str, object]) -> PreTrainedModel:
    """The same in every process, with attention that has weights to give."""
    if name == "bart":  # tiny.build gives its decoder
        options = {"is_encoder_decoder": True, **options}
        model = tiny.randomised(lambda: BartForConditionalGeneration(tiny.config(name, **options)))
    else:
        model = tiny.build(name, **options)
    model.set_attn_implementation("eager")
    return model


def on_rank(name: str, options: dict[str, object]) -> tuple[list[Tensor], dict[str, Tensor] | None]:
    """On a rank: the weights, and the gradients."""
    model = shardwise.parallelize(build(name, options))
    return weights_of(model), shardwise.full_gradients(model)


@pytest.mark.parametrize(
    ("name", "pool", "options"),
    [
        ("llama", "shm2", {}),
        ("llama", "shm4", {}),
        ("llama", "shm2", UNEVEN),
        ("bart", "shm2", {"decoder_attention_heads": 8, "decoder_start_token_id": 2, "forced_eos_token_id": None}),
        ("diffllama", "shm2", {}),
        ("prophetnet", "shm2", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*generation flags")
def test_weights_of_all_heads(name, pool, options, request):
    """Guards: a rank that gives the weights of its own heads only, or those of all ranks in another order, with a gradient of
    its own heads or of all ranks' sum.
    """
    model = build(name, options)
    expected = weights_of(model)
    assert expected
    found = request.getfixturevalue(pool).run(on_rank, name, options)
    for weights, _ in found:
        torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[0][1], shardwise.full_gradients(model), atol=1e-4, rtol=1e-3)


def test_heads_that_nobody_knows(threads):
    """Guards: weights of which it can't be told whose heads they are, given out as if they were all of them."""
    model = tiny.build("llama")
    output = model(input_ids=IDS)

    def run() -> None:
        mesh = dist.init_device_mesh("cpu", (2,))
        output["attentions"] = (torch.zeros(2, 3, 12, 12),)
        with pytest.raises(ShardwiseError, match=r"whose heads are the attentions of the ranks, \[3, 3\] of them"):
            gather_attentions(output, model.config, mesh)

    threads(run, 2)
