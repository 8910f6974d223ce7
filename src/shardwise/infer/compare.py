"""What ranks computed, beside one process: the figures of a proof."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from shardwise.infer.figures import apart, size
from shardwise.infer.given import Given, Met, Replay
from shardwise.infer.proof import Proof
from shardwise.plan import Plan
from shardwise.spec import ShardSpec

OUTPUTS = 1e-4
"""Relative to the largest: float32 sums of some hundred terms differ by 1e-6, what is lost or doubled by 1e-2 at least."""
GRADIENTS = 1e-3
"""Relative to the largest of each parameter; a part that is not summed, or summed twice, is off by as much as itself."""
_NOISE = 1e-3


@dataclass
class Run:
    """What a process, or a rank, computed.

    Args:
        outputs: of each micro-batch, all floating tensors in what the model returned.
        modules: of the first micro-batch, the outputs of its modules, in the order in which they were done.
        gradients: after all of them, by parameter.
        products: of each micro-batch, those with weights that have no values.
        running: the modules that are at work, the innermost last: where one raises, it stays.
    """

    outputs: list[Tensor] = field(default_factory=list)
    modules: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    products: list[Given | Replay] = field(default_factory=list)
    running: list[str] = field(default_factory=list)


def compare(reference: Run, plan: Plan, ranks: Sequence[Run]) -> Proof:
    """The proof of `plan`, of which each of its ranks had its run."""
    outputs, problem, place = 0.0, None, ""
    for rank, run in enumerate(ranks):
        if len(run.outputs) != len(reference.outputs):
            return Proof.failed(plan.size, f"rank {rank} returns {len(run.outputs)} outputs, not {len(reference.outputs)}")
        if left := next((left for one in run.products if isinstance(one, Replay) for left in one.left()), None):
            return Proof.failed(plan.size, f"rank {rank} does not use {left} as often as one process does")
        error = max((_error(a, e) for a, e in zip(run.outputs, reference.outputs, strict=True)), default=0.0)
        inside, name = max(((one.error, one.worst) for one in run.products if isinstance(one, Replay)), default=(0.0, ""))
        if problem is None and not (error < OUTPUTS and inside < OUTPUTS):
            what = f"outputs on rank {rank} are" if not error < OUTPUTS else f"what {name} is given on rank {rank} is"
            place, before = _first_difference(run.modules, reference.modules)
            problem = f"{what} off by {error if not error < OUTPUTS else inside:.2g}{before}"
        outputs = max(outputs, error, inside)
    errors = _largest((*_parameter_errors(reference, plan, ranks), *_product_errors(reference, ranks)))
    gradients, worst = max(((error, name) for name, error in errors.items()), default=(0.0, ""))
    if problem is None and not gradients < GRADIENTS:
        # What is wrong in one part is so in all that backward reaches from it: parts in front of it.
        place = [name for name in reference.gradients if not errors.get(name, 0.0) < GRADIENTS][-1]
        problem = f"the gradient of {place} is off by {errors[place]:.2g} of its largest value"
    return Proof(plan.size, outputs, gradients, worst, problem, place=place, errors=errors)


def _largest(errors: Iterable[tuple[float, str]]) -> dict[str, float]:
    """The largest of each name."""
    found: dict[str, float] = {}
    for error, name in errors:
        found[name] = max(error, found.get(name, 0.0))
    return found


def _parameter_errors(reference: Run, plan: Plan, ranks: Sequence[Run]) -> Iterator[tuple[float, str]]:
    largest = max((size(gradient) for gradient in reference.gradients.values() if gradient is not None), default=0.0)
    for rank, run in enumerate(ranks):
        for row in plan.tensors:
            if not row.buffer:
                found, expected = run.gradients[row.name], reference.gradients[row.name]
                yield _gradient_error(row, found, expected, rank, plan, largest), row.name


def _product_errors(reference: Run, ranks: Sequence[Run]) -> Iterator[tuple[float, str]]:
    """Of the gradients that come back to products whose weights have no values."""
    for number, one in enumerate(reference.products):
        if not isinstance(one, Given):
            continue
        expected = [torch.zeros_like(known.y) if known.y.grad is None else known.y.grad for known in one.known]
        largest = max(map(size, expected), default=0.0)
        wanted = {id(known): gradient for known, gradient in zip(one.known, expected, strict=True)}
        met: dict[int, list[Met]] = {}
        for run in ranks:
            products = run.products[number]
            for own in products.met if isinstance(products, Replay) else ():
                met.setdefault(id(own.known), []).append(own)
        for key, parts in met.items():
            gradient, found = wanted[key], [part.gradient() for part in parts]
            found = [torch.stack(found).sum(0)] if parts[0].partial else found
            scale = max(size(gradient), largest * _NOISE)
            yield from ((apart(actual, gradient, scale), parts[0].known.product.weight) for actual in found)


def _gradient_error(
    row: ShardSpec, actual: Tensor | None, expected: Tensor | None, rank: int, plan: Plan, largest: float
) -> float:
    """Relative to the parameter's largest; what is no more than noise beside the `largest` of all (biases of keys, which a
    softmax takes out) is compared with that.
    """
    if expected is None:
        return inf if actual is not None and bool(actual.any()) else 0.0
    mine = row.layout.shard(expected, *plan.place(row, rank))
    if actual is None:
        return inf if bool(mine.any()) else 0.0
    return apart(actual, mine, max(size(expected), largest * _NOISE))


def _first_difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, str]:
    """The module whose output is the first to differ, and that in words."""
    for name, value in expected.items():
        if name in actual and actual[name].shape == value.shape and not _error(actual[name], value) < OUTPUTS:
            return name, f", first behind {name or 'the model itself'} ({_error(actual[name], value):.2g})"
    return "", ""


def _error(actual: Tensor, expected: Tensor) -> float:
    return apart(actual, expected, max(size(expected), 1e-6))
