"""Generating on several ranks: caches that hold a rank's own KV heads, and tokens that are in the vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import shardwise
from parity import types
from parity.job import quiet
from shardwise.errors import ShardwiseError

PROMPT = torch.tensor([[5, 99, 126, 17, 3], [64, 7, 7, 120, 33]])
ROOM = 16
VOCABULARY = 127  # a prime: on 2 and on 4 ranks one of them has a row less

# Full attention; sliding in turns with full, so that some layers' caches are shorter; norms, sinks and biases; fused q, k, v.
STATIC = ("llama", "qwen3", "gemma3_text", "cohere2", "gpt_oss", "phi3", "starcoder2", "mixtral")


def local(name: str, **options: object) -> PreTrainedModel:
    """The tiny model of a type: in this process, or on a rank its shards."""
    with quiet():
        model = types.build(name, eos_token_id=None, **options).eval()
    return shardwise.parallelize(model) if dist.is_initialized() else model


def static(name: str) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Eight tokens from a static cache of the caller's, and the shapes of its keys."""
    model = local(name)
    cache = StaticCache(model.config, max_cache_len=ROOM)
    tokens = model.generate(PROMPT, past_key_values=cache, max_new_tokens=8, do_sample=False)
    return tokens, [tuple(layer.keys.shape) for layer in cache.layers]


@pytest.mark.parametrize("name", STATIC)
def test_static_caches(name, pool4):
    """Guards: a cache for all KV heads of the config, into which a rank's own do not fit; two heads where ranks share one."""
    expected, plain = static(name)
    for tokens, shapes in pool4.run(static, name):
        assert torch.equal(tokens, expected)
        assert shapes == [(batch, 1, *room) for batch, heads, *room in plain]
    assert {shape[1] for shape in plain} == {2}


def named(name: str) -> Tensor:
    """Eight tokens with the static cache that `generate` makes."""
    return local(name).generate(PROMPT, max_new_tokens=8, do_sample=False, cache_implementation="static")


def test_static_caches_that_generate_makes(pool2, pool4):
    """Guards: as above, for a cache that is made from the config alone, with layers of two lengths."""
    expected = named("gemma3_text")
    for pool in (pool2, pool4):
        assert all(torch.equal(tokens, expected) for tokens in pool.run(named, "gemma3_text"))


def drawn(name: str, tied: bool) -> Tensor:
    """Some 2,000 tokens at a temperature at which all are about as likely."""
    model = local(name, tie_word_embeddings=tied)
    torch.manual_seed(11)
    return model.generate(PROMPT[:1], max_new_tokens=32, num_return_sequences=64, do_sample=True, temperature=100.0, top_k=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "inkling2_text"])
def test_padding_is_never_drawn(name, tied, pool2, pool4):
    """Guards: logits of rows that only fill the last rank's shard: with a value of zero they would be as likely as others."""
    expected = drawn(name, tied)
    assert expected.unique().tolist() == list(range(VOCABULARY))  # every id is drawn, those of the last rows too
    for pool in (pool2, pool4):
        assert all(torch.equal(tokens, expected) for tokens in pool.run(drawn, name, tied))


def batched_continuously() -> str:
    """On a rank: what it says."""
    model = local("llama")
    with pytest.raises(ShardwiseError):
        model.init_continuous_batching()
    with pytest.raises(ShardwiseError) as error:
        model.generate_batch([[5, 7, 9]], max_new_tokens=2)
    return str(error.value)


def test_continuous_batching_is_refused(pool2):
    """Guards: a paged cache for all heads, on which the thread that generates fails, so that there are no tokens."""
    assert "Continuous batching" in pool2.run(batched_continuously)[0]
