"""How a model is called, and what it returns."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor, nn

from shardwise.hf import Feed
from shardwise.infer.given import Given
from shardwise.infer.products import Products, tensors


def floats(model: nn.Module, feed: Feed, under: Products | None = None) -> list[Tensor]:
    """What `model` returns for `feed`, in evaluation mode if that says nothing else, as far as it is numbers; where it has
    weights on meta, what comes out of products with them is made up by `under`.
    """
    if under is None and any(parameter.is_meta for parameter in model.parameters()):
        under = Given(dict(model.named_parameters()))
    with under or nullcontext():
        returned = feed(model) if callable(feed) else model.eval()(**feed)
    return [value for value in tensors(returned) if value.is_floating_point()]
