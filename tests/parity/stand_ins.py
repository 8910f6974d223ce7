"""What a type needs that is not there: a tower of timm's, and what a release of transformers has lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedTextConfig
from transformers.models.timm_wrapper import modeling_timm_wrapper

NOT_BUILT = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "transformers 5.23 refuses layers that all share the keys of another model",
    "gemma4_unified_assistant": "as gemma4_assistant",
}
"""Types that transformers itself can't build here without what follows."""
PATCH, WIDTH = 14, 32


class ConvolutionalTower(nn.Module):
    """Images (batch, 3, height, width) to features (batch, 32, height / 14, width / 14), by two convolutions and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.head = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward_features(self, images: Tensor) -> Tensor:
        """As timm calls what comes before the pooling."""
        features: Tensor = self.head(torch.relu(self.norm(self.stem(images))))
        return features


@contextmanager
def small_tower() -> Iterator[None]:
    """Whatever is asked of timm, which need not be installed, is a `ConvolutionalTower`."""
    with (
        patch.object(modeling_timm_wrapper, "timm", SimpleNamespace(create_model=_made), create=True),
        patch.object(modeling_timm_wrapper, "requires_backends", lambda *_: None),
    ):
        yield


def _made(architecture: str, **_: object) -> nn.Module:
    return ConvolutionalTower()


@contextmanager
def all_keys_shared() -> Iterator[None]:
    """Gemma 4's text configs allow layers that all read the keys of another model, as they do up to transformers 5.22; 5.23
    asks for a layer of each type that makes keys, and so refuses each assistant.
    """
    with _reusing(Gemma4TextConfig), _reusing(Gemma4UnifiedTextConfig):
        yield


@contextmanager
def _reusing(kind: type) -> Iterator[None]:
    modes = vars(kind)["kv_sharing_modes"]

    def read(self: Gemma4TextConfig) -> list[str | None]:
        if self.num_kv_shared_layers == self.num_hidden_layers:
            return ["reuse"] * self.num_hidden_layers
        found: list[str | None] = modes.__get__(self)
        return found

    with patch.object(kind, "kv_sharing_modes", property(read)):
        yield
