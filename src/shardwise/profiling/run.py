"""`shardwise.profile` and `shardwise profile`, from what was asked for to the result."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch.distributed as dist

import shardwise
from shardwise.errors import MeshError
from shardwise.launch import check_size, launched, run_as_ranks
from shardwise.mesh import tp_mesh
from shardwise.profiling.contenders import check_peers
from shardwise.profiling.rank import Say
from shardwise.profiling.rank import run as run_rank
from shardwise.profiling.result import Comparison
from shardwise.profiling.settings import Settings
from shardwise.subject import Subject, dtype_named, find, positions

_SECONDS = 3600.0


def profile(
    model: str | os.PathLike[str],
    *,
    tp: int = 2,
    compile: bool = False,
    against: Sequence[str] = (),
    random: bool = False,
    layers: int | None = None,
    mode: str = "training",
    dtype: str | None = None,
    batch: int = 4,
    sequence: int | None = None,
    warmup: int = 3,
    steps: int = 5,
    stacks: bool = False,
    output: str | os.PathLike[str] = "profile-output",
    show: bool = False,
) -> Comparison | None:
    """Profile a step of a model on `tp` ranks: where its time goes on each, what they wait for, and how its peers do.

        result = shardwise.profile("path/to/model", tp=2, compile=True, against=("dtensor", "transformers"))
        print(result)  # tables; result.to_html() is the page, result.save(folder) writes all of it

    Starts its own ranks, or is called by each of torchrun's. Writes into `output`: a trace of all ranks for Perfetto for each
    cell, each rank's own trace, `report.html`, `report.json`.

    Args:
        model: a directory or hub id; a model type with `random`.
        tp: ranks.
        compile: with `torch.compile` too, besides eager.
        against: "dtensor" (torch's own styles), "transformers" (its own tensor parallelism).
        random: random weights: of a type a tiny model, else the model's own sizes.
        layers: keep so many layers, with random weights.
        mode: "training" (forward and backward), "forward" (without gradient), or "decode" (one token behind a cache).
        dtype: of the weights, as "bfloat16"; by default the checkpoint's own, and float32 where weights are made.
        batch, sequence: of the input; by default 4 and 512, or as many positions as the model has.
        warmup, steps: steps before anything counts, and those that are timed, without the profiler.
        stacks: Python's frames in the traces; slows the profiled step.
        output: folder, seen by all ranks.
        show: say on rank 0 what is being done.

    Returns the result, on rank 0 where torchrun has started the ranks; None on the others.
    Raises `ShardwiseError` for what cannot be, before any rank is started where that can be known.
    """
    subject = find(os.fspath(model), random=random, layers=layers)
    plan = shardwise.plan(subject.config, tp)
    dtype = dtype or _own_dtype(subject)
    dtype_named(dtype)
    where = Path(output).resolve()
    with nullcontext() if launched() else tempfile.TemporaryDirectory(prefix="shardwise-") as scratch:
        work = Path(scratch) if scratch is not None else where / "work"
        settings = Settings(
            model=subject.name,
            path=subject.path or str(work),
            output=where,
            tp=tp,
            compile=compile,
            against=tuple(against),
            mode=mode,
            dtype=dtype,
            batch=batch,
            sequence=sequence or positions(subject.config, most=512),
            warmup=warmup,
            steps=steps,
            stacks=stacks,
        )
        check_peers(settings, plan)
        return _in_torchrun(settings, subject, work) if launched() else _on_own_ranks(settings, subject, work, show)


def _on_own_ranks(settings: Settings, subject: Subject, work: Path, show: bool) -> Comparison:
    subject.make(work, dtype_named(settings.dtype))
    command = [sys.executable, "-m", "shardwise.profiling", settings.to_json()]
    run_as_ranks(command, settings.tp, timeout=_SECONDS, show=show)
    result = Comparison.read(settings)
    result.save(settings.output)
    return result


def _in_torchrun(settings: Settings, subject: Subject, work: Path) -> Comparison | None:
    if int(os.environ["RANK"]) == 0:
        subject.make(work, dtype_named(settings.dtype))
    one_rank(settings)
    if dist.get_rank():
        return None
    shutil.rmtree(work, ignore_errors=True)
    result = Comparison.read(settings)
    result.save(settings.output)
    return result


def one_rank(settings: Settings, say: Say = lambda words: None) -> None:
    """One rank's part; its process group is started here. Collective."""
    check_size(settings.tp)
    mesh = tp_mesh()
    if mesh is None:
        raise MeshError("A profile is of several ranks: --tp 2 or more.")
    dist.barrier()  # the checkpoint is there
    run_rank(settings, mesh, say)
    dist.barrier()  # the traces are there


def _own_dtype(subject: Subject) -> str:
    own = subject.config.dtype if subject.path is not None else None
    return str(own).removeprefix("torch.") if own is not None else "float32"
