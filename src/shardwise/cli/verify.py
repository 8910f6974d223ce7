"""`shardwise verify`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer
from rich.console import Console

import shardwise
from shardwise.cli.app import app
from shardwise.cli.files import to_write
from shardwise.cli.rules import HELP, read_rules
from shardwise.verify.settings import DTYPES
from shardwise.verify.show import WIDTH, findings, heading


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or with --random a model type, such as llama.")],
    tp: Annotated[int | None, typer.Option(min=1, help="Ranks: 2, or as many as torchrun has started.")] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Deal whole experts to this many ranks.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of weights and activations: {', '.join(DTYPES)}.")] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="Train through torch.compile on the ranks.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Keep this many layers, with random weights.")] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights: of a model type its tiny model, else the model's own sizes.")
    ] = False,
    plan: Annotated[str, typer.Option(help=HELP)] = "auto",
    imports: Annotated[
        list[str] | None, typer.Option("--import", help="A module or a .py file that registers styles of yours.")
    ] = None,
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="Slice the sequence between layers.")] = False,
    batch: Annotated[int, typer.Option(min=2, help="Sequences in a micro-batch.")] = 2,
    sequence: Annotated[int, typer.Option(min=4, help="Tokens in a sequence.")] = 12,
    timeout: Annotated[float, typer.Option(help="Seconds until ranks that still run are ended.")] = 900.0,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, callback=to_write, help="Write the report as a web page, too.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, callback=to_write, help="Write every number as JSON, too.")
    ] = None,
) -> None:
    """Compare a model on several ranks with one process, and find where they first differ.

    First the plan is proven in one process, part by part. Then, on the ranks: logits, loss, every gradient, generated tokens,
    saved bytes, replicas. Exit code 0 only when everything holds.
    """
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    result = shardwise.verify(
        model,
        tp,
        tp_plan=read_rules(plan),
        ep_size=ep,
        dtype=dtype,
        compile=compile,
        layers=layers,
        random=random,
        sequence_parallel=sequence_parallel,
        batch=batch,
        sequence=sequence,
        imports=imports or (),
        timeout=timeout,
        on_proof=lambda known: console.print(heading(known), ""),
    )
    if int(os.environ.get("RANK", "0")) == 0:
        console.print(findings(result))
        if html is not None:
            html.write_text(result.to_html(), encoding="utf-8")
            typer.echo(f"Written to {html}.")
        if json_file is not None:
            json_file.write_text(result.to_json(), encoding="utf-8")
            typer.echo(f"Written to {json_file}.")
    if dist.is_initialized():
        dist.barrier()  # torchrun ends the others as soon as one of them leaves with another code than 0
    raise typer.Exit(0 if result.passed else 1)
