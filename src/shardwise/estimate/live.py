"""Memory while a model runs: which storages live, and how many bytes they take at most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardwise.estimate.storages import Storages, key_of

FUSED, SCORES = "scaled_dot_product", "softmax"
"""In the names of the kernels of fused attention, and of attention whose scores are kept."""
_DIMS_OF_SCORES = 4  # (batch, heads, queries, keys)


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes at one moment, of what was not there before: all, and of these the gradients of parameters."""

    total: int = 0
    gradients: int = 0


@dataclass(slots=True)
class _Held:
    size: int
    gradient: bool = False


class Live(TorchDispatchMode):
    """Follows every storage that an operator makes in the block until nobody holds it, views and autograd included.

    Bytes are those that were asked for: what an allocator rounds up, and what a kernel takes for itself, is not seen.

    Args:
        known: tensors that are there before, and don't count.

    Attributes:
        phase: the caller's word for what is being done.
        peaks: of each phase, the moment with the most bytes.
        kernels: names of the attention kernels that ran, fused or over scores.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        self.peaks: dict[str, Moment] = {}
        self.kernels: set[str] = set()
        self._known = {key_of(tensor) for tensor in known}
        self._held: Storages[_Held] = Storages(self._gone)
        self._total = self._gradients = 0

    def is_gradient(self, parameter: Tensor) -> None:
        """The gradient of `parameter` is a gradient from here on, not an activation."""
        held = self._held.get(parameter.grad) if parameter.grad is not None else None
        if held is not None and not held.gradient:
            held.gradient = True
            self._gradients += held.size

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Every operator comes by here."""
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, (Tensor, tuple, list)):
            return result
        self._note_attention(func, result)
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result

    def _note_attention(self, func: OpOverload, result: Any) -> None:
        name = func.overloadpacket.__name__
        if "backward" not in name and (FUSED in name or (SCORES in name and result.dim() == _DIMS_OF_SCORES)):
            self.kernels.add(name)

    def _add(self, tensor: Tensor) -> None:
        if key_of(tensor) in self._known or self._held.get(tensor) is not None:
            return
        size = tensor.untyped_storage().nbytes()
        self._held.set(tensor, _Held(size))
        self._total += size
        before = self.peaks.get(self.phase)
        if before is None or self._total > before.total:
            self.peaks[self.phase] = Moment(self._total, self._gradients)

    def _gone(self, held: _Held) -> None:
        self._total -= held.size
        self._gradients -= held.size * held.gradient


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of `tensors`, each counted once."""
    return sum({key_of(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
