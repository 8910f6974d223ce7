"""`shardwise freeze`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shardwise.cli.app import app
from shardwise.freeze import NotFrozen
from shardwise.freeze import freeze as make
from shardwise.plans.frozen import FOLDER
from shardwise.quiet import quiet


@app.command()
def freeze(
    types: Annotated[list[str], typer.Argument(help="Model types of transformers, such as bert.")],
    folder: Annotated[Path, typer.Option(file_okay=False, help="Where the files go: those that auto uses.")] = FOLDER,
) -> None:
    """Keep the inferred plan of a type: a file for all of its sizes, proven on several, which tp_plan="auto" then uses.

    Exit code 0 only when every type was frozen.
    """
    console = Console(highlight=False)
    failed = False
    for name in types:
        start = time.perf_counter()
        try:
            with quiet():
                found = make(name)
        except NotFrozen as error:
            failed = True
            console.print(f"{name}: not frozen: {error} ({time.perf_counter() - start:.1f} s)", markup=False, soft_wrap=True)
            continue
        path = folder / f"{found.type}.json"
        path.write_text(found.to_json(), encoding="utf-8")
        rules = len(found.variants[0].rules)
        took = f"{path.stat().st_size / 1024:.1f} KiB, {time.perf_counter() - start:.1f} s"
        console.print(f"{name}: {rules} rules cut {found.cut:.0%} of the model ({took}): {path}", markup=False, soft_wrap=True)
    raise typer.Exit(failed)
