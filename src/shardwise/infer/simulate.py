"""The proof of a plan: every rank a thread of this process, forward and backward beside the model as it is."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from shardwise.parallelize import ModelState, apply_plan
from shardwise.plan import Plan
from shardwise.spec import ShardSpec
from shardwise.testing import RankError, RankTimeoutError, run_threads

Feed = Mapping[str, Any] | Callable[[nn.Module], object]
"""Keyword arguments of a model's forward; or what calls the model, and returns its outputs."""
OUTPUTS = 1e-4
"""Relative to the largest: float32 sums of some hundred terms differ by 1e-6, what is lost or doubled by 1e-2 at least."""
GRADIENTS = 1e-3
"""Relative to the largest of each parameter; a part that is not summed, or summed twice, is off by as much as itself."""
TIMEOUT = 120.0
_NOISE = 1e-4
_HEAVY = 10_000_000


@dataclass(frozen=True)
class Proof:
    """What a plan was found to compute, beside the model as it is.

    Args:
        size: ranks that were simulated.
        outputs: the largest error of an output, relative to the largest value.
        gradients: the largest error of a parameter's gradient, relative to that parameter's largest.
        worst: that parameter.
        problem: what is wrong, in words; None of a plan that is right.
    """

    size: int
    outputs: float
    gradients: float
    worst: str
    problem: str | None = None

    def __bool__(self) -> bool:
        return self.problem is None

    @classmethod
    def failed(cls, size: int, problem: str) -> Proof:
        """Of a plan that does not even run."""
        return cls(size, float("inf"), float("inf"), "", problem)


@dataclass(frozen=True)
class Reference:
    """What one process computes.

    Args:
        model: with random weights where the model's are on meta or constant, in evaluation mode.
        feeds: what it is called with, one micro-batch after the other.
        outputs: of each micro-batch, all floating tensors in what the model returns.
        modules: of the first micro-batch, the outputs of its modules, in the order in which they were done.
        gradients: after all of them, by parameter.
    """

    model: nn.Module
    feeds: tuple[Feed, ...]
    outputs: list[Tensor]
    modules: dict[str, Tensor]
    gradients: dict[str, Tensor | None]

    @classmethod
    def of(cls, model: nn.Module, feeds: Sequence[Feed]) -> Reference:
        """Of a model that is not parallel, and is left as it was."""
        randomised = randomise(model)
        measured = _measure(randomised, feeds)
        randomised.zero_grad()
        return cls(randomised, tuple(feeds), *measured)


def randomise(model: nn.Module) -> nn.Module:
    """A copy of `model` on the CPU, in float32 and evaluation mode, all parameters a little random: zeros hide much."""
    made = copy.deepcopy(model).cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.copy_(parameter.nan_to_num(0).clamp(-3, 3) + noise)
    return made.requires_grad_(True)


def check(reference: Reference, plan: Plan) -> Proof:
    """Run `plan` on threads that are its ranks, and compare. What goes wrong is in the proof."""
    proof = _run(reference, plan)
    if sum(parameter.numel() for parameter in reference.model.parameters()) > _HEAVY:
        gc.collect()  # a trial's modules and tracebacks hold each other, and its shards with them
    return proof


def _run(reference: Reference, plan: Plan) -> Proof:
    def on_rank() -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor | None]]:
        mesh = init_device_mesh("cpu", (plan.size,), mesh_dim_names=("tp",))
        rank = mesh.get_local_rank()
        model = copy.deepcopy(reference.model, dict(shared))

        def shard(row: ShardSpec, tensor: Tensor) -> Tensor:
            return row.layout.shard(tensor.detach(), rank, plan.size)

        apply_plan(model, ModelState(plan, mesh, mesh), shard)
        return _measure(model, reference.feeds)

    # No rank needs a copy of what it takes its shards from.
    shared = {id(tensor): tensor for tensor in (*reference.model.parameters(), *reference.model.buffers())}
    try:
        ranks = run_threads(on_rank, plan.size, timeout=TIMEOUT)
        return _compare(reference, plan, ranks)
    except RankError as error:
        cause = error.__cause__ or error
        said = (str(cause).splitlines() or [""])[0]
        return Proof.failed(plan.size, f"{type(cause).__name__}: {said}")
    except RankTimeoutError:
        return Proof.failed(plan.size, f"not done in {TIMEOUT:.0f} seconds")


def _measure(model: nn.Module, feeds: Sequence[Feed]) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor | None]]:
    seen: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    for feed in feeds:
        with _recorded(model, seen), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = floats(model, feed)
        outputs += [value.detach() for value in values]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(value.shape, generator=generator) for value in values]
        total = sum(((value * weight).mean() for value, weight in zip(values, weights, strict=True)), torch.zeros(()))
        if total.requires_grad:
            total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return outputs, seen, gradients


def floats(model: nn.Module, feed: Feed) -> list[Tensor]:
    """What `model` returns for `feed`, as far as it is numbers."""
    returned = feed(model) if callable(feed) else model(**feed)
    return [value for value in tensors(returned) if value.is_floating_point()]


def tensors(value: object) -> Iterator[Tensor]:
    """Those in what a module returned; caches, which differ from rank to rank, are no part of it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (tensor for inner in value.values() for tensor in tensors(inner))
    elif isinstance(value, list | tuple):
        yield from (tensor for inner in value for tensor in tensors(inner))


@contextmanager
def _recorded(model: nn.Module, seen: dict[str, Tensor]) -> Iterator[None]:
    """Keep the first output of each module, once."""

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            first = next(tensors(output), None)
            if name not in seen and first is not None and first.is_floating_point():
                seen[name] = first.detach().clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compare(
    reference: Reference, plan: Plan, ranks: Sequence[tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor | None]]]
) -> Proof:
    outputs, gradients, worst, problem = 0.0, 0.0, "", None
    largest = max((g.abs().max().item() for g in reference.gradients.values() if g is not None and g.numel()), default=0.0)
    for rank, (values, modules, found) in enumerate(ranks):
        if len(values) != len(reference.outputs):
            return Proof.failed(plan.size, f"rank {rank} returns {len(values)} outputs, not {len(reference.outputs)}")
        error = max((_error(a, e) for a, e in zip(values, reference.outputs, strict=True)), default=0.0)
        if not error < OUTPUTS and problem is None:
            problem = f"outputs on rank {rank} are off by {error:.1e}{_first_difference(modules, reference.modules)}"
        outputs = max(outputs, error)
        for row in plan.tensors:
            if row.buffer:
                continue
            error = _gradient_error(row, found[row.name], reference.gradients[row.name], rank, plan, largest)
            if error > gradients:
                gradients, worst = error, row.name
    if problem is None and not gradients < GRADIENTS:
        problem = f"the gradient of {worst} is off by {gradients:.1e} of its largest value"
    return Proof(plan.size, outputs, gradients, worst, problem)


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
