"""`shardwise demo` from its settings to its exit code."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist
import transformers
from rich.console import Console

import shardwise
from shardwise.demo.checks import LOSS_CHECK, Check, Measured, make_checks
from shardwise.demo.figure import save_figure
from shardwise.demo.measure import Watcher, measure
from shardwise.demo.settings import Settings, model_config
from shardwise.demo.show import Screen
from shardwise.demo.text import Text, read_text
from shardwise.errors import MeshError
from shardwise.hf import build_on_meta
from shardwise.launch import UNMET, check_size, launched, run_as_ranks
from shardwise.mesh import tp_mesh

# The bounds of the checks are those of float32 on CPUs; and a machine with one GPU could not hold two ranks on it.
_ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
_SECONDS, _SECONDS_A_STEP = 600.0, 5.0


def start(settings: Settings) -> int:
    """Run the demo: as one of torchrun's ranks, or on ranks of its own. Returns 0 where every check holds, else another number.

    Raises `ShardwiseError` for settings that cannot be, and `WorkerError` for a rank that failed.
    """
    if launched():
        check_size(settings.tp)
        os.environ.update(_ON_CPU)
        return run(settings)
    read_text(settings.text)
    shardwise.plan(model_config(settings.size), settings.tp)
    command = [sys.executable, "-m", "shardwise.demo", "run", settings.to_json()]
    timeout = _SECONDS + _SECONDS_A_STEP * settings.total_steps
    try:
        return 1 if run_as_ranks(command, settings.tp, timeout=timeout, environment=_ON_CPU) else 0
    finally:
        Console().show_cursor()  # rank 0 may have been ended while its progress bar was hiding it


def run(settings: Settings) -> int:
    """One rank of the demo. Returns 0, or `UNMET` on every rank where a check does not hold. Collective."""
    began, mesh = time.monotonic(), tp_mesh()
    if mesh is None:
        raise MeshError("The demo needs several ranks: start it without torchrun, and it starts its own.")
    text = read_text(settings.text)
    failed = torch.zeros((), dtype=torch.int64)
    if dist.get_rank() == 0:
        shutil.rmtree(settings.work, ignore_errors=True)
        settings.work.mkdir(parents=True)
        parameters = sum(p.numel() for p in build_on_meta(model_config(settings.size)).parameters())
        with Screen(settings) as screen:
            screen.opening(text, parameters)
            found = measure(settings, text, Watcher(screen.stage, screen.step))
            assert found is not None
            failed += conclude(settings, text, found, screen, time.monotonic() - began)
    else:
        measure(settings, text, Watcher(lambda words: None, lambda training: None))
    dist.broadcast(failed, 0)
    return UNMET if failed else 0


def conclude(settings: Settings, text: Text, found: Measured, screen: Screen, seconds: float) -> int:
    """Judge what was found, write the report and the picture, show everything; returns how many checks failed."""
    checks = make_checks(found, settings.size.loss_fall)
    bound = next(check.bound for check in checks if check.name == LOSS_CHECK)
    save_figure(found.trained, bound, settings.tp, settings.output / "loss.png")
    (settings.output / "report.json").write_text(json.dumps(report(settings, text, found, checks, seconds), indent=2))
    shutil.rmtree(settings.work)
    screen.result(found, checks, seconds)
    return sum(not check.passed for check in checks)


def report(settings: Settings, text: Text, found: Measured, checks: Sequence[Check], seconds: float) -> dict[str, object]:
    """Every number of the run, for a program to read."""
    return {
        "passed": all(check.passed for check in checks),
        "checks": [{**asdict(check), "passed": check.passed} for check in checks],
        "settings": json.loads(settings.to_json()),
        "size": asdict(settings.size),
        "text": {"name": text.name, "training_bytes": len(text.training), "held_out_bytes": len(text.held_out)},
        "measured": asdict(found),
        "tokens_per_second": {
            "one process": found.trained.whole.tokens_per_second(found.trained.tokens),
            "sharded": found.trained.sharded.tokens_per_second(found.trained.tokens),
        },
        "seconds": seconds,
        "versions": {
            "python": platform.python_version(),
            "shardwise": shardwise.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
