"""`make parity`: every type on 2 and on 4 ranks; prints the tables and writes `docs/architectures.md`."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

from rich.console import Console
from rich.progress import track

from parity import wrappers
from parity.calls import UNSOLVED
from parity.suite import Suite
from parity.table import RANK_COUNTS, Result, cells, render, show, with_rows
from parity.types import every, planned
from parity.wrapper_table import TITLE, render_wrappers, size_of, wrapper_cells
from shardwise.errors import PlanError
from shardwise.testing import RankPool

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"


def main(names: list[str]) -> int:
    """Run the types and wrappers `names`, or all of them, and write their rows of the document; "wrappers": all wrappers, and
    their table. 0 if all are exact that can be cut at all.
    """
    started, console = time.monotonic(), Console(width=120)
    known = ([], wrappers.names()) if names == ["wrappers"] else (every(), wrappers.names())
    whole = not names or names == ["wrappers"]
    chosen = [[name for name in all_of_them if whole or name in names] for all_of_them in known]
    with tempfile.TemporaryDirectory() as directory:
        suites = (
            Suite(Path(directory) / "types", found_once=lambda name: name not in planned()),
            Suite(Path(directory) / "wrappers", wrappers.build, wrappers.subject),
        )
        plain: dict[str, dict[int, Result]] = {name: {} for name in chosen[0]}
        wrapped: dict[str, dict[int, Result]] = {name: {} for name in chosen[1]}
        for size in RANK_COUNTS:
            with RankPool(size, backend="cpu:shm") as pool:
                for suite, results in zip(suites, (plain, wrapped), strict=True):
                    for name in track(results, f"tp={size}", console=console):
                        results[name][size] = _result(suite, name, pool)
    for results, sizes in ((plain, None), (wrapped, size_of)):
        if results:
            show(results, console, sizes)
    console.print(f"{time.monotonic() - started:.0f} seconds")
    if whole:
        first = DOCUMENT.read_text().split(f"\n## {TITLE}\n")[0] if names else render(plain)
        DOCUMENT.write_text(first + render_wrappers(wrapped))
    else:
        first, heading, rest = DOCUMENT.read_text().partition(f"\n## {TITLE}\n")
        DOCUMENT.write_text(
            with_rows(first, map(cells, plain, plain.values()))
            + heading
            + with_rows(rest, map(wrapper_cells, wrapped, wrapped.values()))
        )
    found = [one for results in (plain, wrapped) for result in results.values() for one in result.values()]
    return 0 if all(one.exact or one.open or not one.possible for one in found) else 1


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
