"""`shardwise freeze`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shardwise import tiny
from shardwise.cli.app import app
from shardwise.freeze import NotBuilt, NotFrozen, drift
from shardwise.freeze import freeze as make
from shardwise.plans.frozen import FOLDER
from shardwise.quiet import quiet


@app.command()
def freeze(
    types: Annotated[list[str] | None, typer.Argument(help="Model types of transformers, such as bert.")] = None,
    folder: Annotated[Path, typer.Option(file_okay=False, help="Where the files go: those that auto uses.")] = FOLDER,
    check: Annotated[bool, typer.Option("--check", help="Write nothing: say which files, of all types, have drifted.")] = False,
) -> None:
    """Keep the plan of a type: a file for all of its sizes, proven on several.

    Of a type that brings a plan, with our corrections, it is there to be read, and to be compared with; else the inferred plan
    is kept, and tp_plan="auto" uses it. Exit code 0 only when every type was frozen; with --check, when no file says anything
    else than what auto does by now.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not types and not check:
        raise typer.BadParameter("name a type, such as bert; or --check")
    done = [_check(name, console) if check else _freeze(name, folder, console) for name in types or tiny.types()]
    if check:
        console.print(f"{done.count(True)} of {len(done) - done.count(None)} types are cut as their files say.")
    raise typer.Exit(False in done)


def _freeze(name: str, folder: Path, console: Console) -> bool:
    start = time.perf_counter()
    try:
        with quiet():
            found = make(name)
    except NotFrozen as error:
        console.print(f"{name}: not frozen: {error} ({time.perf_counter() - start:.1f} s)")
        return False
    path = folder / f"{found.type}.json"
    path.write_text(found.to_json(), encoding="utf-8")
    rules = len(found.variants[0].rules)
    took = f"{path.stat().st_size / 1024:.1f} KiB, {time.perf_counter() - start:.1f} s"
    console.print(f"{name}: {rules} rules cut {found.cut:.0%} of the model ({took}): {path}")
    return True


def _check(name: str, console: Console) -> bool | None:
    """Whether the file of a type is as it should be; None where that can't be seen here."""
    try:
        with quiet():
            found = drift(name)
    except NotBuilt as error:
        console.print(f"{name}: not looked at: {error}")
        return None
    if found is not None:
        console.print(f"{name}: {found}")
    return found is None
