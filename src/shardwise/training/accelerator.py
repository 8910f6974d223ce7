"""accelerate's `Accelerator` of a tensor-parallel model: the processes that it counts are the replicas.

The ranks of one tp axis compute one model: they are dealt the same batches, and what they have found counts once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import find_batch_size, recursively_apply
from torch import Tensor

from shardwise.errors import ShardwiseError, describe
from shardwise.mesh import all_replicas

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def replicas(mesh: DeviceMesh) -> list[list[int]]:
    """The ranks of each replica of the model that lies on `mesh`, the tp axis, in order.

    Raises `ShardwiseError` where there are processes that have no part of it.
    """
    if sorted(all_replicas(mesh)) != list(range(dist.get_world_size())):
        raise ShardwiseError(
            describe(
                f"The model lies on {len(all_replicas(mesh))} of {dist.get_world_size()} processes, and a Trainer runs on all.",
                either=[
                    "load it with tp_size=..., without a device_mesh: the others are replicas, or",
                    "start fewer processes",
                ],
            )
        )
    root = mesh._get_root_mesh()
    axis = (root.mesh_dim_names or ()).index((mesh.mesh_dim_names or ("",))[0])
    rows: list[list[int]] = root.mesh.movedim(axis, -1).reshape(-1, mesh.size()).tolist()
    return rows


def count_replicas(accelerator: Accelerator, mesh: DeviceMesh) -> None:
    """Make `accelerator` deal batches to, and gather from, the replicas of the model on `mesh`, the tp axis. In place."""
    accelerator.__dict__["_replicas"] = replicas(mesh)
    accelerator.dataloader_config.dispatch_batches = False  # the first process would deal a part of a batch to each
    base = type(accelerator)
    accelerator.__class__ = type(f"Replica{base.__name__}", (_Replicas, base), {"__module__": __name__})


def counts_replicas(accelerator: Accelerator) -> bool:
    """Whether `count_replicas` has been called for `accelerator`."""
    return isinstance(accelerator, _Replicas)


def count_last_batch(accelerator: Accelerator, inputs: Any) -> None:
    """Of a dataset without length, read by one replica, say how many samples the last batch has, as accelerate does in one
    process: what is gathered is cut to it. In place.

    Args:
        accelerator: what dealt the batch.
        inputs: the batch that is evaluated now.
    """
    progress = accelerator.gradient_state
    if progress.end_of_dataloader and progress.remainder == -1 and (samples := find_batch_size(inputs)) is not None:
        progress.active_dataloader.remainder = samples


class _Replicas:
    """Mixed in front of an `Accelerator`."""

    _replicas: list[list[int]]
    gradient_state: Any

    @property
    def num_processes(self) -> int:
        """Replicas."""
        return len(self._replicas)

    @property
    def process_index(self) -> int:
        """Of which replica this rank is."""
        return next(index for index, ranks in enumerate(self._replicas) if dist.get_rank() in ranks)

    def gather(self, tensor: Any) -> Any:
        """What the replicas have, one after the other. Collective."""
        return recursively_apply(self._once, super().gather(tensor))  # type: ignore[misc]

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As accelerate's, of the replicas. Tensors are gathered as tensors; objects come in a list, but of one replica."""
        try:
            recursively_apply(lambda x: x, input_data, error_on_other_type=True)
            objects = use_gather_object and not isinstance(input_data, Tensor)
        except TypeError:
            objects = True
        if objects and self.num_processes == 1:
            last = self.gradient_state.remainder if self.gradient_state.end_of_dataloader else 0
            return input_data[:last] if last > 0 and isinstance(input_data, list | tuple) else input_data
        if objects and dist.get_rank() not in [ranks[0] for ranks in self._replicas]:
            input_data = type(input_data)()
        return super().gather_for_metrics(input_data, use_gather_object=objects)  # type: ignore[misc]

    def reduce(self, tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
        """The sum or the mean over the replicas. Collective."""
        total = super().reduce(tensor, reduction=reduction, scale=scale)  # type: ignore[misc]
        size = len(self._replicas[0])
        return total if reduction != "sum" else recursively_apply(lambda t: (t / size).to(t.dtype), total)

    def _once(self, everyone: Tensor) -> Tensor:
        world = sum(map(len, self._replicas))
        firsts = [ranks[0] for ranks in self._replicas]
        return everyone.view(world, -1, *everyone.shape[1:])[firsts].flatten(0, 1)
