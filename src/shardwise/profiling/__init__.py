"""`shardwise profile`: where the time of a step goes on each rank, what the ranks wait for, and how the peers do.

| | |
|---|---|
| `run`, `settings` | from what was asked for to the result |
| `rank`, `contenders`, `dtensor` | what each rank does; who makes its model parallel |
| `capture`, `ranges`, `backward`, `clock` | a rank's trace, with ranges for modules, on one clock for all |
| `events`, `lanes`, `intervals` | a trace, read; arithmetic on ranges and pieces of time |
| `analyse`, `calls`, `compute`, `breakdown`, `parts` | from traces to figures: what a step went to |
| `merge` | one trace of all ranks, for Perfetto |
| `result`, `tables`, `plots`, `page`, `show` | the figures as data, tables, pictures, a page, and on the screen |
| `own` | `profiler`, the same for a step of a loop of the caller's |
"""

from shardwise.profiling.own import profiler
from shardwise.profiling.result import Comparison, Profile
from shardwise.profiling.run import profile

__all__ = ["Comparison", "Profile", "profile", "profiler"]
