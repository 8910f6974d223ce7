"""Where a model begins and ends: large embeddings and heads, which are cut along the vocabulary."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from shardwise.infer.products import Product
from shardwise.spec import Rule

LARGE = 0.02
"""Of the model's elements: an embedding or a head that has more than this share is cut."""


def end_rules(model: nn.Module, products: Collection[Product], last: Collection[Product], size: int) -> list[list[Rule]]:
    """Rules for large embeddings, and for large linear layers among `last`, behind which nothing but the model's output comes;
    those of one tied parameter together.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    found: dict[str, list[Rule]] = {}
    for product in products:
        parameter = model.get_parameter(product.weight)
        if parameter.numel() <= LARGE * total or parameter.shape[0] < size:
            continue
        holders = [(name, module) for name, module in model.named_modules() if module._parameters.get("weight") is parameter]
        for name, module in holders:
            if product.inputs is None and product.outputs == 1 and isinstance(module, nn.Embedding):
                rule = Rule(name, "embedding_rowwise", "inferred", reason="rows are looked up one by one")
            elif product in last and product.outputs == 0 and isinstance(module, nn.Linear):
                rule = Rule(name, "colwise_gather_output", "inferred", reason="nothing but the output is behind it")
            else:
                continue
            found.setdefault(product.weight, []).append(rule)
    return list(found.values())
