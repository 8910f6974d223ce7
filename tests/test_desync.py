"""Ranks that part are told so, at the collective where they do, and where each of them stands."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import shardwise
from llamas import IDS, llama
from models import config
from on_ranks import world
from shardwise.errors import MeshError, MismatchError, MissingRankError, ShardwiseError

SHORT = 1.0  # seconds: what a late rank is given


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return shardwise.parallelize(llama(), world("tp")).train()


def _part(kind: str) -> tuple[type, str, Tensor]:
    """The error on this rank when the ranks part, and a sum over them afterwards, which only works if nothing was begun."""
    model, rank = _model(), dist.get_rank()
    ids = IDS[:, :-1] if rank == 1 and kind == "shape" else IDS
    try:
        with shardwise.trace_collectives(check=True, timeout=SHORT):
            loss = model(input_ids=ids, labels=ids).loss
            if kind == "backward" and rank == 1:
                model(input_ids=ids)
            if kind == "raises" and rank == 1:
                raise ValueError("a bad batch")
            if kind == "late" and rank == 1:
                time.sleep(3 * SHORT)
            loss.backward()
    except (ShardwiseError, ValueError) as error:
        found = error
    total = torch.full((3,), float(rank + 1))
    dist.all_reduce(total)
    return type(found), str(found), total


@pytest.mark.parametrize("backend", ["gloo", "shm"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("shape", ["float32 (2, 12, 32), model.embed_tokens", "float32 (2, 11, 32), model.embed_tokens", "it is the first"]),
        ("backward", ["backward all_reduce of float32 (2, 12, 32), lm_head", "forward all_reduce", "all_gather of float32"]),
    ],
)
def test_different_collectives(kind, said, backend, pool2, shm2):
    """Guards: a hang, numbers made of two different sums, or an error that shows one side of it."""
    for error, text, total in {"gloo": pool2, "shm": shm2}[backend].run(_part, kind):
        assert issubclass(error, MismatchError)
        assert not issubclass(error, MissingRankError)
        assert all(words in text for words in [*said, "test_desync.py", "in _part: "]), text
        assert total.tolist() == [3.0] * 3


def test_a_rank_that_fails(pool2):
    """Guards: waiting in vain for a rank that has raised, without a word of why."""
    (waiting, text, _), (failed, _, _) = pool2.run(_part, "raises")
    assert issubclass(failed, ValueError)
    assert issubclass(waiting, MissingRankError)
    assert "rank 1 will not come to collective" in text
    assert "it left the block by ValueError: a bad batch." in text
    assert "waiting  rank 0: backward all_reduce of float32 (2, 12, 32), lm_head" in text


def test_a_rank_that_is_late(pool2):
    """Guards: a time-out that names the rank that waits, not the one that is missing, and not where that one is."""
    (waiting, text, _), _ = pool2.run(_part, "late")
    assert issubclass(waiting, MissingRankError)
    assert f"rank 1 did not come to collective 7 of ranks 0, 1 within {SHORT:g} s" in text
    assert "test_desync.py" in text
    assert "time.sleep(3 * SHORT)" in text


def _alone() -> str:
    if dist.get_rank() == 1:
        return ""
    with pytest.raises(MissingRankError) as caught, shardwise.trace_collectives(check=True, timeout=SHORT):
        raise AssertionError("not reached")
    return str(caught.value)


def test_a_rank_that_does_not_check(pool2):
    """Guards: a rank that alone compares, and waits for nobody; and a count of blocks that this leaves out of step."""
    assert "trace_collectives(check=True): after 1 s, rank 1 had not called it" in pool2.run(_alone)[0]
    assert all(same for same, _, _ in pool2.run(_same))


def _stopped() -> str:
    processes: list[int] = [0, 0]
    dist.all_gather_object(processes, os.getpid())
    try:
        with shardwise.trace_collectives(check=True, timeout=SHORT):
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            dist.all_reduce(torch.zeros(2))
    except MissingRankError as error:
        os.kill(processes[1], signal.SIGCONT)
        return str(error)
    return ""


def test_a_rank_that_does_not_answer(pool2):
    """Guards: waiting for the answer of a process that is gone or stopped."""
    first, second = pool2.run(_stopped)
    assert "rank 1   does not answer: its process has ended or is stopped" in first
    assert "rank 0 will not come" in second


def _crossed() -> tuple[str, float]:
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1, 2])]
    if dist.get_rank() > 1:
        with suppress(MissingRankError), shardwise.trace_collectives(check=True, timeout=30.0):
            _sum_in(groups[1:] if dist.get_rank() == 2 else [])
        return "", 0.0
    order = groups if dist.get_rank() == 0 else groups[::-1]
    began = time.monotonic()
    with pytest.raises(MissingRankError) as caught, shardwise.trace_collectives(check=True, timeout=30.0):
        _sum_in(order)
    return str(caught.value), time.monotonic() - began


def _sum_in(groups: list[dist.ProcessGroup]) -> None:
    for group in groups:
        dist.all_reduce(torch.zeros(2), group=group)


def test_two_groups_in_another_order(pool4):
    """Guards: the deadlock of ranks that each wait in a group for the other, found only when the time is over."""
    first, second, *_ = pool4.run(_crossed)
    for text, seconds in (first, second):
        assert seconds < 20
        assert "wait for each other" in text or "left the block" in text
        assert "all_reduce of float32 (2,)" in text
    assert "wait for each other" in first[0] + second[0]


def _uneven() -> list[float]:
    rank = dist.get_rank()
    with shardwise.trace_collectives(check=True, timeout=30.0) as trace:
        received = torch.empty(3 if rank == 0 else 2, 2)
        sent = torch.full((1 if rank == 0 else 4, 2), float(rank))
        dist.all_to_all_single(received, sent, [0, 3] if rank == 0 else [1, 1], [0, 1] if rank == 0 else [3, 1])
        if rank == 0:
            dist.send(torch.ones(2), 1)
        else:
            dist.recv(torch.zeros(2), 0)
    return [*received[:, 0].tolist(), float(len(trace))]


def test_sizes_that_may_differ(shm2):
    """Guards: an alarm for rows and messages of which each rank rightly has its own number."""
    assert shm2.run(_uneven) == [[1.0, 1.0, 1.0, 2.0], [0.0, 1.0, 2.0]]


def _same() -> tuple[bool, list[object], list[object]]:
    model = _model()
    with shardwise.trace_collectives() as plain:
        expected = model(input_ids=IDS, labels=IDS).loss
        expected.backward()
    with shardwise.trace_collectives(check=True) as checked:
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
    return bool(torch.equal(loss, expected)), [one.what for one in plain], [one.what for one in checked]


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_ranks_that_agree(backend, pool2, shm2):
    """Guards: a check that alarms or changes anything where nothing is wrong."""
    for same, plain, checked in {"gloo": pool2, "shm": shm2}[backend].run(_same):
        assert same
        assert plain == checked
        assert len(plain) > 8


def _everything(name: str, folder: str, **how: object) -> int:
    kind = shardwise.AutoModelForCausalLM
    model = kind.from_config(config(name), tp_plan="auto", **how).train()
    with shardwise.trace_collectives(check=True, timeout=60.0) as trace:
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
        shardwise.clip_grad_norm_(model, 1.0)
        shardwise.full_gradients(model)
        model.save_pretrained(folder)
        model = kind.from_pretrained(folder, tp_plan="auto", **how)
        model.generate(IDS, max_new_tokens=2, do_sample=True)
        dist.all_gather_object([None, None], "x" * (1 + dist.get_rank()))
    return len(trace)


@pytest.mark.parametrize(("name", "how"), [("llama", {}), ("mixtral", {"ep_size": 2})])
def test_whatever_ranks_do_together(name, how, shm2, tmp_path):
    """Guards: an alarm where all is well: uneven vocabularies, dealt experts, saving, loading, sampling."""
    first, second = shm2.run(_everything, name, str(tmp_path), **how)
    assert first == second > 60


def test_without_a_process_group():
    """Guards: torch's own error, which does not say what to do."""
    with pytest.raises(MeshError, match="there is no process group yet"), shardwise.trace_collectives(check=True):
        raise AssertionError("not reached")
