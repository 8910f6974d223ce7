"""What a rank sends: every collective is counted where it reaches torch, whoever calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The operation: its name here, where its process group stands among the arguments, and how often a ring sends its payload
# through each rank, in units of (n - 1) / n.
_KINDS = {
    "allreduce_": ("all-reduce", 1, 2),
    "_allgather_base_": ("all-gather", 2, 1),
    "_reduce_scatter_base_": ("reduce-scatter", 2, 1),
    "alltoall_base_": ("all-to-all", 2, 1),
}


@dataclass
class Traffic:
    """Collectives of one kind.

    Args:
        calls: how many.
        payload: bytes of the larger one of what a rank puts in and what it gets.
        sent: bytes that leave a rank when it is done by a ring; of an all-to-all, those for other ranks.
    """

    calls: int = 0
    payload: int = 0
    sent: int = 0


class Count(TorchDispatchMode):
    """Counts the collectives in a block into `kinds`. Raises `KeyError` for one that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, Traffic] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self._add(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, args: Sequence[object]) -> None:
        kind, place, times = _KINDS[name]
        size = ProcessGroup.unbox(args[place]).size()
        payload = max(tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, Tensor))
        found = self.kinds.setdefault(kind, Traffic())
        found.calls += 1
        found.payload += payload
        found.sent += times * payload * (size - 1) // size

    def report(self) -> dict[str, dict[str, int]]:
        """By kind."""
        return {kind: asdict(found) for kind, found in sorted(self.kinds.items())}
