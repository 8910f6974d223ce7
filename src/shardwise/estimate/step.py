"""What is asked for: the step that a rank is to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from shardwise.errors import ShardwiseError, describe

OptimizerName = Literal["adamw", "sgd", "none"]
_COUNTER = 4  # AdamW counts the steps of each parameter in a float32


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What an optimizer of torch's keeps, and what it takes while it steps.

    Args:
        states: tensors of a parameter's shape and dtype that it keeps for each.
        one_by_one: such tensors that exist at once while a single parameter is updated, as torch does on CPUs.
        together: such tensors that exist for every parameter at once while all are (`foreach`), as torch does on accelerators.
    """

    states: int
    one_by_one: int
    together: int

    def state_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes that it keeps for parameters of `sizes` bytes."""
        return sum(self.states * size + (_COUNTER if self.states else 0) for size in sizes.values())

    def step_bytes(self, sizes: Mapping[str, int], device: str) -> int:
        """Bytes that it takes on top of that while it steps."""
        if device == "cpu":
            return self.one_by_one * max(sizes.values(), default=0)
        return self.together * sum(sizes.values())


OPTIMIZERS: Mapping[str, Optimizer] = MappingProxyType(
    {"adamw": Optimizer(2, 2, 1), "sgd": Optimizer(0, 0, 0), "none": Optimizer(0, 0, 0)}
)
"""By name: `torch.optim.AdamW`, `torch.optim.SGD` without momentum, and no step at all."""


@dataclass(frozen=True, slots=True)
class Step:
    """One training step, or the prefill of one batch.

    Args:
        batch: sequences that a rank computes at once; the ranks of a tp axis compute the same ones.
        sequence: tokens of each.
        training: forward, backward and optimizer; else forward alone, into a KV cache.
        optimizer: a name of `OPTIMIZERS`.
        checkpointing: activation checkpointing, layer by layer, as transformers does it.
        device: "cuda" or "cpu": whose attention kernels, and whose way of updating parameters.
    """

    batch: int = 1
    sequence: int = 2048
    training: bool = True
    optimizer: OptimizerName = "adamw"
    checkpointing: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch", "sequence"):
            if getattr(self, name) < 1:
                raise ShardwiseError(f"{name}={getattr(self, name)}: at least 1.")
        if self.device not in ("cpu", "cuda"):
            raise ShardwiseError(f'device={self.device!r}: "cpu" or "cuda".')
        if self.optimizer not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            raise ShardwiseError(describe(f"optimizer={self.optimizer!r}: none of that name is known.", known=known))

    @property
    def tokens(self) -> int:
        """Of the whole batch."""
        return self.batch * self.sequence

    def __str__(self) -> str:
        what = f"of {self.batch} x {self.sequence} tokens"
        if not self.training:
            return f"prefill {what} on {self.device}"
        extra = ", activation checkpointing" if self.checkpointing else ""
        return f"training step {what} on {self.device}, {'no optimizer' if self.optimizer == 'none' else self.optimizer}{extra}"
