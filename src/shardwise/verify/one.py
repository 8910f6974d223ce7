"""The one process, and what it leaves for the ranks: its numbers, a file for each micro-batch, and its checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from shardwise.verify.load import checkpoint, feeds, import_styles, load_whole, write_checkpoint
from shardwise.verify.measure import Found, Generated, forward, generate, save, step, why_not_generate
from shardwise.verify.record import Recorder
from shardwise.verify.settings import Settings


def one_process(settings: Settings, what: str) -> None:
    """Compute the numbers of one process, and leave them in the folder.

    Args:
        settings: of the verification.
        what: "one": in the dtype that is verified, and what it generates and saves; "exact": of the same weights in float32.
    """
    import_styles(settings)
    if what == "one":
        write_checkpoint(settings)
    model = load_whole(settings, checkpoint(settings), settings.torch_dtype)
    if what == "exact":
        model.float()
    given = feeds(settings, model)
    for number, feed in enumerate(given):
        torch.save(asdict(step(model, model, feed)), _file(settings, what, number))
    if what == "one":
        if not why_not_generate(model):
            torch.save(asdict(generate(model, given[0], settings.new_tokens)), Path(settings.folder) / "generated.pt")
        model.zero_grad()
        save(model, saved_by_one(settings))


def record_one(settings: Settings) -> None:
    """Leave what every module gives in the micro-batch that the settings name, forward and backward, in float32."""
    import_styles(settings)
    model = load_whole(settings, checkpoint(settings), torch.float32)
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
