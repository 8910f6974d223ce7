"""`shardwise plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import shardwise
from shardwise.cli.app import app
from shardwise.quiet import quiet
from shardwise.subject import find_config


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or a model type of transformers, such as llama.")],
    tp: Annotated[int, typer.Option(min=1, help="Ranks.")],
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the table as a web page, too.")] = None,
) -> None:
    """What each rank will hold, before any weight is read."""
    with quiet():
        table = shardwise.plan(find_config(model), tp)
    typer.echo(str(table).rstrip())
    if html is not None:
        html.write_text(table.to_html(), encoding="utf-8")
        typer.echo(f"Written to {html}.")
