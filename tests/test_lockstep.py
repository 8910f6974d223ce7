"""Whether the ranks of one model are called with the same, and step alike: what is told, when, and at what cost."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaForCausalLM

import llamas
import shardwise
from shardwise.errors import MismatchError
from shardwise.rendezvous import say_to_all
from shardwise.testing import RankError, run_threads


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """Of one layer, with random weights."""
    torch.manual_seed(0)
    return llamas.llama(num_hidden_layers=1)


IDS = torch.arange(48).view(4, 12)


def parallel(model: nn.Module) -> tuple[nn.Module, int]:
    """This rank's part of a copy, and the rank."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    return shardwise.parallelize(copy.deepcopy(model), mesh), mesh.get_local_rank()


def told(rank_main) -> str:
    """What both ranks are told by `MismatchError`; the first one to raise ends the other."""
    with pytest.raises(RankError) as caught:
        run_threads(rank_main, 2)
    assert isinstance(caught.value.__cause__, MismatchError), caught.value
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda rank: {"input_ids": IDS[2 * rank : 2 * rank + 2]}, "input_ids on rank 1 is not that of rank 0"),
        (lambda rank: {"input_ids": IDS[:2, : 12 - rank]}, "(2, 11) int64"),
        (lambda rank: {"input_ids": IDS[:2]} | ({"labels": IDS[:2]} if rank else {}), "labels on rank 1 is not"),
        (lambda rank: {"inputs_embeds": torch.ones(2, 3, 32) * (1 + rank)}, "inputs_embeds on rank 1 is not"),
        (
            lambda rank: {"input_ids": IDS[:2], "attention_mask": torch.ones(2, 12).bool().tril(rank)},
            "attention_mask on rank 1",
        ),
    ],
)
def test_other_inputs_on_one_rank(llama, given, words):
    """Guards: a loader that deals batches to the ranks of one model, whose loss falls, and whose weights are nobody's."""

    def on_rank() -> None:
        model, rank = parallel(llama)
        model(**given(rank))

    said = told(on_rank)
    assert words in said
    assert "LlamaForCausalLM, call 1" in said
    assert "DistributedSampler" in said


def test_other_prompts_on_one_rank(llama):
    """Guards: a server's ranks that each take a request of their own, and all answer nonsense."""

    def on_rank() -> None:
        model, rank = parallel(llama)
        model.eval().generate(IDS[rank : rank + 1], max_new_tokens=3, attention_mask=torch.ones(1, 12))

    assert "input_ids on rank 1 is not that of rank 0" in told(on_rank)


def test_inputs_that_part_later(llama):
    """Guards: only the first batch being looked at, where a shuffle without a seed parts the ranks in the second epoch."""
    seen = [0, 0]

    def on_rank() -> None:
        model, rank = parallel(llama)
        for call in range(1, 9):
            model(input_ids=IDS if call < 5 or rank == 0 else IDS.flip(0))
            seen[rank] = call

    assert "call 8" in told(on_rank)
    assert seen == [7, 7]


def test_same_inputs_are_told_nothing(llama):
    """Guards: embeddings that differ by a rounding taken for other ones; more than calls 1, 2, 4 and 8 being looked at; the
    look of call 16 being part of what is watched.
    """
    looked: list[int] = []

    def on_rank() -> None:
        model, rank = parallel(llama)
        lockstep = model.__dict__["_shardwise"].lockstep
        compare = lockstep.compare

        def noted(*args: object) -> None:
            looked.extend([lockstep.calls[False]] if rank else [])
            compare(*args)

        lockstep.compare = noted
        embeddings = torch.linspace(-1, 1, 2 * 3 * 32).view(2, 3, 32) * (1 + 1e-6 * rank)
        model.eval()
        for _ in range(9):
            model(inputs_embeds=embeddings)
        with shardwise.trace_collectives():
            for _ in range(8):
                model(inputs_embeds=embeddings)

    run_threads(on_rank, 2)
    assert looked == [1, 2, 4, 8]


def steps(model: nn.Module, clip, count: int) -> None:
    """Train, and clip."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(count):
        model(input_ids=IDS, labels=IDS).loss.backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad()


def test_copies_that_drift_apart(llama):
    """Guards: torch's clipping, by the norm of each rank's own shards, after which the copies of the norms' weights part."""

    def on_rank() -> None:
        model, _ = parallel(llama)
        steps(model.train(), lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1), 17)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_threads(on_rank, 2)
    words = {str(one.message) for one in caught}
    assert any("layernorm.weight on ranks 0 and 1 have drifted apart" in one for one in words), words
    assert all("shardwise.clip_grad_norm_" in one for one in words)


def test_copies_that_stay_together(llama):
    """Guards: a warning in right training."""

    def on_rank() -> dict[str, Tensor]:
        model, _ = parallel(llama)
        steps(model.train(), lambda model: shardwise.clip_grad_norm_(model, 0.1), 9)
        return model.__dict__["_shardwise"].lockstep.start

    assert all(run_threads(on_rank, 2))


def test_rank_that_is_late_does_not_stop_the_others():
    """Guards: waiting for the words of a rank that is gone, where the next collective would say so at once."""
    done = threading.Event()

    def on_rank() -> dict[int, str]:
        rank = torch.distributed.get_rank()
        if rank:
            assert done.wait(30)
        heard = say_to_all([0, 1], "test", f"from {rank}", patience=0.01)
        done.set()
        return heard

    assert run_threads(on_rank, 2) == [{0: "from 0"}, {0: "from 0", 1: "from 1"}]
