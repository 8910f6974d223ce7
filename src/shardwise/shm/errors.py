"""What goes wrong between ranks: errors of the package's tree that are `dist.DistBackendError` as well.

So `except dist.DistBackendError`, which is written for nccl, and `except RuntimeError`, for gloo, catch them too.
"""

from __future__ import annotations

import torch.distributed as dist

from shardwise.errors import MismatchError, MissingRankError


class LostRankError(MissingRankError, dist.DistBackendError):
    """A rank that did not come in time, left the group, failed, or whose process ended."""


class CallMismatchError(MismatchError, dist.DistBackendError):
    """Ranks that made different calls: another collective, dtype, size, reduction or root."""


class BrokenGroupError(MismatchError, dist.DistBackendError):
    """A call on a group that has been destroyed, or that belongs to the process from which this one was forked."""
