"""What a plan was made of, so that it can be proven without being told again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType

from torch import nn


@dataclass(frozen=True)
class Origin:
    """What a plan was made of. Either makes the model again, or knows the one that it was made of, as long as there is any.

    Args:
        make: gives the model, on meta.
        module: the model itself.
        inputs: what it was tried out with, where that was said.
    """

    make: Callable[[], nn.Module] | None = None
    module: ReferenceType[nn.Module] | None = None
    inputs: Any = None

    def model(self) -> nn.Module | None:
        """The model; None where it is gone."""
        if self.make is not None:
            return self.make()
        return self.module() if self.module is not None else None
