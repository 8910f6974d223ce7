"""A plan for any model, inferred from what it computes, and proven before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from shardwise.errors import PlanError, describe
from shardwise.hf import Feed, build_on_meta, origin_of, small_chunks
from shardwise.infer.blocks import islands_of
from shardwise.infer.choose import Choice, Inference
from shardwise.infer.ends import end_rules
from shardwise.infer.feeds import floats
from shardwise.infer.known import known_proposals, outside
from shardwise.infer.lift import OtherLengthsError
from shardwise.infer.named import Named
from shardwise.infer.probe import Probe
from shardwise.infer.products import Product
from shardwise.infer.proposals import Proposal, propose
from shardwise.infer.sampled import Reads
from shardwise.infer.simulate import Reference
from shardwise.infer.subject import subject
from shardwise.infer.surroundings import plain_surroundings
from shardwise.infer.targets import NotPossible
from shardwise.infer.trace import Trace
from shardwise.mesh import started_ranks
from shardwise.plan import Plan, wildcard
from shardwise.spec import Rule

_TABLE = 2**16
"""Elements of a buffer at most, of which it is asked who reads them."""


def infer_plan(
    model_or_config: nn.Module | PreTrainedConfig,
    tp_size: int | None = None,
    example_inputs: Feed | Sequence[Feed] | None = None,
) -> Plan:
    """A plan for any model, found from what it computes, and proven on simulated ranks: outputs, and the gradients of all
    parameters. See `shardwise.prove`.

    Args:
        model_or_config: an ordinary model, not changed. Of a transformers model, which may be on meta, another one is made of
            its config, with random weights; of a large one without the large weights, and with one layer of each kind. Or
            a transformers config, of which the model is built on meta, as `shardwise.plan` does.
        tp_size: ranks on the tp axis; by default as many as torchrun has started, or 2.
        example_inputs: keyword arguments of the model's forward (or a function that calls the model and returns its outputs);
            or several of them. Branches that they don't reach are not looked at. A transformers model that reads texts needs
            none.

    What can't be split, or fails the proof, stays whole: its rows say "replicate", and their rules why.
    Raises `PlanError` where nothing can be split.
    """
    return infer(model_or_config, tp_size, example_inputs).plan


@plain_surroundings()
def infer(
    model_or_config: nn.Module | PreTrainedConfig,
    tp_size: int | None = None,
    example_inputs: Feed | Sequence[Feed] | None = None,
    given: Sequence[Rule] = (),
) -> Inference:
    """As `infer_plan`, with the proof, and what became of each part. What the rules `given` name stays as they say; they are
    proven together with the rest, and what is wrong already with them alone is raised as `PlanError`.
    """
    tp_size = started_ranks(otherwise=2) if tp_size is None else tp_size
    if tp_size < 1:
        raise PlanError(f"tp_size={tp_size}: the number of ranks on the tp axis is at least 1.")
    model = build_on_meta(model_or_config) if isinstance(model_or_config, PreTrainedConfig) else model_or_config
    with small_chunks(model):
        try:
            return _infer(model, tp_size, example_inputs, given, picked=not given)
        except OtherLengthsError:
            return _infer(model, tp_size, example_inputs, given, picked=False)


def _infer(
    model: nn.Module, tp_size: int, example_inputs: Feed | Sequence[Feed] | None, given: Sequence[Rule], picked: bool
) -> Inference:
    tried = subject(model, example_inputs, picked=picked)
    reference = Reference.of(tried)
    left: dict[str, str] = {}
    proposals, ends = _proposals(model, reference.model, tried.short, tp_size, left)
    named = Named.by(given, reference.model)
    proposals = _without_conflicts([proposal for proposal in proposals if not named.touches(proposal.matrices)], left)
    ends = [tied for tied in ends if not named.touches(rule.pattern for rule in tied)]
    found = Choice(model, reference, tp_size, proposals, ends, left, named).run()
    if tp_size > 1 and not any(row.sharded for row in found.plan.tensors):
        raise PlanError(
            describe(
                f"{type(model).__name__}: nothing was found that can be split over tp={tp_size}.",
                **({"whole": [f"{name}: {why}" for name, why in left.items()]} if left else {}),
                either=["fewer ranks, or", "a plan of your own: tp_plan={...}"],
            )
        )
    plan = replace(found.plan, origin=origin_of(model, example_inputs))
    return replace(found, plan=plan, proof=replace(found.proof, tried=tried.words))


def _proposals(
    whole: nn.Module, model: nn.Module, feed: Feed, size: int, left: dict[str, str]
) -> tuple[list[Proposal], list[list[Rule]]]:
    """The islands of `model`, which has one of each kind of the `whole` one's layers, as rules; why others are none goes to
    `left`. And the rules for its vocabulary.
    """
    tables = {name: buffer for name, buffer in model.named_buffers() if _is_table(name, buffer)}
    try:
        with _with_gradients(tables):
            found, why = _seen(whole, model, feed, size, tables)
    except RuntimeError:  # it writes to one, or an operator has no derivative by it
        found, why = _seen(whole, model, feed, size, {})
    left |= {name: reason for name, reason in why.items() if name not in left}
    return found


def _is_table(name: str, buffer: Tensor) -> bool:
    """Whether parts may have slices of a buffer: a slope for each head, a factor for each channel. Not of statistics, by which
    nothing is derived.
    """
    statistic = name.rpartition(".")[2].startswith("running_")
    return buffer.is_floating_point() and not (buffer.is_meta or statistic) and 1 < buffer.numel() <= _TABLE


@contextmanager
def _with_gradients(tables: Mapping[str, Tensor]) -> Iterator[None]:
    for table in tables.values():
        table.requires_grad_(True)
    try:
        yield
    finally:
        for table in tables.values():
            table.requires_grad_(False)


def _seen(
    whole: nn.Module, model: nn.Module, feed: Feed, size: int, tables: Mapping[str, Tensor]
) -> tuple[tuple[list[Proposal], list[list[Rule]]], dict[str, str]]:
    """The same, with why others are none; of the `tables`, which have gradients, it is asked who reads them, too."""
    left: dict[str, str] = {}
    parameters = dict(model.named_parameters())
    trace = Trace(parameters)
    with torch.enable_grad():
        outputs = floats(model, feed, trace)
    probe = Probe(trace.calls, {**parameters, **tables})
    known = list(known_proposals(model, size))
    reads = {product: probe.reads(product) for product in outside(probe.consumers, known)}
    islands = list(islands_of([found for found in reads.values() if found is not None], probe.in_blocks, size))
    split = {product for island in islands for product in island.consumers}
    at_end = probe.reached(outputs)
    elsewhere = at_end | _read_by_others(probe, reads, split)
    proposals = known
    for island in (replace(one, shared=tuple(name for name in one.shared if name not in tables)) for one in islands):
        try:
            proposals.append(propose(model, island, size, elsewhere))
        except NotPossible as why:
            for product in island.products:
                for name in (product.weight, product.weight.rpartition(".")[0]):
                    left.setdefault(wildcard(name), str(why))
    inner = {product for other in probe.consumers for product in probe.reached(probe.inputs_of(other))}
    inner |= {product for proposal in proposals for product in proposal.products}
    ends = end_rules(whole, dict.fromkeys(call.product for call in trace.calls), at_end - inner, size)
    return (proposals, ends), left


def _read_by_others(probe: Probe, reads: Mapping[Product, Reads | None], split: set[Product]) -> set[Product]:
    """The products whose outputs are read by products that are in no island."""
    found: set[Product] = set()
    for product in reads.keys() - split:
        found |= probe.reached(probe.inputs_of(product))
    return found


def _without_conflicts(proposals: Sequence[Proposal], left: dict[str, str]) -> list[Proposal]:
    """Each product has one side that is cut: where two are possible, the larger island's."""
    taken: dict[str, Proposal] = {}
    chosen = []
    for proposal in sorted(proposals, key=lambda one: -one.numel):
        other = next((taken[name] for name in proposal.matrices if name in taken), None)
        if other is None:
            taken |= dict.fromkeys(proposal.matrices, proposal)
            chosen.append(proposal)
        else:
            for name in proposal.matrices:
                left.setdefault(wildcard(name), f"products of {proposal.family[0]} are cut as part of {other.place}")
    return chosen
