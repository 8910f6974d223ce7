"""The one process, and what it leaves for the ranks: its numbers, a file for each micro-batch, and its checkpoint."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch

from shardwise.launch import run_as_ranks
from shardwise.verify.load import checkpoint, feeds, import_styles, load_whole, write_checkpoint
from shardwise.verify.measure import Found, Generated, forward, generate, save, step, why_not_generate
from shardwise.verify.record import Recorded, Recorder, read
from shardwise.verify.settings import Settings


def in_own_process(settings: Settings, job: str) -> None:
    """`one_process`, in a process that is gone afterwards, and its memory with it. Raises `WorkerError` where it fails."""
    command = [sys.executable, "-m", "shardwise.verify", job, settings.to_json()]
    run_as_ranks(command, 1, timeout=settings.timeout, show=False)


def one_process(settings: Settings, job: str) -> None:
    """Compute what one process has, and leave it in the folder.

    Args:
        settings: of the verification.
        job: "one": the numbers in the dtype that is verified, what it generates and what it saves; "exact": the numbers of the
            same weights in float32; "recorded": what every module gives in one micro-batch, in float32.
    """
    import_styles(settings)
    if job == "recorded":
        _record(settings)
        return
    if job == "one":
        write_checkpoint(settings)
    model = load_whole(checkpoint(settings), settings.torch_dtype)
    if job == "exact":
        model.float()
    given = feeds(settings, model)
    for number, feed in enumerate(given):
        torch.save(asdict(step(model, model, feed)), _file(settings, job, number))
    if job == "one":
        if not why_not_generate(model):
            torch.save(asdict(generate(model, given[0], settings.new_tokens)), Path(settings.folder) / "generated.pt")
        model.zero_grad()
        save(model, saved_by_one(settings))


def recorded_by_one(settings: Settings) -> Recorded:
    """What its modules gave."""
    return read(Path(settings.folder) / "recorded by one.pt")


def _record(settings: Settings) -> None:
    model = load_whole(checkpoint(settings), torch.float32)
    with Recorder(model, settings.entered) as recorder:
        forward(model, model, feeds(settings, model)[settings.recorded])[1].backward()
    recorder.save(Path(settings.folder) / "recorded by one.pt")


def numbers_of(settings: Settings, what: str, number: int) -> Found:
    """What it left of a micro-batch; tensors are mapped, and read when they are looked at."""
    return Found(**torch.load(_file(settings, what, number), mmap=True))


def generated_by_one(settings: Settings) -> Generated:
    """What it generated."""
    return Generated(**torch.load(Path(settings.folder) / "generated.pt"))


def saved_by_one(settings: Settings) -> Path:
    """Where it saved."""
    return Path(settings.folder) / "saved by one"


def _file(settings: Settings, what: str, number: int) -> Path:
    return Path(settings.folder) / f"{what} {number}.pt"
