"""Types beside one process, one after the other on one pool of workers: a hang or a crash costs one type."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel

import shardwise
from parity import types
from parity.drafts import SHARING
from parity.job import Measured, Outcome, Subject, compare, measure_plain, measure_sharded, quiet, target_of
from shardwise.errors import PlanError
from shardwise.plan import Plan
from shardwise.testing import RankError, RankPool

TIMEOUT = 60.0


class Suite:
    """Checkpoints and figures of plain models, made once a type, in `directory`.

    Args:
        build: makes the tiny model of a type.
        subject: says how a type is loaded and called.
        plan: which plan it is loaded with.
        found_once: says of which types the plan is made in this process, for all ranks, since it takes long.
    """

    def __init__(
        self,
        directory: Path,
        build: Callable[[str], PreTrainedModel] = types.build,
        subject: Callable[[str], Subject] = types.subject,
        plan: str = "auto",
        found_once: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.directory, self.plan, self.found_once = directory, plan, found_once
        self.build, self.subject = build, subject
        self.plain = cache(self._plain)

    def outcome(self, name: str, pool: RankPool) -> Outcome | PlanError:
        """Of a type on the ranks of `pool`, or why its tiny model cannot be split over them.

        Raises what `RankPool.run` raises.
        """
        plain, saved = self.plain(name), self.directory / f"{name} on {pool.size}"
        try:
            plan = self._plan(name, pool.size)
            ranks = pool.run(measure_sharded, self.directory / name, saved, self.subject(name), plan, timeout=TIMEOUT)
        except PlanError as error:
            return error
        except RankError as error:
            if isinstance(error.__cause__, PlanError):
                return error.__cause__
            raise
        return compare(ranks, plain, self.directory / name, saved)

    def _plan(self, name: str, size: int) -> str | Plan:
        if not self.found_once(name):
            return self.plan
        with self.subject(name).around():
            return shardwise.plan(self.build(name), size, self.plan)

    def _plain(self, name: str) -> Measured:
        subject = self.subject(name)
        with quiet(), subject.around():
            self.build(name).save_pretrained(self.directory / name)
            if subject.target:
                types.build(subject.target, **SHARING).save_pretrained(target_of(self.directory / name))
        return measure_plain(self.directory / name, subject)
