"""`shardwise profile`: where the time of a step goes on each rank, what the ranks wait for, and how the peers do."""

from shardwise.profiling.own import profiler
from shardwise.profiling.result import Comparison, Profile
from shardwise.profiling.run import profile

__all__ = ["Comparison", "Profile", "profile", "profiler"]
