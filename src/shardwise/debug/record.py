"""What was communicated: one record for each collective, and a trace of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from statistics import median

import torch.distributed as dist
from rich.table import Table

from shardwise.names import layer_of
from shardwise.report import Page, Section, as_text


@dataclass(frozen=True, slots=True)
class Collective:
    """One call of a collective on one rank.

    Attributes:
        op: as `torch.distributed` calls it: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", ...
        phase: "forward", "backward", or "recompute" (forward again, for activation checkpointing).
        module: the innermost module that ran, or, in backward, whose forward it is the backward of; "" outside of any.
        parameter: the name in `module` of the parameter whose gradient is communicated; "" for an activation or its gradient.
        shape: of the tensor that this rank puts in; of the first, where there are several.
        dtype: of it, as "float32".
        bytes: that this rank puts in.
        group: the name of the process group.
        ranks: of it, in the default group.
        tensors: how many of them.
        seconds: from the call until its result was there.
    """

    op: str
    phase: str
    module: str
    parameter: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    group: str
    ranks: tuple[int, ...]
    tensors: int = 1
    seconds: float = 0.0

    @property
    def what(self) -> tuple[str, str, str, str, tuple[int, ...], str, int]:
        """All that has to agree between ranks and between runs."""
        return self.op, self.phase, self.module, self.parameter, self.shape, self.dtype, self.bytes

    @property
    def tensor(self) -> str:
        """What is communicated, in a word."""
        if self.parameter:
            return self.parameter
        return "gradient" if self.phase == "backward" else "activation"

    def __str__(self) -> str:
        where = f"{self.module}.{self.parameter}" if self.parameter else self.module or "outside of any module"
        return f"{self.phase} {self.op} of {self.dtype} {self.shape}, {where}"


_HEADINGS = ("phase", "collective", "module", "tensor", "shape", "KiB", "times", "us")
_NUMBERS = ("KiB", "times", "us")


class CollectiveTrace:
    """The collectives of one rank, in order; `trace_collectives` makes it. Prints as a table for each kind of layer."""

    def __init__(self, records: Sequence[Collective]) -> None:
        self.records = list(records)

    def add(self, found: Collective, seconds: float) -> None:
        """Write one down."""
        self.records.append(replace(found, seconds=seconds))

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Collective]:
        return iter(self.records)

    @property
    def bytes(self) -> int:
        """That this rank has put in."""
        return sum(record.bytes for record in self.records)

    def to_json(self) -> str:
        """A list of objects with the attributes of `Collective`, a line each."""
        return "[\n" + ",\n".join(json.dumps(asdict(record)) for record in self.records) + "\n]\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """`to_json`, to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CollectiveTrace:
        """What `save` has written."""
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(
            [Collective(**entry | {"shape": tuple(entry["shape"]), "ranks": tuple(entry["ranks"])}) for entry in entries]
        )

    def diff(self, other: CollectiveTrace) -> TraceDifference:
        """In what `other` (another run, or another rank's) differs, order included; durations and groups don't count."""
        return TraceDifference(self.records, other.records)

    def __str__(self) -> str:
        tables = []
        for title, rows in _kinds_of_layers(self.records):
            table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
            for heading in _HEADINGS:
                table.add_column(heading, justify="right" if heading in _NUMBERS else "left", overflow="fold")
            for cells in rows:
                table.add_row(*cells)
            tables.append(table)
        return as_text(*tables, self.summary)

    @property
    def summary(self) -> str:
        """All of it in a sentence."""
        total = sum(record.seconds for record in self.records)
        return f"{len(self)} collectives, {self.bytes / 2**10:,.1f} KiB put in by this rank, {total * 1e3:.2f} ms"

    def sections(self) -> list[Section]:
        """The tables, for a page."""
        return [Section(title, headings=_HEADINGS, rows=rows) for title, rows in _kinds_of_layers(self.records)]

    def to_html(self) -> str:
        """The tables as a page that stands alone."""
        return Page("Collectives", self.summary, sections=self.sections()).to_html()


class TraceDifference:
    """In what two traces differ: empty, and false, where they don't. Prints the first difference, and then all."""

    def __init__(self, ours: Sequence[Collective], theirs: Sequence[Collective]) -> None:
        matcher = SequenceMatcher(None, [one.what for one in ours], [one.what for one in theirs], autojunk=False)
        self.changes = [
            (start, list(ours[start:stop]), list(theirs[begin:end]))
            for tag, start, stop, begin, end in matcher.get_opcodes()
            if tag != "equal"
        ]

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __str__(self) -> str:
        if not self.changes:
            return "No difference."
        start, ours, theirs = self.changes[0]
        lines = [f"The first difference is at collective {start}: {_first(ours)} here, {_first(theirs)} there."]
        for start, ours, theirs in self.changes:
            lines += [f"@ {start}", *(f"- {one}" for one in ours), *(f"+ {one}" for one in theirs)]
        return "\n".join(lines)


def describe_group(group: dist.ProcessGroup | None) -> tuple[str, tuple[int, ...]]:
    """Name and ranks of a process group."""
    return (group.group_name, tuple(dist.get_process_group_ranks(group))) if group is not None else ("", ())


def _first(records: list[Collective]) -> str:
    return str(records[0]) if records else "nothing"


def _kinds_of_layers(records: Sequence[Collective]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Title and rows of a table for each run of layers that do the same, in the order of the first collective of each."""
    layers: dict[str, list[Collective]] = {}
    for record in records:
        layers.setdefault(layer_of(record.module), []).append(record)
    alike: dict[tuple[object, ...], list[str]] = {}
    for layer, found in layers.items():
        own = tuple((record.what[0:2], record.module[len(layer) :], record.what[3:]) for record in found)
        alike.setdefault((own if layer else ("", own)), []).append(layer)
    for names in alike.values():
        yield _title(names), _rows([(record, name) for name in names for record in layers[name]])


def _title(names: list[str]) -> str:
    if names == [""]:
        return "outside of the layers"
    if len(names) == 1:
        return names[0]
    return f"{names[0]}, and {len(names) - 1} more that do the same"


def _rows(found: list[tuple[Collective, str]]) -> list[tuple[str, ...]]:
    """One for each kind of call in a layer, with how often it happens there."""
    layers = len({layer for _, layer in found})
    seconds: dict[tuple[str, ...], list[float]] = {}
    for record, layer in found:
        where = record.module[len(layer) :].removeprefix(".") or (record.module or "(no module)")
        size = f"{record.bytes / 2**10:,.2f}"
        shape = f"{record.dtype} {'x'.join(str(length) for length in record.shape) or 'scalar'}"
        seconds.setdefault((record.phase, record.op, where, record.tensor, shape, size), []).append(record.seconds)
    return [(*cells, str(len(times) // layers), f"{median(times) * 1e6:,.1f}") for cells, times in seconds.items()]
