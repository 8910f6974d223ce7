"""The process groups: the backend of the default one on a machine with GPUs (played on the CPU), and that it stays alone."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import shardwise
from llamas import llama
from shardwise import mesh, process_group
from shardwise.errors import MeshError, MissingRankError
from shardwise.rendezvous import meeting_place
from shardwise.testing import RankPool


def _started(devices: dict[str, str]) -> tuple[str, int, list[str]]:
    """The backend that is asked for, the device that is chosen, and what is said, on a rank whose GPU has this name."""
    asked: list[tuple[str, int, int]] = []
    chosen: list[int] = []
    said: list[str] = []
    name = devices[os.environ["RANK"]]
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("shardwise").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
        patch.setattr(torch.accelerator, "set_device_index", chosen.append)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=name))
        patch.setattr(
            dist, "init_process_group", lambda backend, store, rank, world_size: asked.append((backend, rank, world_size))
        )
        process_group.start_process_group("cuda")
    logging.getLogger("shardwise").removeHandler(handler)
    ((backend, rank, size),) = asked
    assert (str(rank), str(size)) == (os.environ["RANK"], os.environ["WORLD_SIZE"])
    return backend, chosen[0], said


@pytest.fixture(scope="module")
def unstarted():
    """Two processes without a process group."""
    with RankPool(2, backend=None, start_method="forkserver") as pool:
        yield pool


def test_ranks_that_share_a_gpu_get_gloo(unstarted):
    """Guards: nccl for two ranks on one GPU, which it refuses at the first collective; nothing said about the slow way."""
    first, second = unstarted.run(_started, {"0": "GPU-a", "1": "GPU-a"}, fresh=True)
    assert first[:2] == second[:2] == ("gloo", 0)
    assert len(first[2]) == 1
    assert "Ranks 0 and 1 share a GPU" in first[2][0]
    assert second[2] == []


def test_ranks_that_each_see_one_gpu_of_their_own_get_nccl(unstarted):
    """Guards: the slow way taken because a rank sees fewer GPUs than there are ranks, where the launcher hid the others."""
    for backend, device, said in unstarted.run(_started, {"0": "GPU-a", "1": "GPU-b"}, fresh=True):
        assert (backend, device, said) == ("cpu:shm,cuda:nccl", 0, [])


def _new_groups() -> int:
    """How many process groups there are more after a model was made parallel, twice."""
    mesh.tp_mesh()
    before = len(dist.distributed_c10d._world.pg_map)
    for _ in range(2):
        torch.manual_seed(0)
        shardwise.parallelize(llama())
    return len(dist.distributed_c10d._world.pg_map) - before


def test_models_on_all_ranks_share_the_default_group(pool2):
    """Guards: groups for each model that is loaded, whose gloo threads poll as long as the process lives (a test run with
    thousands of them took half its time for that), and which on GPUs each keep device memory.
    """
    assert pool2.run(_new_groups) == [0, 0]


def _started_as(changes: dict[str, str], timeout: float) -> str:
    """What is said of variables of which some are changed, on the first of the ranks that they name."""
    if dist.is_initialized() or os.environ["RANK"] != "0":
        return ""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": "0", **changes}.items():
            patch.setenv(name, value)
        with pytest.raises((MeshError, MissingRankError)) as caught:
            meeting_place(timeout)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "2"}, "RANK=2 is none of the WORLD_SIZE=2 ranks"),
        ({"RANK": "-1"}, "RANK=-1 is none of"),
        ({"RANK": "one"}, "RANK='one' is no number"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR expected, but not set"),
        ({"WORLD_SIZE": "3"}, "after 0.5 s, not all of the 3 ranks have come"),
    ],
    ids=["beyond", "negative", "no number", "no address", "never started"],
)
def test_variables_that_are_wrong(changes, said, unstarted):
    """Guards: ranks that wait for half an hour for one that is not there, or that counts from 1."""
    first, _ = unstarted.run(_started_as, changes, 0.5)
    assert said in first
    assert "torchrun" in first


@pytest.mark.parametrize(("name", "other"), [("WORLD_SIZE", "RANK"), ("RANK", "WORLD_SIZE")])
def test_half_of_a_launcher(name, other, monkeypatch):
    """Guards: two processes that each load the whole model, as RANK was not handed on to them."""
    monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "2")
    with pytest.raises(MeshError, match=f"{name}=2 is set, and {other} is not"):
        mesh.tp_mesh()
    monkeypatch.setenv(name, {"WORLD_SIZE": "1", "RANK": "0"}[name])
    assert mesh.tp_mesh() is None
