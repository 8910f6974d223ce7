"""What rules name: the layer or the parameter that a product is, and what is around several of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from shardwise.infer.islands import Island
from shardwise.infer.products import Product
from shardwise.layers import Cut, StackedColwise, stores_transposed
from shardwise.spec import Rule

SUMMED = "read whole by each of {} parts"


class NotPossible(Exception):
    """Why an island can't be written as rules, in words."""


def target(model: nn.Module, product: Product) -> tuple[str, bool]:
    """The linear layer or stacked product that `product` is, or its bare parameter (True)."""
    owner, _, child = product.weight.rpartition(".")
    module = model.get_submodule(owner)
    if (product.inputs, product.outputs) == (2, 1) and StackedColwise.refuses(module) is None:
        return owner, False
    linear = child == "weight" and (isinstance(module, nn.Linear) or stores_transposed(module))
    if linear and product.inputs is not None:
        expected = (0, 1) if stores_transposed(module) else (1, 0)
        if (product.inputs, product.outputs) != expected:
            raise NotPossible(f"{product.weight} is used transposed")
    return (owner, False) if linear else (product.weight, True)


def style_along(model: nn.Module, name: str, dim: int) -> str:
    """The style that cuts dim `dim` of a parameter that a rule names itself."""
    owner, _, child = name.rpartition(".")
    dims = getattr(model.get_submodule(owner), child).dim()
    if dims == 1 or dim == dims - 2:
        return "colwise"
    if dim == dims - 1:
        return "rowwise"
    if dim == 0:
        return "local_rows"
    raise NotPossible(f"{name} would be cut along dim {dim} of {dims}")


def packed(style: str, cut: Cut) -> str:
    """The style that cuts fused matrices, where there are several."""
    return f"packed_{style}" if cut.blocks and style in ("colwise", "rowwise") else style


def latent(model: nn.Module, name: str, whole: bool, product: Product) -> Rule:
    """A projection to a latent, which is expanded elsewhere, and to what all heads read (multi-head latent attention)."""
    parent = model.get_submodule(name.rpartition(".")[0])
    config = getattr(parent, "config", None)
    if whole and (hasattr(parent, "qk_rope_head_dim") or hasattr(config, "qk_rope_head_dim")):
        return Rule(name, "mla_kv_a_proj", "inferred", reason="a latent, and what all heads read")
    raise NotPossible(f"{product.weight} is read elsewhere, too")


def runner(model: nn.Module, name: str) -> str:
    """The module whose code multiplies by the parameter called `name`: its owner, or what has a list of parameters."""
    owner = name.rpartition(".")[0]
    while isinstance(model.get_submodule(owner), nn.ParameterList | nn.ParameterDict):
        owner = owner.rpartition(".")[0]
    return owner


def summed(model: nn.Module, name: str, island: Island) -> Rule:
    """For a parameter that each part reads whole: its gradient is summed."""
    owner = name.rpartition(".")[0]
    module = model.get_submodule(owner)
    alone = not module._modules and sum(1 for p in module._parameters.values() if p is not None) == 1
    reason = SUMMED.format(island.count)
    return Rule(owner if alone else name, "replicated_with_grad_allreduce", "inferred", reason=reason)


def around(modules: Sequence[str]) -> str:
    """The innermost module around several modules and parameters, by their names."""
    parents = [name.split(".")[:-1] for name in modules]
    common = [segments[0] for segments in zip(*parents, strict=False) if len(set(segments)) == 1]
    depth = next((at for at, segments in enumerate(zip(*parents, strict=False)) if len(set(segments)) > 1), len(common))
    return ".".join(parents[0][:depth])
