"""Whether a plan is right, for whoever has one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from torch import nn

from shardwise.errors import PlanError, describe
from shardwise.hf import Feed, layer_of
from shardwise.infer.compare import Proof
from shardwise.infer.simulate import Reference, check
from shardwise.infer.subject import subject
from shardwise.plan import Plan


def prove(plan: Plan, model: nn.Module, example_inputs: Feed | Sequence[Feed] | None = None) -> Proof:
    """Show that `plan` computes what `model` does: outputs, and the gradients of all parameters.

    Every rank is simulated in this process, with the very layers and collectives that would run, on the inputs given; weights
    are the model's with some noise, as zeros and ones hide errors. Needs room for `plan.size` + 2 copies of the model.

    Args:
        plan: for any number of ranks.
        model: the ordinary model, not changed. Of a transformers model, which may be on meta, another one is made of its
            config.
        example_inputs: keyword arguments of its forward; or several of them, which are accumulated. A transformers model that
            reads texts needs none.

    Raises `PlanError` for a plan that is wrong, with the module, the parameter and the figure.
    """
    if plan.ep_size != plan.size:
        raise PlanError(f"The plan deals experts to {plan.ep_size} ranks, which is not simulated: prove one without ep_size.")
    tried = subject(model, example_inputs, _cuts(plan))
    proof = check(Reference.of(tried), _of_the_same(plan, model, tried.model))
    if proof.problem is not None:
        raise PlanError(
            describe(
                f"The plan is wrong: {proof.problem}.",
                ranks=str(plan.size),
                either=["another plan, or", "replicate for what is named"],
            )
        )
    return replace(proof, tried=tried.words)


def _cuts(plan: Plan) -> dict[str, Hashable]:
    """What `plan` does in each layer, by its path: layers in which it differs are all tried."""
    found: dict[str, list[Hashable]] = {}
    for tensor in plan:
        layer = layer_of(tensor.name)
        found.setdefault(layer, []).append((tensor.name.removeprefix(layer), tensor.layout, tensor.partial))
    for module in plan.modules:
        layer = layer_of(module.name)
        numbers = (*module.attributes.items(), *module.options.items())
        found.setdefault(layer, []).append((module.name.removeprefix(layer), module.style, numbers, module.region))
    return {layer: tuple(rows) for layer, rows in found.items()}


def _of_the_same(plan: Plan, model: nn.Module, tried: nn.Module) -> Plan:
    """The rows of `plan`, which is for `model`, that are for what is `tried` of it."""
    layers = {layer_of(name) for name, _ in tried.named_modules()}
    if not {layer_of(name) for name, _ in model.named_modules()} > layers:
        return plan
    tensors = tuple(row for row in plan.tensors if layer_of(row.name) in layers)
    return replace(plan, tensors=tensors, modules=tuple(row for row in plan.modules if layer_of(row.name) in layers))
