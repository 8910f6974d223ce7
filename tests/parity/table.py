"""The results as a table on the screen and as `docs/architectures.md`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from parity.job import Outcome
from parity.sizes import LARGE, RANKS, RealSize, real_size
from parity.types import ELSEWHERE, FILLED

RANK_COUNTS = (2, 4)
COLUMNS = (
    "type",
    "tp=2",
    "tp=4",
    "logits",
    "gradients",
    "bytes, tp=2",
    "bytes, tp=4",
    f"bytes, tp={RANKS}",
    "beyond an even part",
)
_HEAD = f"""\
# Architectures

Every causal-LM type of transformers that has a plan, its own or one of ours, on 2 and on 4 ranks beside one process.
`make parity` runs the checks and writes this file.

*exact*: a tiny random model with each kind of layer that the type has is loaded from a checkpoint with `tp_plan="auto"`.
Logits are within 1e-4 of one process's, the loss is within 1e-5, and every gradient is within 1e-3 of its size, after one and
after two accumulated micro-batches. Replicated gradients are the same bit by bit on every rank. Eight greedy tokens are the
same. The checkpoint that is saved has the bytes of the one that was loaded.

*logits*, *gradients*: the largest error on 2 or 4 ranks, the first absolute, the second relative.

*bytes*: those of the fullest rank, times the ranks, over the model's: 1 is an even split. On 2 and 4 ranks it is the tiny
model, of which the small tensors that stay whole are a larger part; on {RANKS} ranks it is the model of the type's default
config, planned without memory. The last column names what adds more than {LARGE:.0%} of the model, for one reason, to what
the ranks hold together, how much, and the reason, or why the default sizes can't be split over {RANKS} ranks.

"""


@dataclass(frozen=True)
class Result:
    """A type on some ranks: what came out, or in one line why nothing did. `possible`: its tiny model can be cut so often."""

    outcome: Outcome | None
    failure: str = ""
    possible: bool = True

    @property
    def exact(self) -> bool:
        """Whether everything is as it should be."""
        return self.outcome is not None and not self.outcome.wrong

    @property
    def word(self) -> str:
        """For a cell."""
        return "exact" if self.exact else "**wrong**" if self.possible else "can't be cut"

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as it should be."""
        return self.outcome.wrong if self.outcome is not None else (self.failure,)


Results = Mapping[str, Mapping[int, Result]]


def cells(name: str, results: Mapping[int, Result], size_of: Callable[[str], RealSize] = real_size) -> tuple[str, ...]:
    """A type's row, as text."""
    outcomes = [result.outcome for result in results.values() if result.outcome is not None]
    words = [results[size].word for size in RANK_COUNTS]
    shares = [f"{outcome.share:.3f}" if (outcome := results[size].outcome) is not None else "-" for size in RANK_COUNTS]
    errors = [_error(outcomes, lambda outcome: outcome.logits), _error(outcomes, lambda outcome: outcome.gradients)]
    return (name, *words, *errors, *shares, *size_of(name).cells())


def render(results: Results) -> str:
    """`docs/architectures.md`."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(cells(name, result) for name, result in results.items())]
    text = _HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    filled = ", ".join(f"`{name}`" for name in FILLED)
    elsewhere = "; ".join(f"`{name}`: {where}" for name, where in ELSEWHERE.items())
    return (
        f"{text}\nThe default config leaves open what a model needs, and the sizes are filled in: {filled}.\n"
        f"\nNot in the table: {elsewhere}.\n"
    )


def written(text: str) -> dict[str, tuple[str, ...]]:
    """The rows of the first table in a `docs/architectures.md` (of the first in what follows a heading), by type."""
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")]
    rows = [line.strip("|").split(" | ") for line in lines]
    return {row[0].strip(): tuple(cell.strip() for cell in row) for row in rows[2:]}


def show(results: Results, console: Console, size_of: Callable[[str], RealSize] = real_size) -> None:
    """The table, then what is wrong."""
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS[:-1]:
        table.add_column(column, justify="left" if column in COLUMNS[:3] else "right", no_wrap=True)
    for name, result in results.items():
        table.add_row(*(re.sub(r"\*\*(.*)\*\*", r"[red]\1[/]", cell) for cell in cells(name, result, size_of)[:-1]))
    console.print(table)
    for name, result in results.items():
        for size, one in result.items():
            if not one.exact:
                console.print(f"{name}, tp={size}: {'; '.join(one.problems)}", style="red", markup=False)
    exact = sum(one.exact for result in results.values() for one in result.values())
    console.print(f"{exact} of {sum(map(len, results.values()))} exact")


def _error(outcomes: list[Outcome], read: Callable[[Outcome], float]) -> str:
    largest = max(map(read, outcomes), default=math.nan)
    return f"{largest:.0e}"
