"""The backend "shm": collectives between processes of one host, through shared memory, for tensors on CPUs.

    import shardwise                                        # registers it
    dist.init_process_group("cpu:shm")                      # or "cpu:shm,cuda:nccl", or new_group(backend="shm")

Everything that `dist` offers works on it as on gloo, functional collectives, DDP and FSDP2 included, at a fraction of the time.
"""

from shardwise.shm.group import ShmGroup
from shardwise.shm.register import BACKEND, register, why_not

register()

__all__ = ["BACKEND", "ShmGroup", "register", "why_not"]
