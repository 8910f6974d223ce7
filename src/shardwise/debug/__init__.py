"""See every collective of a model, and stop at one: `trace_collectives` and `break_on`."""

from shardwise.debug.record import Collective, CollectiveTrace, TraceDifference
from shardwise.debug.stop import Breakpoint, break_on
from shardwise.debug.watch import trace_collectives

__all__ = ["Breakpoint", "Collective", "CollectiveTrace", "TraceDifference", "break_on", "trace_collectives"]
