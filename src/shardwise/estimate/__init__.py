"""What a step takes on each rank, before there is one: memory by kind, and every collective.

| | |
|---|---|
| `run`, `step`, `compare` | `estimate`, what it is asked for, and several sizes side by side |
| `simulate`, `fakes`, `attention` | one rank's step on fake tensors, and what these can't do or say by themselves |
| `live`, `storages` | which storages live, and how many bytes they take at most |
| `flow`, `kinds` | what depends on what in a layer; layers that do the same |
| `result`, `show`, `picture/` | the figures, how they are shown, and the picture of a layer |
"""

from shardwise.estimate.compare import Comparison, compare
from shardwise.estimate.result import Estimate
from shardwise.estimate.run import estimate
from shardwise.estimate.step import Step

__all__ = ["Comparison", "Estimate", "Step", "compare", "estimate"]
