"""Generating on several ranks: caches that hold a rank's own KV heads, and tokens that are in the vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, StaticCache, StoppingCriteria

import shardwise
from parity import types
from parity.job import quiet
from shardwise.errors import MismatchError, ShardwiseError

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


def in_chunks(name: str) -> Tensor:
    """Eight tokens, the prompt read in pieces into a static cache, which `generate` allocates before."""
    return local(name).generate(PROMPT, max_new_tokens=8, do_sample=False, cache_implementation="static", prefill_chunk_size=2)


def test_static_cache_that_is_there_before_the_prompt(pool2):
    """Guards: a static cache allocated from the config, for the heads of all ranks."""
    expected = in_chunks("llama")
    assert all(torch.equal(tokens, expected) for tokens in pool2.run(in_chunks, "llama"))


class Gone(StoppingCriteria):
    """Says that it is enough after `calls` calls, or raises."""

    def __init__(self, calls: int, fails: bool = False) -> None:
        self.calls, self.fails = calls, fails

    def __call__(self, ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Every sequence at once."""
        self.calls -= 1
        if self.fails and self.calls == 0:
            raise OSError("the client has gone")
        return torch.full((len(ids),), self.calls <= 0)


class Reader:
    """A streamer whose reader goes away at the third call."""

    def __init__(self) -> None:
        self.calls = 0

    def put(self, tokens: Tensor) -> None:
        """Of the prompt, and then of each token."""
        self.calls += 1
        if self.calls == 3:
            raise BrokenPipeError("the reader has gone")

    def end(self) -> None:
        """Nothing is kept."""


def streamed() -> tuple[str, Tensor]:
    """On a rank: what is said where the first one's streamer fails, and the next tokens."""
    model, first = local("llama"), dist.get_rank() == 0
    with pytest.raises((BrokenPipeError, MismatchError)) as failure:
        model.generate(PROMPT[:1], max_new_tokens=40, do_sample=False, streamer=Reader() if first else None)
    return str(failure.value), model.generate(PROMPT, max_new_tokens=4, do_sample=False)


def test_a_streamer_that_fails(pool2):
    """Guards: a reader that goes away from the rank that streams: the others wait for it in the next token, and every call
    after that one is another one than theirs.
    """
    expected = local("llama").generate(PROMPT, max_new_tokens=4, do_sample=False)
    (first, tokens), (second, others) = pool2.run(streamed)
    assert first == "the reader has gone"
    assert second.startswith("generate: a streamer failed on rank 0")
    assert torch.equal(tokens, expected)
    assert torch.equal(others, expected)


def stopped() -> tuple[Tensor, str, float, str]:
    """On a rank: what the last one stops; what is said where the first one fails; how far max_time goes; other settings."""
    model, last = local("llama"), dist.get_rank() == dist.get_world_size() - 1
    long = {"max_new_tokens": 40, "do_sample": False, "num_beams": 2}
    tokens = model.generate(PROMPT, stopping_criteria=[Gone(3 if last else 99)], **long)
    with pytest.raises((OSError, MismatchError)) as failure:
        model.generate(PROMPT, stopping_criteria=[Gone(3, fails=not last)], **long)
    timed = model.generate(PROMPT, max_time=0.0 if last else 1e9, **long)
    with pytest.raises(MismatchError) as other:
        model.generate(PROMPT, do_sample=True, temperature=1.0 + dist.get_rank())
    return tokens, str(failure.value), timed.shape[1], str(other.value)


def test_ranks_stop_together(pool2):
    """Guards: a clock, or a client that is gone, on one rank: it stops, and the others wait for it in the next token. Ranks
    that sample by different settings, each its own text.
    """
    expected = local("llama").generate(PROMPT, max_new_tokens=3, do_sample=False, num_beams=2)
    (first, failed, length, other), (second, echo, *rest) = pool2.run(stopped)
    assert torch.equal(first, second)
    assert first.shape == expected.shape
    assert failed == "the client has gone"
    assert echo.startswith("generate: Gone failed on rank 0")
    assert [length, other] == rest
    assert length == PROMPT.shape[1] + 1
    assert "the setting temperature on rank 1 is not that of rank 0" in other
