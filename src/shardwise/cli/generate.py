"""`shardwise generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from shardwise.cli.app import app
from shardwise.cli.rules import HELP, read_rules
from shardwise.errors import ShardwiseError
from shardwise.launch import asked_size
from shardwise.prompt.request import Request
from shardwise.prompt.run import start
from shardwise.quiet import quiet


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or with --random a model type, such as llama.")],
    tp: Annotated[int | None, typer.Option(min=1, help="Ranks: 2, or as many as torchrun has started.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The text to continue; - reads it from standard input.")] = None,
    ids: Annotated[str | None, typer.Option(help="Tokens to continue, as in '1 2 3', of a model without a tokenizer.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="How many are generated at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="Of the weights, as bfloat16; by default the checkpoint's own.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    plan: Annotated[str, typer.Option(help=HELP)] = "auto",
    layers: Annotated[int | None, typer.Option(min=1, help="Keep this many layers, with random weights.")] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights: of a model type its tiny model, else the model's own sizes.")
    ] = False,
) -> None:
    """Continue a text with a model on several ranks, written as it comes. The tokens are those of one process."""
    text = sys.stdin.read() if prompt == "-" else prompt
    tokens, rules = _tokens(ids), read_rules(plan)
    with quiet():
        start(Request(model, asked_size(tp), text, tokens, new_tokens, temperature, seed, dtype, chat, random, layers, rules))


def _tokens(ids: str | None) -> tuple[int, ...]:
    try:
        return tuple(map(int, (ids or "").replace(",", " ").split()))
    except ValueError:
        raise ShardwiseError(f"--ids {ids!r}: numbers are needed, as in --ids '1 2 3'.") from None
