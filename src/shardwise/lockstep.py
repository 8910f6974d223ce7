"""Whether the ranks of one model are called with the same, and step alike.

Other batches on each rank of a model, or gradients clipped by each rank's own norm, give wrong numbers without a sign of it. So
the ranks compare, at calls 1, 2, 4, 8 and so on, through the process group's store: no collective is added to a step.
"""

from __future__ import annotations

import base64
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isclose
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from shardwise.errors import MismatchError, describe
from shardwise.rendezvous import say_to_all

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_FEW, _SMALL = 4, 2**12
"""How many parameters are compared, and how many elements each of them has at most."""
_APART, _APART_ON_CPU = 1e-2, 1e-3
"""How far apart copies of a parameter may be, relative to how far they have moved: kernels of a GPU add in no fixed order."""
_ALIKE = 1e-3
"""How far apart the sizes of floating inputs may be, relative to them."""

Said = dict[str, Any]


@dataclass
class Lockstep:
    """What a rank remembers of its calls of one model.

    Args:
        calls: how many there were, by whether in training.
        start: the values of some replicated parameters at the first call in training, by name.
    """

    calls: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    start: dict[str, Tensor] = field(default_factory=dict)

    def is_due(self, training: bool, mesh: DeviceMesh) -> bool:
        """Whether the ranks of `mesh` compare at this call, which is counted.

        Never in a block that watches operators or collectives, as profilers do, nor while a CUDA graph is captured.
        """
        self.calls[training] = number = self.calls[training] + 1
        return not number & (number - 1) and _can_look(mesh)

    def compare(
        self, model: nn.Module, mesh: DeviceMesh, given: Mapping[str, object], replicated: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Compare what `model` is called with on the ranks of `mesh`, and in training what has become of its parameters.

        Args:
            given: the arguments, by name.
            replicated: the trainable parameters of which each rank has a copy.

        Raises `MismatchError` where a rank is called with another tensor; warns where copies of a parameter drift apart.
        """
        values, started = _few(replicated) if model.training else {}, bool(self.start)
        self.start = self.start or values
        number = self.calls[model.training]
        mine = {
            "call": f"{type(model).__name__}, call {number}{' in training' if model.training else ''}",
            "inputs": {name: _print_of(value) for name, value in given.items() if _is_plain(value)},
            "values": {name: base64.b64encode(value.numpy().tobytes()).decode() for name, value in values.items()},
        }
        ranks = dist.get_process_group_ranks(mesh.get_group())
        said = {rank: json.loads(words) for rank, words in say_to_all(ranks, "lockstep", json.dumps(mine)).items()}
        _compare_inputs(said)
        if started:
            self._compare_values(said, _APART_ON_CPU if mesh.device_type == "cpu" else _APART)

    def _compare_values(self, said: Mapping[int, Said], most: float) -> None:
        first, *others = said
        for rank in others:
            for name, start in self.start.items():
                one, other = (_unpacked(said[each]["values"].get(name)) for each in (first, rank))
                if one is not None and other is not None and one.shape == other.shape == start.flatten().shape:
                    moved = max((one - start.flatten()).norm().item(), (other - start.flatten()).norm().item())
                    if moved and (apart := (one - other).norm().item() / moved) > most:
                        warnings.warn(_drifted(said[rank]["call"], name, first, rank, apart), stacklevel=5)
                        return


def _can_look(mesh: DeviceMesh) -> bool:
    return not (
        mesh.size() == 1
        or dist.get_backend(mesh.get_group()) == "fake"
        or _get_current_dispatch_mode_stack()
        or torch._C._autograd._profiler_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or (mesh.device_type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def _few(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of some small ones from all over the model, float32 on the CPU: in fewer bits, most steps round to none."""
    small = [(name, one) for name, one in parameters if one.numel() <= _SMALL and _is_plain(one) and one.dtype == torch.float32]
    return {name: one.detach().cpu().clone() for name, one in small[:: max(1, len(small) // _FEW)][:_FEW]}


def _is_plain(tensor: object) -> TypeGuard[Tensor]:
    """Not, say, what FSDP has made of a parameter."""
    return type(tensor) in (Tensor, nn.Parameter)


def _unpacked(words: str | None) -> Tensor | None:
    return None if words is None else torch.frombuffer(bytearray(base64.b64decode(words)), dtype=torch.float32)


def _print_of(tensor: Tensor) -> list[Any]:
    """Shape and dtype, and of integers their digest; of floating numbers, which may come of sums in no fixed order, how large
    they are.
    """
    found: list[Any] = [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
    if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_meta or not tensor.numel():
        return found
    if tensor.is_floating_point():
        return [*found, tensor.detach().float().abs().mean().item()]
    return [*found, hashlib.blake2b(tensor.cpu().contiguous().numpy().tobytes(), digest_size=8).hexdigest()]


def _compare_inputs(said: Mapping[int, Said]) -> None:
    first, *others = said
    for rank in others:
        one, other = said[first], said[rank]
        if one["call"] != other["call"]:
            raise _unlike(f"Rank {rank} has come to another call than rank {first}", first, rank, one["call"], other["call"])
        for name in sorted({*one["inputs"], *other["inputs"]}):
            mine, theirs = one["inputs"].get(name), other["inputs"].get(name)
            if not _same(mine, theirs):
                headline = f"{one['call']}: {name} on rank {rank} is not that of rank {first}"
                raise _unlike(headline, first, rank, _in_words(mine), _in_words(theirs))


def _same(mine: list[Any] | None, theirs: list[Any] | None) -> bool:
    if mine is None or theirs is None or mine[:2] != theirs[:2] or len(mine) < 3:
        return mine == theirs
    if isinstance(mine[2], float):
        return mine[2] == theirs[2] or isclose(mine[2], theirs[2], rel_tol=_ALIKE) or mine[2] != mine[2]
    return bool(mine[2] == theirs[2])


def _in_words(found: list[Any] | None) -> str:
    return "none" if found is None else f"{tuple(found[0])} {found[1]}" + (f", {found[2]}" if len(found) > 2 else "")


def _unlike(headline: str, first: int, rank: int, here: str, there: str) -> MismatchError:
    return MismatchError(
        describe(
            f"{headline}.",
            **{f"rank {first}": here, f"rank {rank}": there},
            why="the ranks of one model compute parts of the same batch, so each has to be called with the same",
            either=[
                "leave the ranks of one model out of what deals batches (DistributedSampler, a shard of the data per rank):"
                " only replicas have batches of their own, or",
                "seed the ranks alike before data is shuffled or drawn",
            ],
        )
    )


def _drifted(call: str, name: str, first: int, rank: int, apart: float) -> str:
    return describe(
        f"{call}: the copies of {name} on ranks {first} and {rank} have drifted apart.",
        found=f"they differ by {apart:.2g} of the way that they have moved since the first call",
        why="every rank has to step a parameter alike of which it has a copy",
        either=[
            "shardwise.clip_grad_norm_(model, max_norm), where torch's or accelerate's is called: theirs takes the norm of"
            " each rank's shards, or",
            "the same batch, optimizer and random state on every rank",
        ],
    )
