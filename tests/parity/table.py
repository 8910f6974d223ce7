"""The results as a table on the screen and as `docs/architectures.md`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

import shardwise
from parity.calls import CALLS, UNSOLVED, Call
from parity.job import Outcome
from parity.sizes import LARGE, RANKS, RealSize, kept, real_size
from parity.types import FILLED, on_meta, planned
from parity.variants import Inferred
from shardwise.infer.unknown import cut_share
from shardwise.names import layer_of
from shardwise.resolve import resolve

RANK_COUNTS = (2, 4)
COLUMNS = (
    "type",
    "plan",
    "tp=2",
    "tp=4",
    "logits",
    "gradients",
    "cut",
    "bytes, tp=2",
    "bytes, tp=4",
    f"bytes, tp={RANKS}",
    "beyond an even part",
)
_HEAD = f"""\
# Architectures

Every causal-LM type of transformers on 2 and on 4 ranks beside one process. `make parity` runs the checks and writes this file.

*plan*: whose rules cut the layers: *transformers*', of the type's config or of its text model's, with corrections of ours, and
what they leave out inferred; *ours*; or *frozen*: inferred from what the type computes, proven, and kept in the package.
*inferred* would be a plan that is found anew.

*exact*: a tiny random model with each kind of layer that the type has is loaded from a checkpoint with `tp_plan="auto"`.
Logits are within 1e-4 of one process's, the loss is within 1e-5, and every gradient is within 1e-3 of its size, after one and
after two accumulated micro-batches. Replicated gradients are the same bit by bit on every rank. Eight greedy tokens are the
same, where the type generates. The checkpoint that is saved has the bytes of the one that was loaded. *open*: not yet, and the
last column says why.

*logits*, *gradients*: the largest error on 2 or 4 ranks, the first absolute, the second relative.

*cut*: the share of the tiny model's elements that are cut, on 2 ranks.

*bytes*: those of the fullest rank, times the ranks, over the model's: 1 is an even split. On 2 and 4 ranks it is the tiny
model, of which the small tensors that stay whole are a larger part; on {RANKS} ranks it is the model of the type's default
config, planned without memory. The last column names what adds more than {LARGE:.0%} of the model, for one reason, to what
the ranks hold together, how much, and the reason, or why the default sizes can't be split over {RANKS} ranks. Of types whose
config has no plan it says so of the tiny model on 2 ranks.

"""
_STAND_INS = """
`gemma3n` has two convolutions in the place of a tower of timm's. `gemma4_assistant` and `gemma4_unified_assistant` are called
as in assisted generation, with the states of a target on the same ranks, and have random weights for their logits as a loss;
the tokens are the target's, for which they draft. transformers 5.23 makes none (5.22 does): its check of layers without keys
is taken out here.
"""


@dataclass(frozen=True)
class Result:
    """A type on some ranks: what came out, or in one line why nothing did. `possible`: its tiny model can be cut so often.
    `open`: it is known not to be solved.
    """

    outcome: Outcome | None
    failure: str = ""
    possible: bool = True
    open: bool = False

    @property
    def exact(self) -> bool:
        """Whether everything is as it should be."""
        return self.outcome is not None and not self.outcome.wrong

    @property
    def word(self) -> str:
        """For a cell."""
        return "exact" if self.exact else "open" if self.open else "**wrong**" if self.possible else "can't be cut"

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as it should be."""
        return self.outcome.wrong if self.outcome is not None else (self.failure,)


Results = Mapping[str, Mapping[int, Result]]


def cells(name: str, results: Mapping[int, Result], size_of: Callable[[str], RealSize] | None = None) -> tuple[str, ...]:
    """A type's row, as text. `size_of` says the same of the type's default size, if that is not the causal LM's."""
    outcomes = [result.outcome for result in results.values() if result.outcome is not None]
    words = [results[size].word for size in RANK_COUNTS]
    shares = [f"{outcome.share:.3f}" if (outcome := results[size].outcome) is not None else "-" for size in RANK_COUNTS]
    errors = [_error(outcomes, lambda outcome: outcome.logits), _error(outcomes, lambda outcome: outcome.gradients)]
    cut = f"{100 * cut_share(outcomes[0].plan):.0f} %" if outcomes else "-"
    size = size_of(name) if size_of is not None else real_size(name) if name in planned() else _tiny_size(name, outcomes)
    plan = origin(name) if size_of is None else "text model's"
    return (name, plan, *words, *errors, cut, *shares, *size.cells())


