"""`make parity`: every type on 2 and on 4 ranks; prints the table and writes `docs/architectures.md`."""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path

from rich.console import Console
from rich.progress import track

from parity.suite import Suite
from parity.table import RANK_COUNTS, Result, render, show
from parity.types import types
from shardwise.errors import PlanError
from shardwise.testing import RankPool

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"


def main(names: list[str]) -> int:
    """Run the types `names`, or all of them and write the document. 0 if all are exact, where they can be cut at all."""
    started, console = time.monotonic(), Console(width=120)
    results: dict[str, dict[int, Result]] = {name: {} for name in names or types()}
    with tempfile.TemporaryDirectory() as directory:
        suite = Suite(Path(directory))
        for size in RANK_COUNTS:
            with RankPool(size) as pool:
                for name in track(results, f"tp={size}", console=console):
                    results[name][size] = _result(suite, name, pool)
    show(results, console)
    console.print(f"{time.monotonic() - started:.0f} seconds")
    if not names:
        DOCUMENT.write_text(render(results))
    return 0 if all(one.exact or not one.possible for result in results.values() for one in result.values()) else 1


def _result(suite: Suite, name: str, pool: RankPool) -> Result:
    try:
        outcome = suite.outcome(name, pool)
    except Exception as error:  # a hang or a crash costs this type only; the pool starts again
        return Result(None, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    if isinstance(outcome, PlanError):
        return Result(None, str(outcome).splitlines()[0], possible=False)
    return Result(outcome)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main(sys.argv[1:]))
