"""Fixtures for the three rings: `threads` (milliseconds), `pool2` and `pool4` (processes), and the marker `gpu`."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator

# Before anything imports huggingface_hub, which reads it once: no test asks the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

import gpus
from shardwise.testing import RankPool, run_threads

# What every rank imports, once for all that are forked.
multiprocessing.set_forkserver_preload(["shardwise", "shardwise.testing.worker", "parity.suite"])

# No deadline: how long an example takes says more about the machine than about the code.
settings.register_profile("shardwise", max_examples=300, deadline=None)
settings.load_profile("shardwise")


@pytest.fixture(scope="session")
def pool2() -> Iterator[RankPool]:
    """Two gloo processes, started by the first test that runs something on them."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool4() -> Iterator[RankPool]:
    """Four gloo processes, started by the first test that runs something on them."""
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def shm2() -> Iterator[RankPool]:
    """Two processes that exchange through shared memory, as `torchrun` gives them on CPUs."""
    with RankPool(2, backend="cpu:shm", start_method="forkserver") as pool:
        yield pool


@pytest.fixture(scope="session")
def shm4() -> Iterator[RankPool]:
    """Four of them. Cheaper than `pool4`: gloo's threads spin, and share the cores with whom they wait for. And forked."""
    with RankPool(4, backend="cpu:shm", start_method="forkserver") as pool:
        yield pool


@pytest.fixture(scope="session")
def threads() -> object:
    """`run_threads`: every rank a thread of this process."""
    return run_threads


def switches() -> dict[str, object]:
    """Those of torch's that hold for the whole process and are read by whatever runs next."""
    return {
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def nothing_left_on() -> Iterator[None]:
    """Fails the test that changed a switch of the process, not the one that runs into it later."""
    before = switches()
    yield
    assert switches() == before


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """How `pytest -n` deals the tests."""
    from scheduling import ByFile

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where torch sees no CUDA device, unless they are rehearsed on the CPU."""
    if hasattr(config, "workerinput"):
        from scheduling import filling_last

        filling_last(items)
    if torch.cuda.is_available() or gpus.REHEARSED:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
