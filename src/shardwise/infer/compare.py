"""What ranks computed, beside one process: the figures of a proof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardwise.infer.given import Given, Met, Replay
from shardwise.plan import Plan
from shardwise.spec import ShardSpec

OUTPUTS = 1e-4
"""Relative to the largest: float32 sums of some hundred terms differ by 1e-6, what is lost or doubled by 1e-2 at least."""
GRADIENTS = 1e-3
"""Relative to the largest of each parameter; a part that is not summed, or summed twice, is off by as much as itself."""
_NOISE = 1e-3


@dataclass(frozen=True)
class Proof:
    """What a plan was found to compute, beside the model as it is.

    Args:
        size: ranks that were simulated.
        outputs: the largest error of an output, relative to the largest value.
        gradients: the largest error of a parameter's gradient, relative to that parameter's largest.
        worst: that parameter.
        problem: what is wrong, in words; None of a plan that is right.
        tried: on what it was found, in words.
    """

    size: int
    outputs: float
    gradients: float
    worst: str
    problem: str | None = None
    tried: str = ""

    def __bool__(self) -> bool:
        return self.problem is None

    @classmethod
    def failed(cls, size: int, problem: str) -> Proof:
        """Of a plan that does not even run."""
        return cls(size, float("inf"), float("inf"), "", problem)


@dataclass
class Run:
    """What a process, or a rank, computed.

    Args:
        outputs: of each micro-batch, all floating tensors in what the model returned.
        modules: of the first micro-batch, the outputs of its modules, in the order in which they were done.
        gradients: after all of them, by parameter.
        products: of each micro-batch, those with weights that have no values.
    """

    outputs: list[Tensor] = field(default_factory=list)
    modules: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    products: list[Given | Replay] = field(default_factory=list)


def compare(reference: Run, plan: Plan, ranks: Sequence[Run]) -> Proof:
    """The proof of `plan`, of which each of its ranks had its run."""
    outputs, problem = 0.0, None
    for rank, run in enumerate(ranks):
        if len(run.outputs) != len(reference.outputs):
            return Proof.failed(plan.size, f"rank {rank} returns {len(run.outputs)} outputs, not {len(reference.outputs)}")
        if left := next((left for one in run.products if isinstance(one, Replay) for left in one.left()), None):
            return Proof.failed(plan.size, f"rank {rank} does not use {left} as often as one process does")
        error = max((_error(a, e) for a, e in zip(run.outputs, reference.outputs, strict=True)), default=0.0)
        if not error < OUTPUTS and problem is None:
            problem = f"outputs on rank {rank} are off by {error:.1e}{_first_difference(run.modules, reference.modules)}"
        inside, name = max(((one.error, one.worst) for one in run.products if isinstance(one, Replay)), default=(0.0, ""))
        if not inside < OUTPUTS and problem is None:
            before = _first_difference(run.modules, reference.modules)
            problem = f"what {name} is given on rank {rank} is off by {inside:.1e}{before}"
        outputs = max(outputs, error, inside)
    gradients, worst = max((*_parameter_errors(reference, plan, ranks), *_product_errors(reference, ranks)), default=(0.0, ""))
    if problem is None and not gradients < GRADIENTS:
        problem = f"the gradient of {worst} is off by {gradients:.1e} of its largest value"
    return Proof(plan.size, outputs, gradients, worst, problem)


def _parameter_errors(reference: Run, plan: Plan, ranks: Sequence[Run]) -> Iterator[tuple[float, str]]:
    largest = max((g.abs().max().item() for g in reference.gradients.values() if g is not None and g.numel()), default=0.0)
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
        largest = max((gradient.abs().max().item() for gradient in expected if gradient.numel()), default=0.0)
        wanted = {id(known): gradient for known, gradient in zip(one.known, expected, strict=True)}
        met: dict[int, list[Met]] = {}
        for run in ranks:
            products = run.products[number]
            for own in products.met if isinstance(products, Replay) else ():
                met.setdefault(id(own.known), []).append(own)
        for key, parts in met.items():
            gradient, found = wanted[key], [part.gradient() for part in parts]
            found = [torch.stack(found).sum(0)] if parts[0].partial else found
            scale = max(gradient.abs().max().item() if gradient.numel() else 0.0, largest * _NOISE)
            for actual in found if scale else ():
                yield ((actual - gradient).abs().max() / scale).nan_to_num(float("inf")).item(), parts[0].known.product.weight


def _gradient_error(
    row: ShardSpec, actual: Tensor | None, expected: Tensor | None, rank: int, plan: Plan, largest: float
) -> float:
    """Relative to the parameter's largest; what is no more than noise beside the `largest` of all (biases of keys, which a
    softmax takes out) is compared with that.
    """
    if expected is None:
        return float("inf") if actual is not None and bool(actual.any()) else 0.0
    mine = row.layout.shard(expected, *plan.place(row, rank))
    if actual is None:
        return float("inf") if bool(mine.any()) else 0.0
    scale = max(expected.abs().max().item(), largest * _NOISE) if expected.numel() else 1.0
    return (actual - mine).abs().max().item() / scale if mine.numel() and scale else 0.0


def _first_difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    for name, value in expected.items():
        if name in actual and actual[name].shape == value.shape and not _error(actual[name], value) < OUTPUTS:
            return f", first behind {name or 'the model itself'} ({_error(actual[name], value):.1e})"
    return ""


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    expected, actual = expected.double(), actual.double()
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return float("inf")
    scale = max(expected[finite].abs().max().item(), 1e-6) if bool(finite.any()) else 1.0
    return (actual - expected)[finite].abs().max().item() / scale if bool(finite.any()) else 0.0
