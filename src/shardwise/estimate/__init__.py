"""What a step takes on each rank, before there is one: memory by kind, and every collective."""

from shardwise.estimate.compare import Comparison, compare
from shardwise.estimate.result import Estimate
from shardwise.estimate.run import estimate
from shardwise.estimate.step import Step

__all__ = ["Comparison", "Estimate", "Step", "compare", "estimate"]
