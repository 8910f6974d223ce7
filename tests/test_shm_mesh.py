"""Where nobody has started a process group: shared memory, unless somebody refuses it or the ranks cannot."""

from __future__ import annotations

import os
import platform

import pytest
import torch
import torch.distributed as dist

import shardwise
from llamas import llama
from shardwise import mesh, process_group
from shardwise.testing import RankPool

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def unstarted():
    """Two processes, of which each run forms a group."""
    with RankPool(2, backend=None, start_method="forkserver") as pool:
        yield pool


def _started(port: int, refused: dict[int, str], machines: dict[int, str]) -> str:
    rank = int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_PORT", str(port))
        patch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
        if rank in refused:
            patch.setenv(process_group.CPU_BACKEND, refused[rank])
        if rank in machines:
            patch.setattr(platform, "machine", lambda: machines[rank])
        axis = mesh.tp_mesh()
        try:
            x = torch.ones(2)
            dist.all_reduce(x, group=axis.get_group())
            assert x.tolist() == [2.0, 2.0]
            return dist.get_backend_config()
        finally:
            dist.destroy_process_group()


def _free_port() -> int:
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.parametrize(
    ("refused", "machines", "expected"),
    [({}, {}, "cpu:shm"), ({1: "gloo"}, {}, "cpu:gloo"), ({}, {1: "aarch64"}, "cpu:gloo"), ({}, {0: "aarch64"}, "cpu:gloo")],
)
def test_all_ranks_start_with_the_same_backend(unstarted, refused, machines, expected):
    """Guards: ranks with different backends, which wait for each other for ever, where one refuses shm or cannot have it."""
    assert unstarted.run(_started, _free_port(), refused, machines, timeout=60) == [expected] * 2


def test_an_unknown_backend_is_named(monkeypatch):
    """Guards: a mistyped value taken for the default."""
    monkeypatch.setenv(process_group.CPU_BACKEND, "golo")
    with pytest.raises(shardwise.MeshError, match="SHARDWISE_CPU_BACKEND=golo names no backend"):
        process_group._wanted_cpu_backend()


def _refused(port: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_PORT", str(port))
        patch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
        if os.environ["RANK"] == "1":
            patch.setattr(platform, "machine", lambda: "aarch64")
        try:
            dist.init_process_group("shm")
        except shardwise.MeshError as error:
            return str(error)
        return "nothing"


def test_shm_asked_for_by_name_is_an_error_where_it_cannot_be(unstarted):
    """Guards: stores that another machine reorders, so that a rank reads what has not been written yet."""
    for text in unstarted.run(_refused, _free_port(), timeout=60):
        assert "on rank 1, it needs the order of stores that x86-64 promises, and this machine is aarch64" in text


def _step() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = shardwise.parallelize(llama())
    torch.manual_seed(0)
    ids = torch.randint(0, 16, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def test_a_model_trains_as_over_gloo(pool2):
    """Guards: what only the whole package asks of a process group."""
    with RankPool(2, backend="cpu:shm", start_method="forkserver") as pool:
        for ours, theirs in zip(pool.run(_step), pool2.run(_step), strict=True):
            torch.testing.assert_close(ours, theirs)
