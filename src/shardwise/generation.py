"""What `generate` needs beyond the model's own: every rank must draw the same random numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def same_random_state(mesh: DeviceMesh) -> None:
    """Give every rank the first rank's random state, so that sampling draws the same tokens, those that one process would.
    Collective.

    On GPUs both the CPU's and the device's generator are set.
    """
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
