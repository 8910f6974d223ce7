"""Who looks on: torch shows a dispatch mode the collectives of its own groups, and those of a group in Python it does not."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack


class CollectiveWatcher(TorchDispatchMode):
    """A dispatch mode that is told of the collectives of groups in Python, too."""

    @abstractmethod
    def collective(
        self, kind: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], group: dist.ProcessGroup, run: Callable[[], Any]
    ) -> Any:
        """A collective is called; `run` carries it out, and what it gives is to be returned."""


def shown(
    kind: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], group: dist.ProcessGroup, run: Callable[[], Any]
) -> Any:
    """What `run` gives, with everyone who looks on told: whoever began last is told first."""

    def unseen() -> Any:
        with _disable_current_modes():
            return run()

    call = unseen
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, CollectiveWatcher):
            call = partial(mode.collective, kind, inputs, outputs, group, call)
    return call()
