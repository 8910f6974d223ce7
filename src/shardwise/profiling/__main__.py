"""A rank that `shardwise profile` has started: `python -m shardwise.profiling SETTINGS`."""

from __future__ import annotations

import sys

import torch.distributed as dist
from rich.console import Console

from shardwise.launch import follow_parent, saying_why
from shardwise.profiling.run import one_rank
from shardwise.profiling.settings import Settings
from shardwise.quiet import quiet

if __name__ == "__main__":
    follow_parent()
    console = Console(highlight=False)
    with saying_why(), quiet():
        one_rank(
            Settings.from_json(sys.argv[1]),
            lambda words: console.print(f"[dim]{words}[/]") if dist.get_rank() == 0 else None,
        )
