"""Plans for models that have none, inferred from what the model computes, and proven."""

from shardwise.infer.plan import Inference, infer
from shardwise.infer.prove import Proof, prove

__all__ = ["Inference", "Proof", "infer", "prove"]
