"""The latent projection of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), whole or cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shardwise.collectives import copy_to_tp
from shardwise.errors import PlanError
from shardwise.layers.base import ParallelStyle
from shardwise.layers.linear import ColwiseGatherOutput
from shardwise.layers.replicated import Replicate

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class SummedRotary(ParallelStyle):
    """What the styles of the latent projection share: the gradient of its rotary outputs is summed.

    Option `rotary`: how many of the last features these are.
    """

    @classmethod
    def options(cls, module: nn.Module, parent: nn.Module) -> dict[str, int]:
        return {"rotary": _rotary(parent)}

    def forward(self, input: Tensor) -> Tensor:
        return _sum_rotary(super().forward(input), self._tp.options["rotary"], self._tp.mesh)


class MlaKvAProjParallel(SummedRotary, Replicate):
    """The latent projection, whole on every rank.  X (..., in) I -> (..., latent I | rotary R).

    The latent part goes on to `kv_b_proj`, which sums its gradient itself; the rotary part is read by this rank's heads
    alone, so its gradient is summed here.
    """

    prefix = "MlaKvA"

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        return (
            None
            if hasattr(module, "out_features")
            else f"{type(module).__name__} is not a linear layer (it has no out_features)"
        )


class MlaKvAProjGatherOutput(SummedRotary, ColwiseGatherOutput):
    """`MlaKvAProjParallel` of which every rank keeps its part of the rows, and the outputs are gathered: less memory, for one
    more all-gather in forward and one more all-reduce in backward.
    """

    prefix = "MlaKvAGather"


def _rotary(parent: nn.Module) -> int:
    for holder in (parent, getattr(parent, "config", None)):
        rotary = getattr(holder, "qk_rope_head_dim", None)
        if isinstance(rotary, int):
            return rotary
    kind = type(parent).__name__
    raise PlanError(f"mla_kv_a_proj: neither {kind} nor its config says how many features are rotary (qk_rope_head_dim).")


def _sum_rotary(output: Tensor, rotary: int, mesh: DeviceMesh) -> Tensor:
    if not (output.requires_grad and torch.is_grad_enabled()):
        return output
    latent, rotated = output.tensor_split([output.shape[-1] - rotary], dim=-1)
    return torch.cat([latent, copy_to_tp(rotated, mesh)], dim=-1)
