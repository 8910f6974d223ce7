"""Types beside one process, one after the other on one pool of workers: a hang or a crash costs one type."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel

from parity import types
from parity.job import Measured, Outcome, Subject, compare, measure_plain, measure_sharded, quiet
from shardwise.errors import PlanError
from shardwise.testing import RankError, RankPool

TIMEOUT = 60.0


class Suite:
    """Checkpoints and figures of plain models, made once a type, in `directory`.

    Args:
        build: makes the tiny model of a type.
        subject: says how a type is loaded and called.
        plan: which plan it is loaded with.
    """

    def __init__(
        self,
        directory: Path,
        build: Callable[[str], PreTrainedModel] = types.build,
        subject: Callable[[str], Subject] = lambda name: Subject(),
        plan: str = "auto",
    ) -> None:
        self.directory, self.plan = directory, plan
        self.build, self.subject = build, subject
        self.plain = cache(self._plain)

    def outcome(self, name: str, pool: RankPool) -> Outcome | PlanError:
        """Of a type on the ranks of `pool`, or why its tiny model cannot be split over them.

        Raises what `RankPool.run` raises.
        """
        plain, saved = self.plain(name), self.directory / f"{name} on {pool.size}"
        try:
            ranks = pool.run(measure_sharded, self.directory / name, saved, self.subject(name), self.plan, timeout=TIMEOUT)
        except RankError as error:
            if isinstance(error.__cause__, PlanError):
                return error.__cause__
            raise
        return compare(ranks, plain, self.directory / name, saved)

    def _plain(self, name: str) -> Measured:
        with quiet():
            self.build(name).save_pretrained(self.directory / name)
        return measure_plain(self.directory / name, self.subject(name))