def origin(name: str) -> str:
    """Whose rules cut the layers of a type's tiny model on two ranks, with `tp_plan="auto"`."""
    with (
        CALLS.get(name, Call()).around(),
        patch("shardwise.planning.plan_unknown", side_effect=Inferred),
        patch("shardwise.planning.plan_rest", lambda model, size, rules: resolve(model, rules, size)),
    ):
        try:
            rules = shardwise.plan(on_meta(name), 2).rules
        except Inferred:
            return "inferred"
    sources = {rule.source for place, rule in rules.items() if layer_of(place)}
    return "frozen" if "frozen" in sources else "transformers" if "model" in sources else "ours"


def _tiny_size(name: str, outcomes: Sequence[Outcome]) -> RealSize:
    """What stays whole of the tiny model of a type whose config has no plan, and what is open."""
    missing = [f"tp={size}: {UNSOLVED[name, size]}" for size in RANK_COUNTS if (name, size) in UNSOLVED]
    return RealSize(kept=kept(outcomes[0].plan) if outcomes else (), problem="; ".join(missing))


def render(results: Results) -> str:
    """`docs/architectures.md`."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(cells(name, result) for name, result in results.items())]
    return _around("".join(f"| {' | '.join(row)} |\n" for row in rows))


def _around(rows: str) -> str:
    filled = ", ".join(f"`{name}`" for name in FILLED)
    text = f"{_HEAD}{rows}\nThe default config leaves open what a model needs, and the sizes are filled in: {filled}.\n"
    return text + _STAND_INS


def renewed(text: str, rows: Iterable[tuple[str, ...]]) -> str:
    """`docs/architectures.md` with these rows in the place of those of the same types."""
    kept = [line for line in with_rows(text, rows).splitlines() if line.startswith("| ")]
    return _around("".join(f"{line}\n" for line in kept))


def with_rows(text: str, rows: Iterable[tuple[str, ...]]) -> str:
    """A page with these rows in the place of those of the same types."""
    fresh = {row[0]: f"| {' | '.join(row)} |" for row in rows}
    return "".join(f"{fresh.get(line[2:].partition(' |')[0], line)}\n" for line in text.split("\n"))[:-1]


def written(text: str) -> dict[str, tuple[str, ...]]:
    """The rows of the first table in a `docs/architectures.md` (of the first in what follows a heading), by type."""
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")]
    rows = [line.strip("|").split(" | ") for line in lines]
    return {row[0].strip(): tuple(cell.strip() for cell in row) for row in rows[2:]}


def show(results: Results, console: Console, size_of: Callable[[str], RealSize] | None = None) -> None:
    """The table, then what is wrong."""
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS[:-1]:
        table.add_column(column, justify="left" if column in COLUMNS[:4] else "right", no_wrap=True)
    for name, result in results.items():
        table.add_row(*(re.sub(r"\*\*(.*)\*\*", r"[red]\1[/]", cell) for cell in cells(name, result, size_of)[:-1]))
    console.print(table)
    for name, result in results.items():
        for size, one in result.items():
            if not one.exact and not one.open:
                console.print(f"{name}, tp={size}: {'; '.join(one.problems)}", style="red", markup=False)
    exact = sum(one.exact for result in results.values() for one in result.values())
    console.print(f"{exact} of {sum(map(len, results.values()))} exact")


def _error(outcomes: list[Outcome], read: Callable[[Outcome], float]) -> str:
    largest = max(map(read, outcomes), default=math.nan)
    return f"{largest:.0e}"
