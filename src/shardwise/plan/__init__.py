"""The table that everything reads, and how it is shown."""

from shardwise.names import wildcard
from shardwise.plan.lines import Line, expand
from shardwise.plan.origin import Origin
from shardwise.plan.table import Plan

__all__ = ["Line", "Origin", "Plan", "expand", "wildcard"]
