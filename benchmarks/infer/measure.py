"""One type: its tiny model, the plan that is inferred for it, and the one that it gets without."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from math import prod

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

import shardwise
from shardwise import tiny
from shardwise.errors import PlanError
from shardwise.infer import infer
from shardwise.layers import ColwiseGatherOutput, RowwiseSplitInput
from shardwise.plan import Plan


@dataclass(frozen=True)
class Found:
    """What was found of a type.

    Args:
        share: of the elements of the body (what is neither embedding nor head), those that are cut; None without a proven plan.
        seconds: that inference and proof took.
        known: the share that `tp_plan="auto"` cuts; None where there is no such plan.
        note: what stays whole, and why; or why there is no plan.
        apart: of the body, what each rank also computes for itself, nothing being gathered behind it or sliced in front of it.
        known_apart: the same of `tp_plan="auto"`.
    """

    share: float | None
    seconds: float
    known: float | None
    note: str
    apart: float | None = None
    known_apart: float | None = None

    @property
    def deficit(self) -> float:
        """How much more `tp_plan="auto"` cuts, or computes apart."""
        shares = ((self.known, self.share), (self.known_apart, self.apart))
        return max(theirs - (ours or 0.0) if theirs is not None else 0.0 for theirs, ours in shares)


def measure(name: str, size: int) -> Found:
    """Of a type on `size` ranks."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    try:
        model = tiny.build(name)
    except Exception as error:  # of any kind: transformers' configs check themselves in many ways
        return Found(None, 0.0, None, f"is not built: {_first(error)}")
    known = _known(model, size)
    started = time.perf_counter()
    try:
        found = infer(model, size)
    except Exception as error:
        return Found(None, time.perf_counter() - started, _share(model, known), _first(error))
    taken, note = time.perf_counter() - started, "; ".join(f"{name}: {why}" for name, why in found.left.items())
    apart = body_share(model, found.plan, apart=True)
    return Found(body_share(model, found.plan), taken, _share(model, known), note, apart, _share(model, known, apart=True))


def body_share(model: nn.Module, plan: Plan, apart: bool = False) -> float:
    """The share of the body's elements that are cut; `apart`: without those of layers whose outputs are gathered, or inputs
    sliced.
    """
    ends = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    ends |= {id(parameter) for parameter in head.parameters()} if head is not None else set()
    names = {name for name, parameter in model.named_parameters() if id(parameter) not in ends}
    body = [row for row in plan if not row.buffer and row.name in names]
    whole = {row.name for row in plan.modules if apart and issubclass(row.style, ColwiseGatherOutput | RowwiseSplitInput)}
    cut = [row for row in body if row.sharded and row.name.rpartition(".")[0] not in whole]
    return sum(prod(row.shape) for row in cut) / max(sum(prod(row.shape) for row in body), 1)


def _known(model: PreTrainedModel, size: int) -> Plan | None:
    try:
        return shardwise.plan(model, size)
    except PlanError:
        return None


def _share(model: nn.Module, plan: Plan | None, apart: bool = False) -> float | None:
    return None if plan is None else body_share(model, plan, apart)


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
