"""A rank that `shardwise trace` has started: `python -m shardwise.tracing SETTINGS`."""

from __future__ import annotations

import sys

from shardwise.launch import follow_parent, saying_why
from shardwise.quiet import quiet
from shardwise.tracing.run import run
from shardwise.tracing.settings import Settings

if __name__ == "__main__":
    follow_parent()
    with saying_why(), quiet():
        sys.exit(run(Settings.from_json(sys.argv[1])))
