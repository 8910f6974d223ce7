"""Who is compared: each makes this rank's model from the checkpoint, on the ranks and the process group that are there."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch.distributed.device_mesh import DeviceMesh

import shardwise
from shardwise.errors import ShardwiseError, describe
from shardwise.mesh import local_device
from shardwise.plan import Plan
from shardwise.profiling.settings import DTENSOR, OURS, TRANSFORMERS, Settings

_DTENSOR_SINCE = (5, 16)


def build(name: str, settings: Settings, mesh: DeviceMesh) -> Any:
    """The model of a contender, of `OURS` and `PEERS`, on this rank's device. Collective."""
    makers: dict[str, Callable[[Settings, DeviceMesh], Any]] = {OURS: _ours, DTENSOR: _dtensor, TRANSFORMERS: _transformers}
    return makers[name](settings, mesh)


def what_it_is(name: str) -> str:
    """A contender in a few words, with the version that is installed."""
    if name == OURS:
        return f"shardwise {shardwise.__version__}: plain tensors"
    if name == DTENSOR:
        return f"torch {torch.__version__}: parallelize_module with its own ColwiseParallel and RowwiseParallel"
    made_of = "DTensor" if _uses_dtensors() else "plain tensors with hooks"
    return f'transformers {transformers.__version__}: from_pretrained(tp_plan="auto"), {made_of}'


def check_peers(settings: Settings, plan: Plan) -> None:
    """Raise `ShardwiseError` where a peer needs a package that is not there, or can't do what the model's `plan` says."""
    if DTENSOR in settings.against:
        from shardwise.profiling.dtensor import styles  # loads DTensor, which nobody else needs

        styles(plan)
    if TRANSFORMERS in settings.against and find_spec("accelerate") is None:
        raise ShardwiseError(
            describe(
                "--against transformers: its tensor parallelism needs the package accelerate, which is not installed.",
                either=["pip install accelerate, or", "leave transformers out of --against"],
            )
        )


def _ours(settings: Settings, mesh: DeviceMesh) -> Any:
    return shardwise.AutoModelForCausalLM.from_pretrained(
        settings.path, dtype=getattr(torch, settings.dtype), tp_plan="auto", device_mesh=mesh
    )


def _dtensor(settings: Settings, mesh: DeviceMesh) -> Any:
    from shardwise.profiling.dtensor import parallelized

    model = transformers.AutoModelForCausalLM.from_pretrained(settings.path, dtype=getattr(torch, settings.dtype))
    return parallelized(model, mesh).to(local_device(mesh))


def _transformers(settings: Settings, mesh: DeviceMesh) -> Any:
    keywords: dict[str, Any] = {"tp_plan": "auto"}
    if _uses_dtensors():
        from transformers.distributed import DistributedConfig

        keywords = {"distributed_config": DistributedConfig(tp_size=mesh.size(), tp_plan="auto")}
    return transformers.AutoModelForCausalLM.from_pretrained(settings.path, dtype=getattr(torch, settings.dtype), **keywords)


def _uses_dtensors() -> bool:
    return tuple(map(int, transformers.__version__.split(".")[:2])) >= _DTENSOR_SINCE
