"""`shardwise profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import shardwise
from shardwise.cli.app import app
from shardwise.cli.files import to_write
from shardwise.launch import asked_size
from shardwise.profiling import show
from shardwise.quiet import quiet


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or, with --random, a model type such as llama.")],
    tp: Annotated[int | None, typer.Option(min=1, help="Ranks: 2, or as many as torchrun has started.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="With torch.compile too, besides eager.")] = False,
    against: Annotated[str, typer.Option(help="The peers: dtensor, transformers, or both with a comma.")] = "",
    random: Annotated[bool, typer.Option("--random", help="Random weights; of a model type, a tiny model.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Keep so many layers, with random weights.")] = None,
    mode: Annotated[str, typer.Option(help="training, forward, or decode.")] = "training",
    dtype: Annotated[str | None, typer.Option(help="Of the weights, as bfloat16; by default the checkpoint's own.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 4,
    sequence: Annotated[int | None, typer.Option(min=2, help="Tokens in each: 512, or the model's most.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, without the profiler.")] = 5,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before those.")] = 3,
    stacks: Annotated[
        bool, typer.Option("--stacks", help="Python's frames in the traces, for a slower profiled step.")
    ] = False,
    output: Annotated[Path, typer.Option(file_okay=False, callback=to_write, help="Folder for traces and report.")] = Path(
        "profile-output"
    ),
) -> None:
    """Where a step's time goes on each rank, what the ranks wait for, and how the peers do.

    It starts its own ranks, or uses torchrun's.
    """
    console = Console(highlight=False)
    with quiet():
        result = shardwise.profile(
            model,
            tp=asked_size(tp),
            compile=compile,
            against=[name.strip() for name in against.split(",") if name.strip()],
            random=random,
            layers=layers,
            mode=mode,
            dtype=dtype,
            batch=batch,
            sequence=sequence,
            steps=steps,
            warmup=warmup,
            stacks=stacks,
            output=output,
            show=True,
        )
    if result is None:
        return
    for part in show.parts(result):
        console.print(part)
    console.print(f"\nWritten to {output}: report.html, report.json, ranks/, and for ui.perfetto.dev")
    for one in result.profiles:
        console.print(f"  {one.cell.key}.trace.json.gz")
