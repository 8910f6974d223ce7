"""The program itself: its name, its version, and how it shows an error."""

from __future__ import annotations

from typing import Annotated

import typer

import shardwise
from shardwise.errors import ShardwiseError

app = typer.Typer(
    name="shardwise",
    help="Tensor parallelism for Hugging Face transformers in plain tensors.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line. What shardwise raises on purpose is shown as a message, with exit code 1."""
    try:
        app()
    except ShardwiseError as error:
        typer.secho(f"{type(error).__name__}: ", err=True, fg="red", bold=True, nl=False)
        typer.echo(str(error), err=True)
        raise SystemExit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shardwise {shardwise.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Tensor parallelism for Hugging Face transformers in plain tensors."""
