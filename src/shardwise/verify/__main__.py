"""A process of a verification: `python -m shardwise.verify rank|one|exact|recorded SETTINGS`."""

from __future__ import annotations

import sys

import torch.distributed as dist

from shardwise.launch import follow_parent, saying_why
from shardwise.quiet import quiet
from shardwise.verify.one import one_process
from shardwise.verify.run import leave_result, run_rank
from shardwise.verify.settings import Settings

if __name__ == "__main__":
    follow_parent()
    job, settings = sys.argv[1], Settings.from_json(sys.argv[2])
    with saying_why(), quiet():
        if job == "rank":
            result = run_rank(settings)
            if dist.get_rank() == 0:
                leave_result(settings, result)
        else:
            one_process(settings, job)
