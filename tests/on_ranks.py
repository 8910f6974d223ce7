"""What the tests of whole models do on a rank, and what they compare it with."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

import shardwise
from figures import gradients
from models import Batch, batches, build


def load(path: Path, mesh: DeviceMesh | None = None, **overrides: object) -> PreTrainedModel:
    """On a rank: the shards, in train mode."""
    auto = shardwise.AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=torch.float32, tp_plan="auto", device_mesh=mesh, **overrides).train()


def world(*names: str, shape: tuple[int, ...] = ()) -> DeviceMesh:
    """All ranks, as a mesh with these axes."""
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def plain_gradients(name: str, batch: Batch) -> dict[str, Tensor]:
    """What one process finds."""
    model = build(name)
    batch.loss(model).backward()
    return gradients(model)


def logits(model: nn.Module) -> Tensor:
    """Of the first batch, without a graph."""
    with torch.no_grad():
        return model(input_ids=batches()[0].input_ids).logits
