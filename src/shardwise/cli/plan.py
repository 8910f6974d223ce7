"""`shardwise plan`."""

from __future__ import annotations

import shutil
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console, RenderableType
from transformers import PreTrainedConfig

import shardwise
from shardwise.cli.app import app
from shardwise.cli.files import to_write
from shardwise.cli.rules import HELP, read_rules
from shardwise.errors import SimulationError
from shardwise.estimate import Comparison, Estimate, compare, estimate, show
from shardwise.hf import build_on_meta
from shardwise.plan import Plan
from shardwise.plan import show as plan_show
from shardwise.planning import PlanLike, proven_plan
from shardwise.quiet import quiet
from shardwise.subject import find_config, positions


class OptimizerChoice(str, Enum):
    """Names of `shardwise.estimate.step.OPTIMIZERS`, as typer wants them."""

    adamw = "adamw"
    sgd = "sgd"
    none = "none"


class DtypeChoice(str, Enum):
    """Dtypes of parameters."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class DeviceChoice(str, Enum):
    """Kinds of devices."""

    cpu = "cpu"
    cuda = "cuda"


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or a model type of transformers, such as llama.")],
    tp: Annotated[str, typer.Option(metavar="N[,N...]", help="Ranks; several numbers, as in 1,2,4,8, are compared.")],
    batch: Annotated[int, typer.Option(min=1, help="Sequences that a rank computes at once.")] = 1,
    sequence: Annotated[int | None, typer.Option(min=1, help="Tokens of each: 2048, or as many as the model takes.")] = None,
    dtype: Annotated[DtypeChoice | None, typer.Option(help="Of the parameters: what the config says.")] = None,
    optimizer: Annotated[OptimizerChoice, typer.Option(help="Whose states are reckoned with.")] = OptimizerChoice.adamw,
    inference: Annotated[
        bool, typer.Option("--inference", help="A prefill into a KV cache in place of a training step.")
    ] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Activation checkpointing, layer by layer.")] = False,
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="Each rank keeps its slice of the sequence between attention and MLP.")
    ] = False,
    device: Annotated[
        DeviceChoice | None, typer.Option(help="Whose attention kernels and optimizer: this machine's, or the other.")
    ] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Ranks to which whole experts are dealt.")] = None,
    rules: Annotated[str, typer.Option("--plan", help=HELP)] = "auto",
    prove: Annotated[
        bool, typer.Option("--prove", help="Show on simulated ranks that the plan computes what the model does.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, callback=to_write, help="Write all of it as a web page, too.")
    ] = None,
) -> None:
    """What each rank will hold and send, before any weight is read."""
    console = Console(highlight=False, width=max(shutil.get_terminal_size((100, 24)).columns, 80))
    sizes = _sizes(tp)
    with quiet():
        config = find_config(model)
        options = {
            "batch": batch,
            "sequence": sequence or positions(config, most=2048),
            "training": not inference,
            "optimizer": optimizer.value,
            "dtype": getattr(torch, dtype.value) if dtype else None,
            "sequence_parallel": sequence_parallel,
            "checkpointing": checkpointing,
            "device": device.value if device else None,
        }
        given = read_rules(rules)
        if len(sizes) > 1:
            found: Comparison | Estimate | Plan = compare(config, sizes, given, ep_size=ep, **options)
        else:
            found = _find(config, sizes[0], given, ep, options, console)
        proofs = [_proof(config, size, given, ep) for size in sizes if prove and size > 1]
    for part in (*_parts(found, console), *proofs):
        console.print(part)
    if html is not None:
        html.write_text(found.to_html(), encoding="utf-8")
        console.print(f"\nWritten to {html}.", markup=False)
    if isinstance(found, Comparison) and not found.possible:
        raise typer.Exit(1)


def _proof(config: PreTrainedConfig, tp: int, rules: PlanLike, ep: int | None) -> str:
    """What the proof of a plan found, in words. Raises `PlanError` for a plan that is wrong, with the module and the figure."""
    model = build_on_meta(config)
    proof = shardwise.prove(shardwise.plan(model, tp, rules, ep_size=ep), model)
    worst = f" ({proof.worst})" if proof.worst else ""
    return (
        f"\nproven  tp={tp}: outputs within {proof.outputs:.1e} of one process, gradients within {proof.gradients:.1e}{worst}, "
        "on simulated ranks with random weights"
    )


def _parts(found: Comparison | Estimate | Plan, console: Console) -> list[RenderableType]:
    if isinstance(found, Comparison):
        return found.text()
    if isinstance(found, Plan):
        return plan_show.text(found, console.width)
    return show.text(found, console.width, colours=console.color_system in ("256", "truecolor"))


def _sizes(given: str) -> list[int]:
    try:
        sizes = [int(one) for one in given.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise typer.BadParameter(f"{given!r}: a number of ranks, or several, as in 1,2,4,8.", param_hint="--tp")
    return sizes


def _find(
    config: PreTrainedConfig, tp: int, rules: PlanLike, ep: int | None, options: dict[str, object], console: Console
) -> Estimate | Plan:
    try:
        return estimate(config, tp, rules, ep_size=ep, **options)  # type: ignore[arg-type]
    except SimulationError as error:
        table = proven_plan(build_on_meta(config), tp, rules, ep)  # rules that don't go together stop a step as well
        console.print(f"{error}\n\nThe table of rules needs no simulation:\n", markup=False)
        return table
