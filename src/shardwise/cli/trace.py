"""`shardwise trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.app import app
from shardwise.cli.files import to_write
from shardwise.cli.rules import HELP, read_rules
from shardwise.launch import asked_size
from shardwise.quiet import quiet
from shardwise.tracing.run import start
from shardwise.tracing.settings import Settings


@app.command()
def trace(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or with --random a model type, such as llama.")],
    tp: Annotated[int | None, typer.Option(min=2, help="Ranks: 2, or as many as torchrun has started.")] = None,
    mode: Annotated[str, typer.Option(help="training, forward, or decode.")] = "training",
    compile: Annotated[bool, typer.Option("--compile", help="Through torch.compile.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare the ranks before each collective.")] = False,
    plan: Annotated[str, typer.Option(help=HELP)] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    sequence: Annotated[int, typer.Option(min=2, help="Tokens in each.")] = 16,
    layers: Annotated[int | None, typer.Option(min=1, help="Keep this many layers, with random weights.")] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights: of a model type its tiny model, else the model's own sizes.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, callback=to_write, help="Write rank 0's trace, too.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, callback=to_write, help="Write the tables as a web page, too.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(dir_okay=False, exists=True, help="Compare with what --json has written before.")
    ] = None,
) -> None:
    """Every collective of a step, by layer: module, phase, shape, bytes, duration; the ranks beside each other.

    Exit code 0 only when all ranks do the same, and with --against what was done before.
    """
    files = [str(file) if file is not None else None for file in (json_file, html, against)]
    rules = read_rules(plan)
    with quiet():
        code = start(Settings(model, asked_size(tp), rules, mode, compile, check, batch, sequence, random, layers, *files))
    raise typer.Exit(code)
