"""Run a function as several ranks, in tests: on threads, or on processes.

    run_threads(fn, 4, x)           milliseconds: all ranks in this process, collectives on the CPU, no backend
    with RankPool(2) as pool:       seconds to start, then milliseconds a call: real processes, gloo
        pool.run(fn, x)
    run_ranks(fn, 2, x)             the same with a pool of its own

Each gives the ranks' results in rank order. A rank that raises, hangs or dies is a `RankError` here, which names the rank and
shows where it was; of several, the one that came first.
"""

from shardwise.testing.failures import RankError, RankTimeoutError
from shardwise.testing.pool import RankPool, run_ranks
from shardwise.testing.threads import run_threads, within_threads

__all__ = ["RankError", "RankPool", "RankTimeoutError", "run_ranks", "run_threads", "within_threads"]
