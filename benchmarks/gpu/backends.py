"""How each backend makes one rank's model, with random weights, on the device, and without a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers import __version__ as version
from transformers.distributed import DistributedConfig

import shardwise
from benchmarks.floor import widen_head
from benchmarks.gpu.sizes import Size
from shardwise.testing.fake import fake_rank

BACKENDS = {
    "one": "one process, whole",
    "floor": "one rank's shapes, no communication",
    "shardwise": "shardwise",
    "transformers": "transformers' own tensor parallelism",
}

USES_DTENSORS = tuple(map(int, version.split(".")[:2])) >= (5, 16)
"""Whether this transformers' tensor parallelism is that of DTensors."""


@contextmanager
def one_rank(backend: str, size: Size, tp: int, dtype: torch.dtype, device: str) -> Iterator[PreTrainedModel]:
    """The model of `backend`, of rank 0 of `tp`, in train mode; the process group is there as long as the block lasts."""
    if backend == "one":
        yield whole(size, dtype, device)
    elif backend == "floor":
        yield floor(size, tp, dtype, device)
    else:
        with fake_rank(tp):
            make = parallel if backend == "shardwise" else distributed
            yield make(size, tp, dtype, device).train()


def whole(size: Size, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The ordinary model."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(size.config(), dtype=dtype).train()


def parallel(size: Size, tp: int, dtype: torch.dtype, device: str) -> nn.Module:
    """shardwise: the ordinary model, made parallel in memory."""
    mesh = init_device_mesh(device, (tp,), mesh_dim_names=("tp",))
    return shardwise.parallelize(whole(size, dtype, device), mesh)


def distributed(size: Size, tp: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """transformers' `from_pretrained` with its tensor parallelism, from a state dict in memory.

    Up to 5.15 its head, when tied, gives logits `tp` times too wide: there the head gets a weight of its own.
    """
    state = whole(size, dtype, device).state_dict()
    if USES_DTENSORS:
        state.pop("lm_head.weight")  # tied, so a checkpoint has it once
    distributed_config = DistributedConfig(tp_plan="auto", tp_size=tp)
    return LlamaForCausalLM.from_pretrained(
        None, config=size.config(), state_dict=state, dtype=dtype, distributed_config=distributed_config
    )


def floor(size: Size, tp: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """An ordinary model whose shapes are those of one rank: what is left when communication is free.

    The loss is that over the whole vocabulary, as on a rank: this rank's logits stand in for those of the others.
    """
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(size.config(tp), dtype=dtype)
    return widen_head(model, tp).train()
