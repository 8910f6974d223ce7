"""Tensor parallelism for Hugging Face transformers in plain tensors.

    from shardwise import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("my-model", tp_plan="auto")          # under torchrun

Every parameter on a rank is an ordinary `torch.Tensor` that holds this rank's shard, and every collective is one visible,
differentiable call. Each of transformers' Auto classes has its twin here.
"""

from typing import TYPE_CHECKING, Any

from shardwise.api import parallelize, unparallelize
from shardwise.auto import auto_class
from shardwise.debug import CollectiveTrace, break_on, trace_collectives
from shardwise.errors import (
    CheckpointError,
    MeshError,
    MismatchError,
    MissingRankError,
    PlanError,
    ShardwiseError,
    SimulationError,
)
from shardwise.estimate import Estimate, estimate
from shardwise.gathering import full_gradients, full_state_dict
from shardwise.infer import infer_plan, prove
from shardwise.layers import ParallelStyle
from shardwise.layers.registry import register_style
from shardwise.plan import Plan
from shardwise.plan_file import load_plan
from shardwise.planning import make_plan as plan
from shardwise.profiling import profile, profiler
from shardwise.training import clip_grad_norm_
from shardwise.verify import verify

if TYPE_CHECKING:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    from shardwise.trainer import Trainer, TrainerMixin

__version__ = "0.1.0"

__all__ = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "CheckpointError",
    "CollectiveTrace",
    "Estimate",
    "MeshError",
    "MismatchError",
    "MissingRankError",
    "ParallelStyle",
    "Plan",
    "PlanError",
    "ShardwiseError",
    "SimulationError",
    "Trainer",
    "TrainerMixin",
    "break_on",
    "clip_grad_norm_",
    "estimate",
    "full_gradients",
    "full_state_dict",
    "infer_plan",
    "load_plan",
    "parallelize",
    "plan",
    "profile",
    "profiler",
    "prove",
    "register_style",
    "trace_collectives",
    "unparallelize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("Trainer", "TrainerMixin"):  # imported when asked for: it needs accelerate, and takes a while
        from shardwise import trainer

        return getattr(trainer, name)
    found = auto_class(name)
    if found is None:
        raise AttributeError(f"module 'shardwise' has no attribute {name!r}")
    return found
