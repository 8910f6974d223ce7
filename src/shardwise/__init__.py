"""Tensor parallelism for Hugging Face transformers in plain tensors."""

from shardwise.api import make_plan as plan
from shardwise.api import parallelize, unparallelize
from shardwise.layers import ParallelStyle
from shardwise.layers.registry import register_style
from shardwise.plan import Plan
from shardwise.state import full_gradients, full_state_dict

__all__ = ["ParallelStyle", "Plan", "full_gradients", "full_state_dict", "parallelize", "plan", "register_style", "unparallelize"]
