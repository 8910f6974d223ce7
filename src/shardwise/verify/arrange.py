"""How what a module takes and gives lies on the ranks: by its style, which the plan says, never by shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.collectives import even_sizes
from shardwise.layers import (
    AllReduceParallel,
    ColwiseGatherOutput,
    ColwiseParallel,
    EmbeddingColwise,
    EmbeddingRowwise,
    EpRouter,
    ExpertParallel,
    LinearStyle,
    LocalMixer,
    LocalParamsParallel,
    MlaKvAProjGatherOutput,
    MlaKvAProjParallel,
    MoeExpertsParallel,
    MoeIdentityExpert,
    ParallelStyle,
    Replicate,
    ReplicatedWithGradAllReduce,
    RowwiseInner,
    RowwiseParallel,
    RowwiseScatterOutput,
    RowwiseSplitInput,
    SequenceParallel,
)
from shardwise.plan import Plan
from shardwise.spec import ModuleSpec, ShardSpec
from shardwise.verify.record import Key


@dataclass(frozen=True)
class Same:
    """I: every rank has all of it."""

    word = "the same on every rank"

    def whole(self, values: Sequence[Tensor], expected: Tensor) -> list[Tensor]:
        """What each of these is to be compared with the one process's, from the ranks' `values`."""
        return list(values)


@dataclass(frozen=True)
class Slices:
    """Of a sequence-parallel model: every rank has its positions, or all."""

    size: int
    word = "a slice of the sequence on each rank"

    def whole(self, values: Sequence[Tensor], expected: Tensor) -> list[Tensor]:
        """As `Same.whole`."""
        values = values[: self.size]
        sizes = even_sizes(expected.shape[1], len(values)) if expected.dim() > 1 else ()
        if expected.dim() > 2 and tuple(value.shape[1] if value.dim() > 1 else 0 for value in values) == sizes:
            return [torch.cat(list(values), 1)]
        return list(values)


@dataclass(frozen=True)
class CutFeatures:
    """S(-1): every rank has the features that belong to its part of a weight."""

    row: ShardSpec
    size: int
    averages: bool = True
    word = "a part of the features on each rank"

    def whole(self, values: Sequence[Tensor], expected: Tensor) -> list[Tensor]:
        """As `Same.whole`. What several ranks have is added where it is a gradient, of which each has a part."""
        values = values[: self.size]
        if any(value.shape[:-1] != expected.shape[:-1] for value in values):
            return list(values)
        found, seen = torch.zeros_like(expected), torch.zeros(expected.shape[-1], dtype=torch.int64)
        for rank, value in enumerate(values):
            for piece in self.row.layout.pieces(self.row.shape, rank, self.size):
                if piece.full.stop > expected.shape[-1] or piece.local.stop > value.shape[-1]:
                    return list(values)
                found[..., piece.full] += value[..., piece.local]
                seen[piece.full] += 1
        return [found / seen.clamp(min=1)] if self.averages else [found]


@dataclass(frozen=True)
class CutParameter:
    """A parameter, or its gradient, by its row."""

    row: ShardSpec
    size: int

    @property
    def word(self) -> str:
        """In a sentence."""
        return f"cut ({self.row.layout})" if self.row.sharded else "the same on every rank"

    def whole(self, values: Sequence[Tensor], expected: Tensor) -> list[Tensor]:
        """As `Same.whole`."""
        values = values[: self.size] if self.row.sharded else values
        shapes = [self.row.local_shape(rank, self.size) for rank in range(self.size)]
        if not self.row.sharded or [tuple(value.shape) for value in values] != shapes:
            return list(values)
        return [self.row.layout.unshard(list(values), self.row.shape)]


Arrangement = Same | Slices | CutFeatures | CutParameter

_TAKE_ALL = (ColwiseParallel, MoeExpertsParallel, ExpertParallel, RowwiseSplitInput)
_GIVE_ALL = (
    ColwiseGatherOutput,
    EmbeddingRowwise,
    EmbeddingColwise,
    MlaKvAProjParallel,
    MlaKvAProjGatherOutput,
    SequenceParallel,
    AllReduceParallel,
    MoeExpertsParallel,
    ExpertParallel,
    EpRouter,
)
_GIVE_PARTS = (RowwiseScatterOutput, ReplicatedWithGradAllReduce, MoeIdentityExpert)
_PARTIAL_GRADIENT = (MlaKvAProjParallel, MlaKvAProjGatherOutput, RowwiseInner)


class Arrangements:
    """How every event's tensor lies on the ranks.

    Between a column-wise and a row-wise layer what a module without a style gives is a rank's own, and not looked at; nor is
    what lies inside of experts, each of which gives a part of a sum.

    Args:
        plan: the table.
        order: the events of one process, in their order.
        slices: the model is sequence-parallel.
    """

    def __init__(self, plan: Plan, order: Iterable[Key], slices: bool) -> None:
        self.plan, self.rows = plan, {row.name: row for row in plan.modules}
        self._everywhere: Arrangement = Slices(plan.size) if slices else Same()
        self._closers = [row.name for row in plan.modules if _closes(row.style)]
        self._experts = [row.name for row in plan.modules if issubclass(row.style, MoeExpertsParallel | ExpertParallel)]
        self._local: set[tuple[str, int]] = set()
        self.open_before: dict[Key, tuple[str, ...]] = {}
        self._walk(order)

    def of(self, key: Key) -> Arrangement | None:
        """How it lies on the ranks; None for what is a rank's own affair."""
        if key.kind == "gradient of parameter":
            row = self.plan.get(key.name)
            return CutParameter(row, self.plan.ep_size if row.axis == "ep" else self.plan.size) if row else None
        if any(key.name.startswith(f"{name}.") for name in self._experts):
            return None
        row_of_module = self.rows.get(key.name)
        backward = key.kind.startswith("gradient")
        if key.kind.endswith("input"):
            return self._input(row_of_module, backward)
        if (key.name, key.call) in self._local or (key.position and self._has_region(key.name)):
            return None
        return self._output(row_of_module, backward)

    def _input(self, row: ModuleSpec | None, backward: bool) -> Arrangement | None:
        if row is None:
            return None
        if issubclass(row.style, _TAKE_ALL):
            # Of a sequence-parallel model's layers the gradients are summed outside of them.
            return None if backward and isinstance(self._everywhere, Slices) else self._everywhere
        return self._cut(row, backward) if issubclass(row.style, RowwiseParallel) else None

    def _output(self, row: ModuleSpec | None, backward: bool) -> Arrangement | None:
        if row is None or not _gives_parts(row.style):
            return None if row is not None and backward and issubclass(row.style, _PARTIAL_GRADIENT) else self._everywhere
        return self._cut(row, backward) if issubclass(row.style, ColwiseParallel) else None

    def _cut(self, row: ModuleSpec, backward: bool) -> Arrangement | None:
        weight = self.plan.get(f"{row.name}.weight")
        if weight is None or not weight.sharded:
            return self._everywhere
        return CutFeatures(weight, self.plan.size, averages=not backward)

    def _walk(self, order: Iterable[Key]) -> None:
        """Which modules without a style run where activations are cut: behind a layer that leaves them so, up to the next that
        puts them together.
        """
        opened: dict[str, str] = {}
        for key in order:
            self.open_before[key] = tuple(opened)
            if key.kind != "output":
                continue
            row = self.rows.get(key.name)
            self._close(key.name, row, opened)
            plain = row is None or row.style in (Replicate, LocalParamsParallel) or not _known(row.style)
            if opened and plain:
                self._local.add((key.name, key.call))
            if row is not None and self._leaves_parts(row):
                opened[row.name] = row.name.rpartition(".")[0]

    def _close(self, name: str, row: ModuleSpec | None, opened: dict[str, str]) -> None:
        inside = name.rpartition(".")[0] if row is not None and _closes(row.style) else None
        if inside is None and self._has_region(name):
            inside = name
        for opener, parent in list(opened.items()) if inside is not None else ():
            if parent == inside or parent.startswith(f"{inside}.") or inside == "":
                del opened[opener]

    def _has_region(self, name: str) -> bool:
        """Whether a module has local heads or features inside: what it gives besides its first output may be of these."""
        return any(closer.startswith(f"{name}.") for closer in self._closers)

    def _leaves_parts(self, row: ModuleSpec) -> bool:
        if issubclass(row.style, LocalMixer):
            return False
        if issubclass(row.style, LocalParamsParallel):
            return not self._has_region(row.name)
        return _gives_parts(row.style) and not issubclass(row.style, MoeIdentityExpert)


def entered(plan: Plan) -> list[str]:
    """The modules whose inputs are worth a look: those whose style says how their inputs lie."""
    return [row.name for row in plan.modules if issubclass(row.style, (*_TAKE_ALL, RowwiseParallel))]


def _closes(style: type[ParallelStyle]) -> bool:
    return issubclass(style, RowwiseParallel) and not issubclass(style, RowwiseScatterOutput | RowwiseInner | RowwiseSplitInput)


def _known(style: type[ParallelStyle]) -> bool:
    return issubclass(style, (*_GIVE_ALL, *_GIVE_PARTS, LinearStyle))


def _gives_parts(style: type[ParallelStyle]) -> bool:
    if issubclass(style, _GIVE_PARTS):
        return True
    return issubclass(style, ColwiseParallel) and not issubclass(style, ColwiseGatherOutput)
