"""What is measured, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from benchmarks.models import Model

Effort = Literal["tiny", "quick", "full"]


@dataclass(frozen=True)
class Ranks:
    """How many ranks: alone on torch's fake process group, on which nothing is sent, or as many processes."""

    size: int
    fake: bool = False


FAKE8 = Ranks(8, fake=True)
TWO = Ranks(2)
FOUR = Ranks(4)


@dataclass(frozen=True)
class Case:
    """A task with its sizes.

    Args:
        task: the module of `benchmarks.tasks`.
        options: that the task is prepared with.
        also: models whose checkpoints the task needs beside that of `model`.
        contenders: left out: those of the workload.
        large: only measured when large ones are asked for.
        efforts: for which it is measured.
        reference: what was measured before, elsewhere, of the first figure, by contender.
    """

    name: str
    task: str
    model: Model
    ranks: Ranks
    options: dict[str, object] = field(default_factory=dict)
    also: tuple[Model, ...] = ()
    contenders: tuple[str, ...] = ()
    large: bool = False
    efforts: tuple[Effort, ...] = ("tiny", "quick", "full")
    reference: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What is asked of a contender: a figure, or a fact, or its ratio to that of another one, in every case named.

    Args:
        what: the figure, as the task calls it.
        limit: at most this much, or at least, for `at_least`.
        against: a contender, or `"best peer"`; empty where the figure itself is limited.
        cases: by default all.
    """

    what: str
    limit: float
    against: str = ""
    at_least: bool = False
    cases: tuple[str, ...] = ()
    contender: str = "shardwise"


@dataclass(frozen=True)
class Workload:
    """Some cases that belong together: a table, a plot and a result file.

    Args:
        figures: name of each figure or fact: what the table calls it, with its unit; the first one is plotted.
        contenders: that take part.
        rounds, steps: turns of every contender, and steps in each, in a full run.
        quick: the same in a quick one.
    """

    name: str
    title: str
    figures: dict[str, str]
    contenders: tuple[str, ...]
    cases: tuple[Case, ...]
    rounds: int
    steps: int
    quick: tuple[int, int]
    targets: tuple[Target, ...] = ()

    def effort(self, effort: Effort) -> tuple[int, int]:
        """Rounds, and steps in each."""
        return {"tiny": (2, 1), "quick": self.quick, "full": (self.rounds, self.steps)}[effort]
