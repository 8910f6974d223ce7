"""What a plan is tried out under, wherever it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_surroundings() -> Iterator[None]:
    """Gradients, no autocast, and the CPU as the default device, as the threads have them on which ranks are simulated."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield
