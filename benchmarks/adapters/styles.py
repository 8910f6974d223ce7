"""torch's `parallelize_module` with its own styles, on the ordinary transformers Llama."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate  # noqa: TID251  # this contender is made of it
from torch.distributed.tensor.parallel import (  # noqa: TID251
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.adapters.base import Adapter

COLWISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWWISE = ("self_attn.o_proj", "mlp.down_proj")


class Styles(Adapter):
    """Colwise and rowwise; what lies between a pair of them is an ordinary tensor, of a rank's own heads."""

    def start(self, size: int, fake: bool) -> None:
        """gloo, as a script would."""
        if not fake:
            dist.init_process_group("gloo")
        super().start(size, fake)

    def build(self, folder: Path, expert_parallel: bool = False) -> PreTrainedModel:
        """The whole model, then its parallel one: there is no other way in."""
        model = AutoModelForCausalLM.from_pretrained(folder)
        if hasattr(model.config, "num_experts"):
            raise NotImplementedError("torch has no style for a stack of experts")
        styles: dict[str, ParallelStyle] = {f"model.layers.*.{name}": ColwiseParallel() for name in COLWISE}
        styles |= {f"model.layers.*.{name}": RowwiseParallel() for name in ROWWISE}
        styles["lm_head"] = ColwiseParallel(output_layouts=Replicate())
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
        parallelize_module(model, mesh, styles)
        return model

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Gather the full tensors onto rank 0, which writes them."""
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            model.save_pretrained(folder, state_dict=state)
        dist.barrier()


ADAPTER = Styles()
