"""What a rank measures: training steps of two models, which differ in `overlap`, on a network of several delays.

The rank is alone in its process and on the machine, one of two by torch's fake process group: what it waits for is the delay
and nothing else, and no second process takes the time of its cores.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import shardwise
from shardwise.testing.delayed import DelayedGroup, delayed_mesh
from shardwise.testing.fake import fake_rank


@dataclass(frozen=True)
class Setting:
    """The model, its input, and how often what is measured; `delays` in milliseconds a collective."""

    delays: tuple[float, ...]
    rounds: int
    ranks: int = 2
    layers: int = 8
    width: int = 512
    inner: int = 1408
    vocabulary: int = 1024
    batch: int = 2
    tokens: int = 256


@dataclass(frozen=True)
class Step:
    """Milliseconds of a training step, and how many of them it waited for collectives."""

    total: float
    blocked: float


@dataclass(frozen=True)
class Seen:
    """The steps by delay, without overlap and with it, in the order of the rounds; and what the weight gradients that can run
    during all-reduces take in a step, in milliseconds.
    """

    plain: dict[float, list[Step]]
    overlapped: dict[float, list[Step]]
    weight_gradients: float


def measure(setting: Setting) -> Seen:
    """Rounds of all delays, each with overlap and without, the first of the two by turns."""
    torch.set_num_threads(1)
    with fake_rank(setting.ranks):
        mesh = delayed_mesh(backend="fake")
        group = mesh.get_group()
        assert isinstance(group, DelayedGroup)
        models = {overlap: shardwise.parallelize(_model(setting), mesh, overlap=overlap) for overlap in (False, True)}
        ids = torch.arange(setting.batch * setting.tokens).view(setting.batch, -1) % setting.vocabulary
        for model in models.values():
            for _ in range(3):
                _step(model, ids, group)
        found = {overlap: {delay: [] for delay in setting.delays} for overlap in models}
        for turn in range(setting.rounds):
            for delay in setting.delays:
                group.delay = delay / 1000
                for overlap in (bool(turn % 2), not turn % 2):
                    found[overlap][delay].append(_step(models[overlap], ids, group))
        group.delay = 0.0
        return Seen(found[False], found[True], _weight_gradients(models[True], ids, group))


def _model(setting: Setting) -> PreTrainedModel:
    heads = max(setting.width // 64, 2)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=setting.vocabulary,
            hidden_size=setting.width,
            intermediate_size=setting.inner,
            num_hidden_layers=setting.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=setting.tokens,
        )
    ).train()


def _step(model: PreTrainedModel, ids: Tensor, group: DelayedGroup) -> Step:
    for parameter in model.parameters():
        parameter.grad = None
    start, group.blocked = time.perf_counter(), 0.0
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return Step(1000 * (time.perf_counter() - start), 1000 * group.blocked)


def _weight_gradients(model: PreTrainedModel, ids: Tensor, group: DelayedGroup, steps: int = 5) -> float:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            _step(model, ids, group)
    events = [event for event in seen.events() if event.name == "WeightGradientBackward"]
    return sum(event.cpu_time_total for event in events) / 1000 / steps
