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
from shardwise.plan import Plan


@dataclass(frozen=True)
class Found:
    """What was found of a type.

    Args:
        share: of the elements of the body (what is neither embedding nor head), those that are cut; None without a proven plan.
        seconds: that inference and proof took.
        known: the share that `tp_plan="auto"` cuts; None where there is no such plan.
        note: what stays whole, and why; or why there is no plan.
    """

    share: float | None
    seconds: float
    known: float | None
    note: str


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
        return Found(None, time.perf_counter() - started, known, _first(error))
    taken = time.perf_counter() - started
    return Found(body_share(model, found.plan), taken, known, "; ".join(f"{name}: {why}" for name, why in found.left.items()))


def body_share(model: nn.Module, plan: Plan) -> float:
    """The share of the body's elements that are cut."""
    ends = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    ends |= {id(parameter) for parameter in head.parameters()} if head is not None else set()
    names = {name for name, parameter in model.named_parameters() if id(parameter) not in ends}
    body = [row for row in plan if not row.buffer and row.name in names]
    return sum(prod(row.shape) for row in body if row.sharded) / max(sum(prod(row.shape) for row in body), 1)


def _known(model: PreTrainedModel, size: int) -> float | None:
    try:
        return body_share(model, shardwise.plan(model, size))
    except PlanError:
        return None


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
