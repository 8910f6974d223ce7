"""What each rank does: build every contender, time their steps in turn, and profile one of each."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.debug import trace_collectives
from shardwise.mesh import local_device
from shardwise.profiling.capture import Capture, synchronize
from shardwise.profiling.contenders import build
from shardwise.profiling.settings import COMPILED, Cell, Settings
from shardwise.steps import Step, make_step

Say = Callable[[str], None]

PROFILED = 3
"""Steps under the profiler, of which the quickest is shown: that with which the rest of the machine interfered least."""


@dataclass
class Running:
    """A cell at work on this rank."""

    cell: Cell
    step: Step
    collectives: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    quickest: float = math.inf
    capture: Capture | None = None


def run(settings: Settings, mesh: DeviceMesh, say: Say) -> None:
    """Measure everything, and leave this rank's traces and records in the folders of the cells. Collective."""
    device = local_device(mesh)
    running = _build(settings, mesh, say)
    for one in running:
        say(f"{one.cell}: warming up")
        _warm_up(one, settings.warmup, device)
    say(f"{settings.steps} steps of each, in turn")
    for turn in range(settings.steps):
        for one in _in_turn(running, turn):
            _time(one, device)
    say(f"{PROFILED} steps of each, in turn, under the profiler")
    for turn in range(PROFILED):
        for one in _in_turn(running, turn):
            _profile(one, settings, device)
    for one in running:
        _save(one, settings)


def _in_turn(running: list[Running], turn: int) -> list[Running]:
    """Nobody is always the first, or always behind the same one."""
    first = turn % len(running)
    return running[first:] + running[:first]


def _build(settings: Settings, mesh: DeviceMesh, say: Say) -> list[Running]:
    models: dict[str, Any] = {}
    running = []
    for cell in settings.cells:
        if cell.contender not in models:
            say(f"{cell.contender}: loading")
            models[cell.contender] = build(cell.contender, settings, mesh)
        model = models[cell.contender]
        called = _compiled(model) if cell.how == COMPILED else model
        running.append(Running(cell, make_step(settings.mode, model, called, settings.batch, settings.sequence)))
    return running


def _compiled(model: nn.Module) -> Any:
    # On CPUs Inductor's kernels show in a trace only with this; it costs them some ten nanoseconds each.
    on_cpu = next(model.parameters()).device.type == "cpu"
    return torch.compile(model, options={"cpp.enable_kernel_profile": True} if on_cpu else None)


def _warm_up(one: Running, steps: int, device: torch.device) -> None:
    for _ in range(steps):
        one.step()
    with trace_collectives() as trace:  # what they are: the profile says when
        one.step()
    one.collectives = [asdict(record) for record in trace]
    with Capture(device, modules=one.cell.how != COMPILED):  # the profiler's own first time
        one.step()
    one.step()
    synchronize(device)


def _time(one: Running, device: torch.device) -> None:
    dist.barrier()
    synchronize(device)
    began = time.perf_counter()
    one.step()
    synchronize(device)
    one.seconds.append(time.perf_counter() - began)


def _profile(one: Running, settings: Settings, device: torch.device) -> None:
    """One more step under the profiler, which is kept where it is the quickest so far, on its slowest rank."""
    gc.collect()  # of what the profiler has left behind, which would be collected in the step
    capture = Capture(device, modules=one.cell.how != COMPILED, stacks=settings.stacks)
    with capture:
        one.step()
    slowest = torch.tensor(capture.seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    if float(slowest) < one.quickest:
        one.quickest, one.capture = float(slowest), capture


def _save(one: Running, settings: Settings) -> None:
    assert one.capture is not None
    record = one.capture.record(seconds=one.seconds, collectives=one.collectives)
    one.capture.save(settings.folder(one.cell), record)
    one.capture = None
