"""What is cut beside the islands: large embeddings and heads, along the vocabulary, and large layers that are gathered."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from inspect import signature
from math import prod

from torch import nn

from shardwise.infer.products import Product
from shardwise.layers import looks_up_what_it_is_given, stores_transposed
from shardwise.plan import Plan, wildcard
from shardwise.spec import Rule

LARGE = 0.02
"""Of the model's elements: an embedding or a head that has more than this share is cut."""
AT_LEAST = 2**24
"""Elements of one that is cut, however large the model is."""


def end_rules(model: nn.Module, products: Collection[Product], last: Collection[Product], size: int) -> list[list[Rule]]:
    """Rules for large embeddings, and for large linear layers among `last`, behind which nothing but the model's output comes;
    those of one tied parameter together.
    """
    enough = min(LARGE * sum(parameter.numel() for parameter in model.parameters()), AT_LEAST)
    alike: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        alike[wildcard(name)] = alike.get(wildcard(name), 0) + parameter.numel()
    found: dict[str, list[Rule]] = {}
    for product in products:
        parameter = model.get_parameter(product.weight)
        if alike[wildcard(product.weight)] <= enough or parameter.shape[0] < size:
            continue
        holders = [(name, module) for name, module in model.named_modules() if module._parameters.get("weight") is parameter]
        for name, module in holders:
            if product.inputs is None and product.outputs == 1 and isinstance(module, nn.Embedding) and _looks_up(module):
                rule = Rule(name, "embedding_rowwise", "inferred", reason="rows are looked up one by one")
                inside = dict.fromkeys(path.rpartition(".")[0] for path, _ in module.named_parameters(prefix=name))
                found.setdefault(product.weight, []).extend(
                    Rule(child, "replicated_with_grad_allreduce", "inferred", reason="it sees the rows of the rank's own ids")
                    for child in inside
                    if child != name
                )
            elif product in last and product.outputs == 0 and isinstance(module, nn.Linear):
                rule = Rule(name, "colwise_gather_output", "inferred", reason="nothing but the output is behind it")
            else:
                continue
            found.setdefault(product.weight, []).append(rule)
    return list(found.values())


def gathered(model: nn.Module, plan: Plan, size: int, left: Mapping[str, str]) -> list[list[Rule]]:
    """Rules for large linear layers that `plan` leaves whole, those of alike layers together: each rank keeps a part of the
    weight, and computes everything else as before.

    Args:
        left: why they are whole, by name with `*` for numbers.
    """
    total = sum(prod(row.shape) for row in plan if not row.buffer)
    families: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or stores_transposed(module):
            row = plan.get(f"{name}.weight")
            if row is not None and not row.sharded and not row.aliases and min(row.shape) >= size:
                families.setdefault(wildcard(name), []).append(name)
    latent = {name for name, rule in plan.rules.items() if rule.style == "mla_kv_a_proj"}
    found = []
    for family, names in families.items():
        if sum(prod(plan[f"{name}.weight"].shape) for name in names) > LARGE * total:
            reason = f"its weight is cut, and its outputs gathered: {left.get(family, 'no part of what reads it is apart')}"
            gather = "colwise_gather_output"
            styles = {name: "mla_kv_a_proj_gather_output" if name in latent else gather for name in names}
            found.append([Rule(name, style, "inferred", reason=reason) for name, style in styles.items()])
    return found


def _looks_up(module: nn.Embedding) -> bool:
    """Whether `module` is given ids, and nothing else, and looks these up: what is given more makes its ids itself, as learned
    positions do.
    """
    return len(signature(type(module).forward).parameters) == 2 and looks_up_what_it_is_given(module)
