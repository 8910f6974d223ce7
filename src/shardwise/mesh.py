"""The tp axis: from torchrun's environment, or from a `DeviceMesh` that the caller has.

Nothing is kept here: a mesh travels with the modules that use it, so two models on two meshes live side by side. A `DeviceMesh`
(not a process group) is what modules hold, because it can be deep-copied and pickled.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardwise.errors import MeshError, describe
from shardwise.process_group import check_variables, settle_at_exit, start_process_group
from shardwise.rendezvous import START_TIMEOUT, meet_ranks

TP_AXIS = "tp"


def started_ranks(otherwise: int) -> int:
    """How many processes torchrun has started; `otherwise` where it has not."""
    return int(os.environ.get("WORLD_SIZE", otherwise))


def tp_mesh(tp_size: int | None = None, device_mesh: DeviceMesh | None = None, ep_size: int | None = None) -> DeviceMesh | None:
    """The one-dimensional mesh of the tp axis, or None where there is only one process.

    Args:
        tp_size: ranks on the axis; by default all of them. With fewer, neighbouring ranks form an axis, and the rest is data
            parallel.
        device_mesh: a mesh of the caller's: its axis named `"tp"`, or its only axis.
        ep_size: ranks to which experts will be dealt, see `expert_axis`.

    Starts the default process group when nobody has and torchrun's variables are set, see `start_process_group`.
    Raises `MeshError` for sizes that the processes cannot form, where several ranks are asked of a single process, and for
    variables that are wrong; `MissingRankError` when some process never comes; `MismatchError` when ranks ask for other sizes.
    """
    _check_kinds(tp_size, device_mesh)
    if device_mesh is not None:
        settle_at_exit()
        return _given_axis(device_mesh, tp_size)
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            check_variables()
            _check_single_process("tp_size", tp_size)
            _check_single_process("ep_size", ep_size)
            return None
        start_process_group(device_type())
    settle_at_exit()
    world = dist.get_world_size()
    size = world if tp_size is None else tp_size
    said = f"tp_size={size}, ep_size={ep_size}"
    meet_ranks(range(world), "the start of a tensor-parallel mesh", START_TIMEOUT, said)  # before a rank may raise alone
    if size < 1 or world % size:
        fix = f"tp_size={', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}"
        raise MeshError(
            describe(f"{world} processes cannot form tensor-parallel groups of {size}.", either=[fix + ", or", "start more"])
        )
    if size == world:
        return _everyone(device_type(), TP_AXIS)
    return init_device_mesh(device_type(), (world // size, size), mesh_dim_names=("dp", TP_AXIS))[TP_AXIS]


def _everyone(kind: str, name: str) -> DeviceMesh:
    """All processes, as one axis on the group that is there: each new one costs threads that poll (gloo) or device memory."""
    group = dist.group.WORLD
    assert group is not None
    return DeviceMesh.from_group(group, kind, mesh_dim_names=(name,))


def device_type() -> str:
    """`"cuda"` (or another accelerator that torch sees) where there is one, else `"cpu"`."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def local_device(mesh: DeviceMesh | None) -> torch.device:
    """The device on which this rank's shards live."""
    kind = mesh.device_type if mesh is not None else device_type()
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def point_to_point_device(mesh: DeviceMesh) -> torch.device:
    """The device between which `dist.send` and `dist.recv` carry tensors: this rank's own, but gloo sends from CPUs only."""
    own = local_device(mesh)
    return torch.device("cpu") if f"{own.type}:gloo" in dist.get_backend_config(mesh.get_group()).split(",") else own


def _check_single_process(name: str, size: int | None) -> None:
    if size not in (None, 1):
        raise MeshError(
            describe(
                f"{name}={size} was asked for, and this is a single process.",
                either=[
                    f"start it with: torchrun --nproc-per-node {size} {os.path.basename(sys.argv[0]) or 'script.py'}, or",
                    f"leave {name} out",
                ],
            )
        )


