"""The program `shardwise`."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

import shardwise
from shardwise.demo.quiet import quiet
from shardwise.demo.run import start
from shardwise.demo.settings import Settings
from shardwise.errors import ShardwiseError, describe

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


@app.command()
def demo(
    tp: Annotated[int | None, typer.Option(min=2, help="Ranks: 2, or as many as torchrun has started.")] = None,
    steps: Annotated[int | None, typer.Option(min=10, help="Optimizer steps: 160, with --fast 20.")] = None,
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the picture, the report and the checkpoint.")
    ] = Path("demo-output"),
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and the order of the batches.")] = 0,
    text: Annotated[
        Path | None, typer.Option(help="A file or folder to train on, in place of the Python standard library's sources.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A tiny model and a few steps; the same checks.")] = False,
) -> None:
    """Train, check, save and reload a small model on several ranks, beside the same in one process.

    It starts its own ranks (or uses torchrun's), on CPUs, and needs no network. Exit code 0 only when every check holds.
    """
    size = tp if tp is not None else int(os.environ.get("WORLD_SIZE", "2"))
    with quiet():
        code = start(Settings(size, steps, output, seed, text, fast))
    raise typer.Exit(code)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or a model type of transformers, such as llama.")],
    tp: Annotated[int, typer.Option(min=1, help="Ranks.")],
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the table as a web page, too.")] = None,
) -> None:
    """What each rank will hold, before any weight is read."""
    with quiet():
        table = shardwise.plan(load_config(model), tp)
    typer.echo(str(table).rstrip())
    if html is not None:
        html.write_text(table.to_html(), encoding="utf-8")
        typer.echo(f"Written to {html}.")


def load_config(model: str) -> PreTrainedConfig:
    """The config of a directory, a model type (its default sizes) or a hub id. Raises `ShardwiseError` where there is none."""
    if not os.path.isdir(model) and model in CONFIG_MAPPING:
        return AutoConfig.for_model(model)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ShardwiseError(
            describe(
                f"{model}: no directory with a config.json, no model type of transformers, and no model that the hub gives.",
                why=str(error).splitlines()[0],
                either=["a path or a hub id that exists, or", f"one of the types: {_types_like(model)}"],
            )
        ) from error


def _types_like(name: str) -> str:

    return ", ".join(get_close_matches(name, CONFIG_MAPPING.keys(), n=4, cutoff=0.4) or ["llama", "qwen3", "mixtral"])


if __name__ == "__main__":
    main()
