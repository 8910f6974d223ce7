"""What a verification found: checks, each a number beside its bound, and where something differs, the culprit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from shardwise.infer import Island, Proof
from shardwise.verify.show import page, report

Phase = Literal["forward", "backward", "generate", "save"]


@dataclass(frozen=True)
class Check:
    """One number that must not exceed its bound.

    Attributes:
        name: what was compared.
        measured: the number; None where there is none, for the given reason.
        bound: the largest that is accepted; 0 where two things must be the same.
        unit: of both: "" for a relative error, or what is counted.
        reason: why this bound, or why the check does not apply.
        place: of the largest difference: a parameter, a key, a position.
        reached: the ranks came so far. What was not reached does not hold.
    """

    name: str
    measured: float | None
    bound: float
    unit: str
    reason: str
    place: str = ""
    reached: bool = True

    @property
    def passed(self) -> bool:
        """Whether it holds, or does not apply. What is not a number does not hold."""
        return self.reached and (self.measured is None or self.measured <= self.bound)


@dataclass(frozen=True)
class Hypothesis:
    """A fault that would explain what the ranks have, and what is left of the error if it is taken back.

    Attributes:
        name: the fault.
        means: what would then be so.
        remaining: the error, relative as the culprit's, that remains if the fault is taken back.
        fits: whether that is noise.
    """

    name: str
    means: str
    remaining: float
    fits: bool


@dataclass(frozen=True)
class Culprit:
    """The first place, in the order of execution, at which the ranks have something else than one process.

    Attributes:
        module: its path in the model.
        what: which tensor of it, in words ("output", "gradient of weight").
        phase: in which phase.
        style: what the plan makes of the module, with the rule and whose it is.
        error: the largest difference over the largest right value; None where nothing could be compared.
        bound: what would have been accepted.
        shape: of the tensor in one process.
        numbers: some right values and those of the ranks, as text, at the place where they differ most.
        hypotheses: what could be wrong, the fitting one first.
        note: what else is known, in sentences.
        way_on: what to do next, a line each.
    """

    module: str
    what: str
    phase: Phase
    style: str
    error: float | None
    bound: float
    shape: tuple[int, ...] = ()
    numbers: tuple[tuple[str, str], ...] = ()
    hypotheses: tuple[Hypothesis, ...] = ()
    note: str = ""
    way_on: tuple[str, ...] = ()

    @property
    def explanation(self) -> Hypothesis | None:
        """The hypothesis that fits best; None where none does."""
        fitting = [one for one in self.hypotheses if one.fits]
        return fitting[0] if fitting else None

    def __str__(self) -> str:
        fitting = self.explanation
        return f"{self.module or '(the model itself)'}: {self.what}: {fitting.name if fitting else 'no hypothesis fits'}"


@dataclass(frozen=True)
class Verification:
    """What `shardwise.verify` found. True where every check holds; prints as a report.

    Attributes:
        title: what was verified.
        facts: name and value of what it was verified with.
        checks: in the order in which they were made.
        culprit: where something differs, and could be found.
        notes: what to know about the numbers.
        seconds: that it took.
        proof: of the plan, every rank simulated in one process before ranks were started; None where that could not be done.
        blame: where something differs, whether it is the plan, in a sentence.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    checks: tuple[Check, ...]
    culprit: Culprit | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    proof: Proof | None = None
    blame: str = ""

    @property
    def passed(self) -> bool:
        """Whether every check holds, and the plan is right."""
        return all(check.passed for check in self.checks) and (self.proof is None or bool(self.proof))

    @property
    def failed(self) -> Sequence[Check]:
        """The checks that do not hold."""
        return [check for check in self.checks if not check.passed]

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return report(self)

    def to_html(self) -> str:
        """The report as a page that stands alone."""
        return page(self).to_html()

    def to_json(self) -> str:
        """Everything, for a program to read: the fields of this class, and `passed` of it and of each check."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return json.dumps({"passed": self.passed, **asdict(self), "checks": checks}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Verification:
        """What `to_json` made `text` of."""
        values = json.loads(text)
        values.pop("passed")
        return cls(
            **{
                **values,
                "facts": tuple((name, value) for name, value in values["facts"]),
                "checks": tuple(Check(**{k: v for k, v in check.items() if k != "passed"}) for check in values["checks"]),
                "culprit": _culprit(values["culprit"]),
                "notes": tuple(values["notes"]),
                "proof": _proof(values["proof"]),
            }
        )


def _proof(values: dict[str, Any] | None) -> Proof | None:
    if values is None:
        return None
    islands = tuple(Island(**{**island, "yours": tuple(island["yours"])}) for island in values["islands"])
    return Proof(**{**values, "islands": islands})


def _culprit(values: dict[str, Any] | None) -> Culprit | None:
    if values is None:
        return None
    return Culprit(
        **{
            **values,
            "shape": tuple(values["shape"]),
            "numbers": tuple((name, value) for name, value in values["numbers"]),
            "hypotheses": tuple(Hypothesis(**one) for one in values["hypotheses"]),
            "way_on": tuple(values["way_on"]),
        }
    )
