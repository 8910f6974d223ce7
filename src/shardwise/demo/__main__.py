"""A rank that the demo has started: `python -m shardwise.demo run|reload SETTINGS`."""

from __future__ import annotations

import sys

from shardwise.demo.measure import reload
from shardwise.demo.run import run
from shardwise.demo.settings import Settings
from shardwise.launch import follow_parent, saying_why
from shardwise.quiet import quiet

if __name__ == "__main__":
    follow_parent()
    job, settings = sys.argv[1], Settings.from_json(sys.argv[2])
    with saying_why(), quiet():
        if job == "reload":
            reload(settings)
            sys.exit(0)
        sys.exit(run(settings))
