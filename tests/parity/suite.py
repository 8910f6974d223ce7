"""Types beside one process, one after the other on one pool of workers: a hang or a crash costs one type."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from parity.job import Measured, Outcome, compare, measure_plain, measure_sharded, quiet
from parity.types import build
from shardwise.errors import PlanError
from shardwise.testing import RankError, RankPool

TIMEOUT = 60.0


class Suite:
    """Checkpoints and figures of plain models, made once a type, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.plain = cache(self._plain)

    def outcome(self, name: str, pool: RankPool) -> Outcome | PlanError:
        """Of a type on the ranks of `pool`, or why its tiny model cannot be split over them.

        Raises what `RankPool.run` raises.
        """
        plain, saved = self.plain(name), self.directory / f"{name} on {pool.size}"
        try:
            ranks = pool.run(measure_sharded, self.directory / name, saved, timeout=TIMEOUT)
        except RankError as error:
            if isinstance(error.__cause__, PlanError):
                return error.__cause__
            raise
        return compare(ranks, plain, self.directory / name, saved)

    def _plain(self, name: str) -> Measured:
        with quiet():
            build(name).save_pretrained(self.directory / name)
        return measure_plain(self.directory / name)
