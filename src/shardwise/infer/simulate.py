"""The proof of a plan: every rank a thread of this process, forward and backward beside the model as it is."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from shardwise.hf import Feed
from shardwise.infer.compare import Run, compare
from shardwise.infer.feeds import floats
from shardwise.infer.given import Given, Replay, UnlikeOneProcess
from shardwise.infer.products import tensors
from shardwise.infer.proof import Proof
from shardwise.infer.subject import Subject
from shardwise.infer.values import states
from shardwise.model_state import ModelState
from shardwise.parallelize import apply_plan
from shardwise.plan import Plan
from shardwise.spec import ShardSpec
from shardwise.testing import RankError, RankTimeoutError, run_threads

TIMEOUT = 120.0
_HEAVY = 10_000_000


@dataclass(frozen=True)
class Reference:
    """What one process computes.

    Args:
        model: what plans are tried out on.
        feeds: what it is called with, one micro-batch after the other.
        run: what came of it.
    """

    model: nn.Module
    feeds: tuple[Feed, ...]
    run: Run

    @classmethod
    def of(cls, tried: Subject) -> Reference:
        """Of a model that is not parallel."""
        model, feeds = tried.model, tuple(tried.feeds)
        run = _measure(model, feeds, lambda number: Given(dict(model.named_parameters())), Run())
        model.zero_grad()
        return cls(model, feeds, run)


def check(reference: Reference, plan: Plan) -> Proof:
    """Run `plan` on threads that are its ranks, and compare. What goes wrong is in the proof."""
    proof = _run(reference, plan)
    if sum(parameter.numel() for parameter in reference.model.parameters() if not parameter.is_meta) > _HEAVY:
        gc.collect()  # a trial's modules and tracebacks hold each other, and its shards with them
    return proof


def _run(reference: Reference, plan: Plan) -> Proof:
    runs = [Run() for _ in range(plan.size)]

    def on_rank() -> Run:
        mesh = init_device_mesh("cpu", (plan.size,), mesh_dim_names=("tp",))
        rank = mesh.get_local_rank()
        model = copy.deepcopy(reference.model, dict(shared))

        def shard(row: ShardSpec, tensor: Tensor) -> Tensor:
            return row.layout.shard(tensor.detach(), rank, plan.size)

        apply_plan(model, ModelState(plan, mesh, mesh), shard)
        parameters = dict(model.named_parameters())
        known = [run.known for run in reference.run.products if isinstance(run, Given)]
        return _measure(model, reference.feeds, lambda number: Replay(parameters, known[number], plan, rank), runs[rank])

    # No rank needs a copy of what it takes its shards from.
    shared = {id(tensor): tensor for tensor in (*reference.model.parameters(), *reference.model.buffers())}
    shared |= {id(state): state.detach() for state in states(reference.model)}
    try:
        ranks = run_threads(on_rank, plan.size, timeout=TIMEOUT)
        return compare(reference.run, plan, ranks)
    except RankTimeoutError:
        return Proof.failed(plan.size, f"not done in {TIMEOUT:.0f} seconds", late=True)
    except RankError as error:
        cause = error.__cause__ or error
        place = next(iter(runs[error.rank].running[-1:]), "")
        said = (str(cause).splitlines() or [""])[0]
        said = said if isinstance(cause, UnlikeOneProcess) else f"{type(cause).__name__}: {said}"
        return Proof.failed(plan.size, f"{said}, in {place}" if place else said, place)


def _measure(model: nn.Module, feeds: Sequence[Feed], products: Callable[[int], Given | Replay], run: Run) -> Run:
    some_without_values = any(parameter.is_meta for parameter in model.parameters())
    for number, feed in enumerate(feeds):
        seen = products(number) if some_without_values else None
        with _recorded(model, run), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = floats(model, feed, seen)
        run.outputs += [value.detach() for value in values]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(value.shape, generator=generator) for value in values]
        total = sum(((value * weight).mean() for value, weight in zip(values, weights, strict=True)), torch.zeros(()))
        if seen is not None:
            run.products.append(seen)
            total = total + seen.loss()
        if total.requires_grad:
            total.backward()
    run.gradients = {name: p.grad for name, p in model.named_parameters()}
    return run


@contextmanager
def _recorded(model: nn.Module, run: Run) -> Iterator[None]:
    """Keep the first output of each module, once, and which are at work."""

    def start(name: str) -> Callable[..., None]:
        return lambda module, args: run.running.append(name)

    def end(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            while run.running.pop() != name:
                pass
            first = next(tensors(output), None)
            if name not in run.modules and first is not None and first.is_floating_point():
                run.modules[name] = first.detach().clone()

        return hook

    handles = [module.register_forward_pre_hook(start(name)) for name, module in model.named_modules()]
    handles += [module.register_forward_hook(end(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
