"""Plans for models that have none, inferred from what the model computes, and proven."""

from shardwise.infer.plan import Inference, infer, infer_plan
from shardwise.infer.prove import Proof, prove

__all__ = ["Inference", "Proof", "infer", "infer_plan", "prove"]
