"""From what was asked for to the trace: a step on every rank, and what their traces say beside each other."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer

import shardwise
from shardwise.debug import CollectiveTrace, trace_collectives
from shardwise.errors import ShardwiseError, describe
from shardwise.launch import UNMET, check_size, launched, run_as_ranks
from shardwise.report import Page, Section
from shardwise.steps import make_step
from shardwise.subject import find
from shardwise.tracing.settings import Settings

_SECONDS = 3600.0


def start(settings: Settings) -> int:
    """Trace: as one of torchrun's ranks, or on ranks of its own. Returns 0 where all ranks do the same, and, with `against`,
    what was done before; else another number.

    Raises `ShardwiseError` for what cannot be, before a rank is started where that can be known.
    """
    subject = find(settings.model, random=settings.random, layers=settings.layers)
    shardwise.plan(subject.config, settings.tp, settings.plan)
    _earlier(settings)
    if launched():
        check_size(settings.tp)
        return 1 if run(settings) else 0
    command = [sys.executable, "-m", "shardwise.tracing", settings.to_json()]
    return 1 if run_as_ranks(command, settings.tp, timeout=_SECONDS) else 0


def run(settings: Settings) -> int:
    """One rank of it; the first one writes. Returns 0, or `UNMET` on every rank. Collective."""
    trace = _trace(settings)
    traces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(traces, trace.records)
    found = [CollectiveTrace(records) for records in traces]
    said, same = _compare(settings, found)
    if dist.get_rank() == 0:
        typer.echo(f"{trace}\n\n" + "\n".join(said))
        _write(settings, trace, said, same)
    return 0 if same else UNMET


def _trace(settings: Settings) -> CollectiveTrace:
    """Of the second step: what happens in the first alone (a compilation, a cache that is made) is none of it."""
    subject = find(settings.model, random=settings.random, layers=settings.layers)
    with tempfile.TemporaryDirectory(prefix="shardwise-") as folder:
        path, auto = subject.make(Path(folder)), shardwise.AutoModelForCausalLM
        model: Any = auto.from_pretrained(path, tp_plan=settings.plan, tp_size=settings.tp)
    called: Any = torch.compile(model) if settings.compile else model
    step = make_step(settings.mode, model, called, settings.batch, settings.sequence)
    step()
    with trace_collectives(check=settings.check) as trace:
        step()
    return trace


def _compare(settings: Settings, traces: list[CollectiveTrace]) -> tuple[list[str], bool]:
    """In words: whether the ranks do the same, and whether the first does what was done before."""
    said, same = [], True
    for rank, other in enumerate(traces[1:], start=1):
        if difference := traces[0].diff(other):
            said += [f"rank 0 here, rank {rank} there: {difference}"]
            same = False
    if same:
        said.append(f"All {len(traces)} ranks do the same.")
    if (earlier := _earlier(settings)) is not None:
        difference = earlier.diff(traces[0])
        said.append(f"{settings.against} here, this run there: {difference}" if difference else f"As in {settings.against}.")
        same = same and not difference
    return said, same


def _earlier(settings: Settings) -> CollectiveTrace | None:
    if settings.against is None:
        return None
    try:
        return CollectiveTrace.load(settings.against)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ShardwiseError(
            describe(
                f"--against {settings.against}: it is no trace of collectives.",
                why=str(error),
                either=["a file that `shardwise trace --json FILE` has written"],
            )
        ) from error


def _write(settings: Settings, trace: CollectiveTrace, said: list[str], same: bool) -> None:
    if settings.json is not None:
        trace.save(settings.json)
        typer.echo(f"Written to {settings.json}.")
    if settings.html is not None:
        title = f"Collectives of {settings.model}, {settings.mode}, on {settings.tp} ranks"
        compared = Section("Beside each other", text="\n".join(said))
        page = Page(title, trace.summary, same, [*trace.sections(), compared])
        page.save(settings.html)
        typer.echo(f"Written to {settings.html}.")
