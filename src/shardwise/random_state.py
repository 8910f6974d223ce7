"""The ranks' random states in step: what all have in common, they must draw alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from shardwise.mesh import local_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def same_random_state(mesh: DeviceMesh) -> None:
    """Give every rank the first rank's random state, so that sampling draws the tokens that one process would, and dropout
    the same elements of what all ranks compute. Collective.

    The states are torch's, on GPUs also that of the device, and numpy's, from which speech models draw what they mask.
    """
    _same_numpy_state(mesh)
    state = torch.get_rng_state()
    if mesh.device_type == "cpu":
        dist.broadcast(state, group=mesh.get_group(), group_src=0)
        torch.set_rng_state(state)
        return
    module = torch.get_device_module(mesh.device_type)
    device = torch.accelerator.current_device_index()
    for read, write in ((torch.get_rng_state, torch.set_rng_state), (module.get_rng_state, module.set_rng_state)):
        state = read().to(torch.device(mesh.device_type, device))
        dist.broadcast(state, group=mesh.get_group(), group_src=0)
        write(state.cpu())


def _same_numpy_state(mesh: DeviceMesh) -> None:
    state = np.random.get_state(legacy=False)
    generator = state["state"]
    bits = np.float64(state["gauss"]).view(np.int64)
    found = [*generator["key"].tolist(), generator["pos"], state["has_gauss"], int(bits)]
    numbers = torch.tensor(found, device=local_device(mesh))
    dist.broadcast(numbers, group=mesh.get_group(), group_src=0)
    *key, position, has_gauss, gauss = numbers.tolist()
    first = {"key": np.array(key, dtype=np.uint32), "pos": position}
    np.random.set_state({**state, "state": first, "has_gauss": has_gauss, "gauss": float(np.int64(gauss).view(np.float64))})
