"""What a training loop needs beyond the model's own forward and backward: the gradient norm, data-parallel replicas, an
optimizer's full state. `accelerator` needs accelerate, and is imported by `shardwise.trainer` alone.
"""

from shardwise.training.clip import clip_grad_norm_
from shardwise.training.optimizer import full_optimizer_state, load_full_optimizer_state
from shardwise.training.replicas import average_gradients, copy_first_replica

__all__ = [
    "average_gradients",
    "clip_grad_norm_",
    "copy_first_replica",
    "full_optimizer_state",
    "load_full_optimizer_state",
]
