"""Memory while a model runs: which storages live, and how many bytes they take at most."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FUSED, SCORES = "scaled_dot_product", "softmax"
"""In the names of the kernels of fused attention, and of attention whose scores are kept."""
_DIMS_OF_SCORES = 4  # (batch, heads, queries, keys)


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes at one moment, of what was not there before: all, and of these the gradients of parameters."""

    total: int = 0
    gradients: int = 0


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
        self._known = {_key(tensor) for tensor in known}
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._gradients: set[int] = set()
        self._total = self._gradient_bytes = 0

    @property
    def now(self) -> Moment:
        """What lives at this moment."""
        return Moment(self._total, self._gradient_bytes)

    def is_gradient(self, parameter: Tensor) -> None:
        """The gradient of `parameter` is a gradient from here on, not an activation."""
        if parameter.grad is None:
            return
        key = _key(parameter.grad)
        if key in self._sizes and key not in self._gradients:
            self._gradients.add(key)
            self._gradient_bytes += self._sizes[key]

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
                self._add(tensor.untyped_storage())
        return result

    def _note_attention(self, func: OpOverload, result: Any) -> None:
        name = func.overloadpacket.__name__
        if "backward" not in name and (FUSED in name or (SCORES in name and result.dim() == _DIMS_OF_SCORES)):
            self.kernels.add(name)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self._references[key] = weakref.ref(storage, partial(self._gone, key))
        self._total += size
        before = self.peaks.get(self.phase)
        if before is None or self._total > before.total:
            self.peaks[self.phase] = self.now

    def _gone(self, key: int, _: object) -> None:
        size = self._sizes.pop(key)
        del self._references[key]
        self._total -= size
        if key in self._gradients:
            self._gradients.remove(key)
            self._gradient_bytes -= size


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of `tensors`, each counted once."""
    return sum({_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
