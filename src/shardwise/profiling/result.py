"""What `shardwise.profile` gives: the figures of each cell, as tables, as a page, and as files."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardwise.profiling import show
from shardwise.profiling.analyse import Analysis, analyse
from shardwise.profiling.breakdown import Found, find
from shardwise.profiling.calls import Call
from shardwise.profiling.capture import Record
from shardwise.profiling.contenders import what_it_is
from shardwise.profiling.events import read_rank
from shardwise.profiling.merge import merge, save_merged
from shardwise.profiling.settings import Cell, Settings
from shardwise.report import as_text


@dataclass(frozen=True)
class Profile:
    """One cell: what was measured of it. Prints as tables of the profiled step.

    Attributes:
        cell: who and how.
        seconds: of each timed step, without the profiler: on the slowest rank.
        analysis: of the profiled step.
        records: what each rank knew.
        found, matches: of the ranks' traces, for the merged one.
    """

    cell: Cell
    seconds: list[float]
    analysis: Analysis
    records: list[Record]
    found: list[Found]
    matches: list[list[Call]]

    @classmethod
    def read(cls, folder: Path, cell: Cell, size: int) -> Profile:
        """From what the ranks have left in `folder`."""
        found, matches = find([read_rank(folder, rank) for rank in range(size)])
        records = [one.trace.record for one in found]
        seconds = [max(turn) for turn in zip(*(record.seconds for record in records), strict=True)]
        return cls(cell, seconds, analyse(found, matches), records, found, matches)

    @property
    def step(self) -> float:
        """Seconds of the median step, without the profiler."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Every figure."""
        first = self.records[0]
        return {
            "cell": str(self.cell),
            "seconds": self.seconds,
            "median_seconds": self.step,
            "backend": first.backend,
            "flops": [record.flops for record in self.records],
            "profiled": asdict(self.analysis),
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the trace of all ranks into `folder`."""
        save_merged(self.merged(), Path(folder) / f"{self.cell.key}.trace.json.gz")

    def __str__(self) -> str:
        return as_text(*show.details(self))

    def merged(self) -> dict[str, Any]:
        """The trace of all ranks, in Chrome's format."""
        return merge(self.found, self.matches, str(self.cell))


class Comparison:
    """The result of `shardwise.profile`. Prints as tables."""

    def __init__(self, settings: Settings, profiles: Sequence[Profile]) -> None:
        self.settings, self.profiles = settings, list(profiles)

    @classmethod
    def read(cls, settings: Settings) -> Comparison:
        """From what the ranks have left."""
        return cls(settings, [Profile.read(settings.folder(cell), cell, settings.tp) for cell in settings.cells])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the merged traces, `report.html` and `report.json` into `folder`."""
        where = Path(folder)
        for one in self.profiles:
            one.save(where)
        (where / "report.html").write_text(self.to_html(), encoding="utf-8")
        (where / "report.json").write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")

    @property
    def device(self) -> str:
        """On which was measured: "cpu" or "cuda"."""
        return self.profiles[0].records[0].device

    @property
    def title(self) -> str:
        """What was profiled."""
        asked = self.settings
        what = {
            "training": f"forward and backward of {asked.batch} x {asked.sequence} tokens",
            "forward": f"forward of {asked.batch} x {asked.sequence} tokens",
            "decode": f"{asked.batch} x 1 token behind {asked.sequence}",
        }
        return f"{asked.model} on {asked.tp} ranks: {what[asked.mode]}, {asked.dtype}"

    @property
    def how(self) -> str:
        """On what, and over what, the same for all."""
        record = self.profiles[0].records[0]
        threads = f", {record.threads} thread{'s' * (record.threads > 1)} a rank" if record.device == "cpu" else ""
        return f"{record.device}{threads}; every collective over {record.backend}"

    def table(self, width: int = 128) -> str:
        """The tables as text of at most `width` columns."""
        return as_text(*show.parts(self), width=width)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Every figure, for a program to read."""
        return {
            "settings": json.loads(self.settings.to_json()),
            "device": self.device,
            "contenders": {name: what_it_is(name) for name in {one.cell.contender for one in self.profiles}},
            "cells": [one.to_dict() for one in self.profiles],
        }

    def to_html(self) -> str:
        """The report, a page that stands alone."""
        from shardwise.profiling import page  # loads matplotlib, which takes as long as a step

        return page.make_page(self).to_html()
