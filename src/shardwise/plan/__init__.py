"""The table that everything reads, and how it is shown."""

from shardwise.plan.lines import Line, expand
from shardwise.plan.origin import Origin
from shardwise.plan.table import Plan
from shardwise.spec import wildcard

__all__ = ["Line", "Origin", "Plan", "expand", "wildcard"]
