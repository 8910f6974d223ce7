"""See every collective of a model, and stop at one: `trace_collectives` and `break_on`.

| | |
|---|---|
| `watch`, `record` | looking at every collective as it is called; the records of a trace |
| `operators`, `place` | which operators are collectives; in which module, forward or backward, a model is |
| `stop` | the breakpoint |
| `agree`, `standing` | ranks that part: compared before each collective; where each stands in the program |
"""

from shardwise.debug.record import Collective, CollectiveTrace, TraceDifference
from shardwise.debug.stop import Breakpoint, break_on
from shardwise.debug.watch import trace_collectives

__all__ = ["Breakpoint", "Collective", "CollectiveTrace", "TraceDifference", "break_on", "trace_collectives"]
