"""What can go wrong, as a tree that callers can catch at the level they care about.

ShardwiseError
├── PlanError            a rule, a size or a style that cannot be applied; raised before any weight is read
├── CheckpointError      a file, key, shape or dtype that is not what the model needs
├── MismatchError        ranks that disagree: different weights, calls, or results
│   └── MissingRankError a collective call that not every rank made
├── MeshError            no process group, no such axis, more ranks asked for than there are
└── SimulationError      a step that can't be followed without memory: the model's code asks for values
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class ShardwiseError(Exception):
    """Base of everything that shardwise raises on purpose."""


class PlanError(ShardwiseError, ValueError):
    """A tensor-parallel plan that cannot be carried out. No weight has been read and no module changed."""


class CheckpointError(ShardwiseError, RuntimeError):
    """A checkpoint that does not hold what the model needs. Names the file and the key."""


class MismatchError(ShardwiseError, RuntimeError):
    """Ranks that should agree and do not."""


class MissingRankError(MismatchError, TimeoutError):
    """A collective call that some rank never made."""


class MeshError(ShardwiseError, RuntimeError):
    """Processes, devices or mesh axes that are not there."""


class SimulationError(ShardwiseError, RuntimeError):
    """A step that can't be simulated, because the model's code asks for values. Its plan can be made none the less."""


def describe(headline: str, **facts: str | Iterable[str]) -> str:
    """Lay out an error message: a headline, then one aligned line a fact.

    >>> print(describe("lm_head: no such style.", rule="lm_head: colwse", either=["fix the rule, or", "register it"]))
    lm_head: no such style.
      rule    lm_head: colwse
      either  fix the rule, or
              register it
    """
    width = max((len(name) for name in facts), default=0)
    lines = [headline]
    for name, value in facts.items():
        texts = [value] if isinstance(value, str) else list(value)
        for index, text in enumerate(texts):
            lines.append(f"  {(name if index == 0 else ''):<{width}}  {text}".rstrip())
    return "\n".join(lines)


def first_of(lines: Sequence[str], most: int) -> list[str]:
    """The first lines of a fact that may have many, and how many more there are."""
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]


def ranks_in_words(ranks: Sequence[int]) -> str:
    """How messages name ranks: "rank 1", "ranks 0, 2"."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
