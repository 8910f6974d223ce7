"""The values of a model that plans are tried out on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from shardwise.errors import PlanError, describe
from shardwise.hf import LARGE_MODEL, LARGE_WEIGHT, elements
from shardwise.infer.products import ValuesNeeded
from shardwise.plan import wildcard

MOST = 200_000_000
"""Elements of large weights that may be given values: as many again for the ranks, and as many for gradients."""
_T = TypeVar("_T")
_Model = TypeVar("_Model", bound=nn.Module)


def randomise(model: _Model) -> _Model:
    """A copy of `model` on the CPU, in float32 and evaluation mode, all parameters a little random: zeros hide much. The large
    weights of a large model are on meta, and have no gradient.
    """
    large = elements(model) > LARGE_MODEL
    without = [p for p in model.parameters() if large and p.is_floating_point() and p.dim() > 1 and p.numel() >= LARGE_WEIGHT]
    memo: dict[int, Tensor] = {id(state): state.detach() for state in states(model)}
    memo |= {id(p): nn.Parameter(torch.empty(p.shape, device="meta"), requires_grad=False) for p in without}
    made: _Model = copy.deepcopy(model, dict(memo))._apply(_converted).eval()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            with torch.no_grad():
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.copy_(parameter.nan_to_num(0).clamp(-3, 3) + noise)
        parameter.requires_grad_(parameter.is_floating_point() and not parameter.is_meta)
    return made


def states(model: nn.Module) -> Iterator[Tensor]:
    """What modules keep of the pass before as their attributes, with its gradient, which can't be copied: recurrent states, and
    weights that a hook makes anew.
    """
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf)


def _converted(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return tensor.cpu().float() if tensor.is_floating_point() else tensor.cpu()


def with_values(model: nn.Module, action: Callable[[], _T]) -> _T:
    """What `action`, which runs `model`, gives, after those weights on meta that it uses otherwise than in products have got
    values, in place.

    Raises `PlanError` where that would be too much.
    """
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return action()
        except ValuesNeeded as needed:
            alike = [name for name, p in model.named_parameters() if p.is_meta and wildcard(name) == wildcard(needed.name)]
            _check_room(model, alike, needed)
            for number, name in enumerate(alike):
                _give(model, name, number)


def _check_room(model: nn.Module, names: list[str], needed: ValuesNeeded) -> None:
    asked = sum(model.get_parameter(name).numel() for name in names)
    given = sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)
    if asked + given > MOST:
        raise PlanError(
            describe(
                f"{type(model).__name__}: {needed}, so that a trial would need its values: {asked / 1e6:.0f} million.",
                most=f"{MOST / 1e6:.0f} million elements",
                either=[
                    "a plan of your own: tp_plan={...}, or",
                    "infer the plan of a smaller config, and write down its rules",
                ],
            )
        )


def _give(model: nn.Module, name: str, seed: int) -> None:
    owner, _, child = name.rpartition(".")
    old = model.get_parameter(name)
    values = torch.randn(old.shape, generator=torch.Generator().manual_seed(seed)) * old.shape[-1] ** -0.5
    made = nn.Parameter(values)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[key] = made
    assert model.get_submodule(owner)._parameters[child] is made
