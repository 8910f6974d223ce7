"""A rank that `shardwise generate` has started: `python -m shardwise.prompt REQUEST`."""

from __future__ import annotations

import sys

from shardwise.launch import follow_parent, saying_why
from shardwise.prompt.request import Request
from shardwise.prompt.run import run
from shardwise.quiet import quiet

if __name__ == "__main__":
    follow_parent()
    with saying_why(), quiet():
        run(Request.from_json(sys.argv[1]))