def _check_kinds(tp_size: object, device_mesh: object) -> None:
    """Raise `MeshError` for arguments that are no number of ranks, or no mesh."""
    if tp_size is not None and (not isinstance(tp_size, int) or isinstance(tp_size, bool)):
        raise MeshError(f"tp_size={tp_size!r}: the number of ranks on the tp axis is an integer.")
    if device_mesh is not None and not isinstance(device_mesh, DeviceMesh):
        raise MeshError(
            describe(
                f"device_mesh={device_mesh!r} is no DeviceMesh.",
                either=[
                    'init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), or',
                    "leave it out: tp_size says how many ranks",
                ],
            )
        )


def _given_axis(mesh: DeviceMesh, tp_size: int | None) -> DeviceMesh:
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 1 and TP_AXIS not in names:
        raise MeshError(
            describe(
                f"device_mesh has the axes {names or mesh.shape}, and none is named {TP_AXIS!r}.",
                either=[f"name the axis {TP_AXIS!r} (mesh_dim_names), or", "pass the one-dimensional sub-mesh"],
            )
        )
    axis = mesh[TP_AXIS] if mesh.ndim > 1 else mesh
    if axis.get_coordinate() is None:
        raise MeshError(
            describe(
                f"Rank {dist.get_rank()} is not in device_mesh, which has the ranks {mesh.mesh.flatten().tolist()}.",
                either=["make the call on those ranks only, or", "a mesh of all ranks, with an axis more for the replicas"],
            )
        )
    if tp_size not in (None, axis.size()):
        raise MeshError(
            f"tp_size={tp_size} was asked for, and the mesh's tp axis has {axis.size()} ranks: leave one of the two out."
        )
    return axis


def expert_axis(mesh: DeviceMesh, ep_size: int | None) -> DeviceMesh:
    """The ranks to which experts are dealt: the tp axis `mesh`, or it and its neighbours among the replicas, `ep_size` in all.

    In a larger axis the ranks of one replica stand next to each other. Collective over all ranks that `mesh` was taken from,
    where it is larger. Raises `MeshError` where the replicas cannot form groups of this size.
    """
    size = mesh.size()
    if ep_size is None or ep_size <= size:
        return mesh
    root = mesh._get_root_mesh()
    here = _axes(root).index(mesh.mesh_dim_names[0]) if mesh.mesh_dim_names and root.ndim > 1 else 0
    ranks = root.mesh.movedim(here, -1).flatten()
    if len(ranks) % ep_size:
        sizes = [str(n) for n in range(size, len(ranks) + 1, size) if len(ranks) % n == 0]
        raise MeshError(
            describe(
                f"{len(ranks)} processes with tp_size={size} cannot deal experts to groups of {ep_size}.",
                either=[f"ep_size={', '.join(sizes)}, or", "start more processes"],
            )
        )
    if ep_size == len(ranks) and ranks.tolist() == list(range(dist.get_world_size())):
        return _everyone(mesh.device_type, "ep")
    groups = DeviceMesh(mesh.device_type, ranks.view(-1, ep_size), mesh_dim_names=("replica", "ep"))
    return groups["ep"]


def is_first_replica(mesh: DeviceMesh) -> bool:
    """Whether this rank's tp axis is the first of those that hold the same model (of a mesh with a data-parallel axis)."""
    coordinate = dict(zip(_axes(mesh), mesh._get_root_mesh().get_coordinate() or (), strict=False))
    return all(position == 0 for name, position in coordinate.items() if name not in (mesh.mesh_dim_names or ()))


def replica_groups(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    """The process groups over the other axes of the mesh that the tp axis was taken from: its fellows in the replicas."""
    root = mesh._get_root_mesh()
    return [root.get_group(name) for name in _axes(mesh) if name not in (mesh.mesh_dim_names or ())]


def all_replicas(mesh: DeviceMesh) -> list[int]:
    """The ranks of all replicas: of the whole mesh that the tp axis was taken from."""
    ranks: list[int] = mesh._get_root_mesh().mesh.flatten().tolist()
    return ranks


def _axes(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh._get_root_mesh().mesh_dim_names or ()
