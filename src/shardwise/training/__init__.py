"""What a training loop needs beyond the model's own forward and backward."""

from shardwise.training.clip import clip_grad_norm_

__all__ = ["clip_grad_norm_"]
