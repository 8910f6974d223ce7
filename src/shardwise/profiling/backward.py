"""Ranges for the modules' backward, which no hook sees: from the autograd nodes that run one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from shardwise.profiling.events import RankTrace, is_node, node_number
from shardwise.profiling.ranges import MODULE


def backward_ranges(trace: RankTrace) -> Iterator[tuple[float, float, str, int]]:
    """Start, end, name and thread of each run of nodes that belong to one module.

    Nodes without a number (gradients that are accumulated) belong to whatever runs.
    """
    for thread, roots in trace.roots.items():
        running: tuple[float, float, str] | None = None
        for event in (below for root in roots for below in root.below() if is_node(below)):
            number = node_number(event)
            module = trace.module_of(number) if number is not None else (running[2] if running else "")
            if running is not None and module == running[2]:
                running = (running[0], event.end, module)
                continue
            if running is not None and running[2]:
                yield running[0], running[1], f"{MODULE}{running[2]} backward", thread
            running = (event.start, event.end, module)
        if running is not None and running[2]:
            yield running[0], running[1], f"{MODULE}{running[2]} backward", thread
