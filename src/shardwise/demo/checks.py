"""What has to hold at the end: each check is a number, the bound that it must not exceed, and the reason for that bound."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from shardwise.demo.compare import series_difference


@dataclass(frozen=True)
class Curve:
    """What a training gave: loss (nats per byte), gradient norm and seconds at each step, and the final held-out loss."""

    losses: list[float]
    norms: list[float]
    seconds: list[float]
    held_out: float

    def tokens_per_second(self, tokens: int) -> float:
        """Speed in the median step, of `tokens` tokens; the first steps, in which memory is still being found, do not count."""
        return tokens / statistics.median(self.seconds[len(self.seconds) // 10 :])


@dataclass(frozen=True)
class Loaded:
    """The shards as they were read.

    Args:
        unlike: tensors of the checkpoint that the shards do not give back bit for bit.
        whole_bytes: of the parameters in one process.
        rank_bytes, planned_bytes: of the parameters on each rank, as they are and as the plan said.
    """

    unlike: int
    whole_bytes: int
    rank_bytes: list[int]
    planned_bytes: list[int]


@dataclass(frozen=True)
class Trained:
    """The training in one process (`whole`) and on all ranks (`sharded`).

    Args:
        gradients: of the first step, by `gradient_difference`.
        drift: of the parameters at the end, by `drift`.
        replicas: parameters kept whole by every rank that are not the same on all at the end.
        tokens: in a step.
    """

    whole: Curve
    sharded: Curve
    gradients: float
    drift: float
    replicas: int
    tokens: int


@dataclass(frozen=True)
class Generated:
    """A greedy continuation of `prompt`: rank 0's bytes, and in how many places some rank has another one."""

    prompt: str
    tokens: list[int]
    unlike: int

    @property
    def text(self) -> str:
        """The continuation to read."""
        return bytes(self.tokens).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Saved:
    """The checkpoint of the trained model, opened again.

    Args:
        unlike: tensors in it that are not the trained ones bit for bit.
        plain_logits, plain_tokens: in plain transformers: the largest difference, and the generated tokens that differ.
        tp: the other number of ranks that opened it.
        logits: theirs: the largest difference.
        files: that they, when they save it again, write otherwise.
    """

    unlike: int
    plain_logits: float
    plain_tokens: int
    tp: int
    logits: float
    files: int


@dataclass(frozen=True)
class Measured:
    """Everything that a run of the demo found out."""

    loaded: Loaded
    trained: Trained
    generated: Generated
    saved: Saved


LOSS_CHECK = "loss, largest difference at any step"
"""The name of the check that the plots show."""


@dataclass(frozen=True)
class Check:
    """One number that must not exceed its bound.

    Args:
        group: the heading that it is shown under.
        name: what was measured.
        measured: the number.
        bound: the largest that is accepted; 0 where two things must be the same.
        reason: why this bound.
    """

    group: str
    name: str
    measured: float
    bound: float
    reason: str

    @property
    def passed(self) -> bool:
        """Whether it holds. What is not a number does not."""
        return self.measured <= self.bound


def make_checks(found: Measured, loss_fall: float) -> list[Check]:
    """The checks on `found`; `loss_fall` is how far, in nats per byte, training must have lowered the loss."""
    return [*_training(found.trained, loss_fall), *_ranks(found), *_saving(found.saved)]


_NOISE = "the same arithmetic in another order: float32 noise"
# Such noise, put into one of two runs in one process, gives 2e-5 in loss and 8e-5 in the parameters;
# clipping by each rank's own norm gives 5e-3 and 3e-2 after 20 steps of the small size.
_GROWN = "float32 noise, amplified by every step of training since"


def _training(found: Trained, loss_fall: float) -> list[Check]:
    group = "trained on all ranks, against one process"
    whole, sharded = found.whole, found.sharded
    norm = series_difference(sharded.norms[:1], whole.norms[:1], relative=True)
    loss = series_difference(sharded.losses, whole.losses)
    last, target = statistics.fmean(sharded.losses[-10:]), sharded.losses[0] - loss_fall
    return [
        Check(group, "gradients of the first step, worst parameter, relative", found.gradients, 1e-3, _NOISE),
        Check(group, "gradient norm of the first step, relative", norm, 1e-5, _NOISE),
        Check(group, LOSS_CHECK, loss, 1e-3, _GROWN),
        Check(group, "parameters at the end, over the way they moved", found.drift, 1e-2, _GROWN),
        Check(group, "held-out loss, difference", abs(sharded.held_out - whole.held_out), 1e-3, _GROWN),
        Check(group, "loss at the end, mean of 10 steps", last, target, f"at least {loss_fall:g} nats below the first step's"),
    ]


def _ranks(found: Measured) -> list[Check]:
    group, loaded = "the ranks", found.loaded
    beyond = max(abs(a - b) for a, b in zip(loaded.rank_bytes, loaded.planned_bytes, strict=True))
    return [
        Check(group, "loaded tensors unlike the checkpoint's", loaded.unlike, 0, "shards are slices, bit for bit"),
        Check(group, "bytes held on a rank, off the plan's", beyond, 0, "the plan says what is held"),
        Check(
            group, "replicated parameters unlike rank 0's, at the end", found.trained.replicas, 0, "all make the same updates"
        ),
        Check(group, "generated tokens unlike rank 0's", found.generated.unlike, 0, "all see the same logits"),
    ]


def _saving(found: Saved) -> list[Check]:
    group, ranks = "the saved checkpoint", f"{found.tp} ranks"
    return [
        Check(group, "saved tensors unlike the trained ones", found.unlike, 0, "the slices put together, bit for bit"),
        Check(group, "logits in plain transformers, largest difference", found.plain_logits, 1e-4, _NOISE),
        Check(group, "tokens unlike those of plain transformers", found.plain_tokens, 0, "noise does not change the likeliest"),
        Check(group, f"logits on {ranks}, largest difference", found.logits, 1e-4, _NOISE),
        Check(group, f"files that {ranks} save otherwise", found.files, 0, "how many ranks save does not show"),
    ]
