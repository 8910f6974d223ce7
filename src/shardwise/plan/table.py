"""The table: one frozen row a tensor, one a module, for one size of the tp axis. Everything else reads it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.errors import PlanError, describe
from shardwise.names import wildcard
from shardwise.plan import lines, show
from shardwise.plan.origin import Origin
from shardwise.report import as_text
from shardwise.spec import ModuleSpec, Rule, ShardSpec

if TYPE_CHECKING:
    from torch import nn

    from shardwise.hf import Feed
    from shardwise.infer import Proof


@dataclass(frozen=True)
class Plan:
    """How a model lies on `size` ranks. Iterating gives the rows of its tensors; `print(plan)` shows them.

    Args:
        size: ranks on the tp axis.
        tensors: a row for every parameter and buffer, whole ones included; tied parameters have one.
        modules: a row for every module that becomes parallel.
        ep_size: ranks over which experts are dealt, `size` or a multiple of it; by default `size`.
        rules: the rule that holds for each module and tensor that one names: what `save` writes.
        origin: what it was made of, for `prove`; not compared, and not pickled.
    """

    size: int
    tensors: tuple[ShardSpec, ...]
    modules: tuple[ModuleSpec, ...]
    ep_size: int = 0
    rules: Mapping[str, Rule] = field(default_factory=dict, repr=False)
    origin: Origin | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ep_size", self.ep_size or self.size)

    def __iter__(self) -> Iterator[ShardSpec]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> ShardSpec:
        """The row of the parameter or buffer called `name` (any of its names, if it is tied)."""
        return self._by_name[name]

    def get(self, name: str) -> ShardSpec | None:
        """As `plan[name]`; None where there is no such tensor."""
        return self._by_name.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @cached_property
    def _by_name(self) -> dict[str, ShardSpec]:
        return {name: row for row in self.tensors for name in (row.name, *row.aliases)}

    def place(self, row: ShardSpec | ModuleSpec, rank: int) -> tuple[int, int]:
        """The rank on `row`'s axis, and that axis's size, of the `rank`th of the `ep_size` ranks that hold the model."""
        return (rank, self.ep_size) if row.axis == "ep" else (rank % self.size, self.size)

    def local_shape(self, row: ShardSpec, rank: int) -> tuple[int, ...]:
        """The shape of `rank`'s shard of `row`."""
        return row.local_shape(*self.place(row, rank))

    def local_bytes(self, rank: int) -> int:
        """Bytes of all parameters and buffers of the `rank`th of the `ep_size` ranks that hold the model."""
        return sum(count * row.local_bytes(*self.place(row, rank)) for row, count in self._kinds)

    @cached_property
    def _kinds(self) -> list[tuple[ShardSpec, int]]:
        """A row of each kind, and how many are as long on every rank: layers are alike."""
        alike: dict[tuple[object, ...], list[ShardSpec]] = {}
        for row in self.tensors:
            alike.setdefault((row.shape, row.dtype, row.layout, row.axis), []).append(row)
        return [(rows[0], len(rows)) for rows in alike.values()]

    @property
    def full_bytes(self) -> int:
        """Bytes of the whole model."""
        return sum(row.bytes for row in self.tensors)

    @cached_property
    def fullest_bytes(self) -> int:
        """Bytes of all parameters and buffers of the rank that holds the most."""
        return max(self.local_bytes(rank) for rank in range(self.ep_size))

    @property
    def share(self) -> float:
        """What the fullest rank holds, in parts of 1 / `size` of the model: 1 where everything is cut evenly."""
        return self.fullest_bytes * self.size / max(self.full_bytes, 1)

    @cached_property
    def families(self) -> Mapping[str, Sequence[ShardSpec]]:
        """The rows of alike layers under one name, with `*` for what differs; a row that is alone, under its own."""
        alike: dict[tuple[object, ...], list[ShardSpec]] = {}
        for row in self.tensors:
            key = (wildcard(row.name), row.shape, row.layout, row.partial, row.rule.style if row.rule else None)
            alike.setdefault(key, []).append(row)
        named: dict[str, Sequence[ShardSpec]] = {}
        for rows in alike.values():
            name = wildcard(rows[0].name) if len(rows) > 1 else rows[0].name
            named[name if name not in named else rows[0].name] = rows
        return named

    def prove(self, model: nn.Module | None = None, example_inputs: Feed | Sequence[Feed] | None = None) -> Proof:
        """Show that the plan computes what its model does, see `shardwise.prove`.

        Args:
            model: the ordinary model; by default the one that the plan was made of.
            example_inputs: by default those that the plan was inferred with; a transformers model that reads texts needs none.

        Raises `PlanError` for a plan that is wrong, or that no longer knows its model.
        """
        from shardwise.infer import prove  # a verb of the table: what it does lies above

        origin = self.origin or Origin()
        model = origin.model() if model is None else model
        if model is None:
            raise PlanError(
                describe(
                    "The plan does not know which model it was made of, or that is gone.",
                    either=["plan.prove(model), or", "plan.prove(model, example_inputs) for one that is none of transformers'"],
                )
            )
        return prove(self, model, origin.inputs if example_inputs is None else example_inputs)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "origin"} | {"origin": None}

    def __str__(self) -> str:
        return as_text(*show.text(self))

    def to_json(self) -> str:
        """The rules as text to read, edit and load again: alike layers in one line. See `shardwise.load_plan`."""
        return lines.to_json(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json()` to a file, whose name should end in ".json"."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_html(self) -> str:
        """The table as a page that stands alone."""
        return show.page(self).to_html()
