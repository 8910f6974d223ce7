"""`make parity`: every type on 2 and on 4 ranks; prints the tables and writes `docs/architectures.md`.

Then the proofs of the plans at other sizes and with other flags, in this process.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import track

from parity import others, wrappers
from parity.calls import UNSOLVED
from parity.others_table import TITLE as OTHERS_TITLE
from parity.others_table import render_others, rows_of
from parity.stand_ins import NOT_BUILT
from parity.suite import Suite
from parity.table import RANK_COUNTS, Result, Results, cells, render, renewed, show, with_rows
from parity.types import every, planned
from parity.variants import Inferred, problem_of_flags, problem_of_sizes
from parity.wrapper_table import TITLE, render_wrappers, size_of, wrapper_cells
from shardwise.errors import PlanError
from shardwise.testing import RankPool

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"


def main(names: list[str]) -> int:
    """Run the types and wrappers `names`, or everything, and write their rows of the document; "wrappers", "others": all of
    these, and their table; "others:bert": of the others, what is of this type. 0 if all are exact that can be cut at all.
    """
    started, console = time.monotonic(), Console(width=120)
    tables = ("types", "wrappers", "others")
    asked = [table for table in tables if not names or table in names]
    known = (every(), wrappers.names(), others.names())
    chosen = [
        [name for name in all_of_them if table in asked or _asked_as(table, name) in names]
        for table, all_of_them in zip(tables, known, strict=True)
    ]
    with tempfile.TemporaryDirectory() as directory:
        suites = (
            Suite(Path(directory) / "types", found_once=lambda name: name not in planned()),
            Suite(Path(directory) / "wrappers", wrappers.build, wrappers.subject),
            Suite(Path(directory) / "others", others.build, others.subject, found_once=lambda name: True),
        )
        results: list[dict[str, dict[int, Result]]] = [{name: {} for name in chosen[at]} for at in range(3)]
        for size in RANK_COUNTS:
            with RankPool(size, backend="cpu:shm") as pool:
                for suite, found in zip(suites, results[: 3 if size == 2 else 2], strict=False):
                    for name in track(found, f"tp={size}", console=console):
                        found[name][size] = _result(suite, name, pool)
    plain, wrapped, rest = results
    for found, sizes in ((plain, None), (wrapped, size_of)):
        if found:
            show(found, console, sizes)
    alone = {name: result[2] for name, result in rest.items()}
    for name, result in alone.items():
        console.print(f"{name}: {'exact' if result.exact else '; '.join(result.problems)}", markup=False)
    console.print(f"{time.monotonic() - started:.0f} seconds")
    _write(asked, plain, wrapped, alone)
    everything = [one for found in results for result in found.values() for one in result.values()]
    all_exact = all(one.exact or one.open or not one.possible for one in everything)
    return 0 if _all_proven(chosen[0], console) and all_exact else 1


def _asked_as(table: str, name: str) -> str:
    """What says that a row is wanted: of the others, which are named as types are, with the table in front."""
    return f"{table}:{name.partition(' ')[0]}" if table == "others" else name


def _write(asked: list[str], plain: Results, wrapped: Results, rest: Mapping[str, Result]) -> None:
    """The tables that were `asked` for, and single rows of those of types and wrappers."""
    text = DOCUMENT.read_text()
    before, _, last = text.partition(f"\n## {OTHERS_TITLE}\n")
    first, heading, second = before.partition(f"\n## {TITLE}\n")
    first = render(plain) if "types" in asked else renewed(first, map(cells, plain, plain.values()))
    rows = map(wrapper_cells, wrapped, wrapped.values())
    second = render_wrappers(wrapped) if "wrappers" in asked else heading + with_rows(second, rows)
    last = render_others(rest) if "others" in asked else f"\n## {OTHERS_TITLE}\n{with_rows(last, rows_of(rest))}"
    DOCUMENT.write_text(first + second + last)


def _all_proven(names: list[str], console: Console) -> bool:
    """Whether no plan is wrong at other sizes, or with other flags; says which are, and how many were proven."""
    checks, proven, wrong = {"other sizes": problem_of_sizes, "other flags": problem_of_flags}, 0, 0
    for name in track([name for name in names if name not in NOT_BUILT], "proofs", console=console):
        for what, problem_of in checks.items():
            try:
                problem = problem_of(name)
            except Inferred:  # and proven there
                continue
            except Exception as error:
                problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            proven, wrong = proven + (not problem), wrong + bool(problem)
            if problem:
                console.print(f"{name}, {what}: {problem}", style="red", markup=False)
    console.print(
        f"{proven} of {proven + wrong} plans are proven at other sizes, or with other flags; the rest is inferred there"
    )
    return not wrong


def _result(suite: Suite, name: str, pool: RankPool) -> Result:
    known = (name, pool.size) in UNSOLVED
    try:
        outcome = suite.outcome(name, pool)
    except Exception as error:  # a hang or a crash costs this type only; the pool starts again
        return Result(None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", open=known)
    if isinstance(outcome, PlanError):
        return Result(None, str(outcome).splitlines()[0], possible=False, open=known)
    return Result(outcome, open=known)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("shardwise").setLevel(logging.ERROR)  # each inferred plan is said
    sys.exit(main(sys.argv[1:]))
