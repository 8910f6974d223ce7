"""The table that everything reads, and how it is shown."""

from shardwise.plan.table import Plan, wildcard

__all__ = ["Plan", "wildcard"]
