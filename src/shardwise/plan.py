"""The table: one frozen row a tensor, one a module, for one size of the tp axis. Everything else reads it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from rich.console import Console
from rich.table import Table

from shardwise.spec import ModuleSpec, ShardSpec


@dataclass(frozen=True)
class Plan:
    """How a model lies on `size` ranks. Iterating gives the rows of its tensors; `print(plan)` shows them.

    Args:
        size: ranks on the tp axis.
        tensors: a row for every parameter and buffer, whole ones included; tied parameters have one.
        modules: a row for every module that becomes parallel.
        ep_size: ranks over which experts are dealt, `size` or a multiple of it; by default `size`.
    """

    size: int
    tensors: tuple[ShardSpec, ...]
    modules: tuple[ModuleSpec, ...]
    ep_size: int = 0

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

    def __str__(self) -> str:
        return self._render().export_text()

    def to_html(self) -> str:
        """The table as a page that stands alone."""
        return self._render().export_html(inline_styles=True)

    def _render(self) -> Console:
        console = Console(record=True, file=io.StringIO(), width=180)
        table = Table(title=self._title(), title_justify="left", box=None, pad_edge=False)
        for column in ("parameter", "style", "from"):
            table.add_column(column, no_wrap=True)
        for column in ("full shape", "shape on rank 0", "MiB a rank"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("layout", no_wrap=True)
        for name, rows in self._families().items():
            row = rows[0]
            table.add_row(
                f"{name}  x {len(rows)}" if len(rows) > 1 else name,
                row.rule.style if row.rule else "-",
                row.rule.source if row.rule else "-",
                _shape(row.shape),
                _shape(self.local_shape(row, 0)),
                f"{sum(r.local_bytes(*self.place(r, 0)) for r in rows) / 2**20:.2f}",
                f"{row.layout}{', gradient summed' if row.partial else ''}",
            )
        console.print(table)
        fullest, full = max(self.local_bytes(rank) for rank in range(self.ep_size)), self.full_bytes
        share = f"{fullest * self.size / max(full, 1):.3f} x 1/{self.size}"
        console.print(f"{fullest / 2**20:.2f} MiB on the fullest rank, of {full / 2**20:.2f} MiB: {share}")
        return console

    def _title(self) -> str:
        experts = f", experts over {self.ep_size}" if self.ep_size != self.size else ""
        return f"tensor parallel over {self.size} ranks{experts}"

    def _families(self) -> dict[str, list[ShardSpec]]:
        families: dict[tuple[object, ...], list[ShardSpec]] = {}
        for row in self.tensors:
            key = (wildcard(row.name), row.shape, row.layout, row.partial, row.rule.style if row.rule else None)
            families.setdefault(key, []).append(row)
        named: dict[str, list[ShardSpec]] = {}
        for rows in families.values():
            name = wildcard(rows[0].name) if len(rows) > 1 else rows[0].name
            named[name if name not in named else rows[0].name] = rows
        return named


def wildcard(name: str) -> str:
    """`name` with each segment that is a number as `*`: "model.layers.0.mlp.fc1" gives "model.layers.*.mlp.fc1"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) if shape else "scalar"
