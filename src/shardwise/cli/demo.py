"""`shardwise demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.app import app
from shardwise.cli.files import to_write
from shardwise.demo.run import start
from shardwise.demo.settings import Settings
from shardwise.launch import asked_size
from shardwise.quiet import quiet


@app.command()
def demo(
    tp: Annotated[int | None, typer.Option(min=2, help="Ranks: 2, or as many as torchrun has started.")] = None,
    steps: Annotated[int | None, typer.Option(min=10, help="Optimizer steps: 160, with --fast 20.")] = None,
    output: Annotated[
        Path, typer.Option(file_okay=False, callback=to_write, help="Folder for the picture, the report and the checkpoint.")
    ] = Path("demo-output"),
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and the order of the batches.")] = 0,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, help="A file or folder to train on, in place of the Python standard library's sources."),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A tiny model and a few steps; the same checks.")] = False,
) -> None:
    """Train, check, save and reload a small model on several ranks, beside the same in one process.

    It starts its own ranks (or uses torchrun's), on CPUs, and needs no network. Exit code 0 only when every check holds.
    """
    with quiet():
        code = start(Settings(asked_size(tp), steps, output, seed, text, fast))
    raise typer.Exit(code)
