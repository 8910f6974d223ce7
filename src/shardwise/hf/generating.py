"""What transformers' `generate` decides by itself on each rank, and what the ranks have to decide together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from shardwise.errors import MismatchError
from shardwise.mesh import local_device
from shardwise.model_state import required_state
from shardwise.replicas import check_same

_ALIKE = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)
"""Criteria that say the same on every rank, since they look at nothing but the tokens."""
_MAY_DIFFER = ("max_time",)
"""Settings that ranks may compute from their clocks."""


class GeneratesTogether:
    """Mixed in front of a transformers model: its ranks stop after the same token, and static caches have local heads."""

    def _get_stopping_criteria(self, generation_config: Any, stopping_criteria: Any, *args: Any, **kwargs: Any) -> Any:
        mesh = required_state(self).mesh  # type: ignore[arg-type]
        own = super()._get_stopping_criteria(generation_config, stopping_criteria, *args, **kwargs)  # type: ignore[misc]
        if not getattr(generation_config, "is_assistant", False):  # of which each call would be compared
            check_same(mesh, "generate", _settings(generation_config, own))
        alike = (one if type(one) in _ALIKE else AgreedCriteria(one, mesh) for one in own)
        return StoppingCriteriaList(alike)

    def _get_static_cache_init_shape(self) -> None:
        """What a static cache is allocated with before the first forward: nothing, as the config has the heads of all ranks."""
        return


class AgreedCriteria(StoppingCriteria):  # type: ignore[misc]
    """A criterion that may say something else on each rank (a clock, a client that is gone): a sequence ends on all ranks as
    soon as one of them says so. Where it raises on one, it raises on all.
    """

    def __init__(self, own: StoppingCriteria, mesh: DeviceMesh) -> None:
        self._own, self._mesh = own, mesh

    def __getattr__(self, name: str) -> Any:
        if name == "_own":  # while it is copied
            raise AttributeError(name)
        return getattr(self._own, name)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which of the sequences end here, (batch,) bool. Collective."""
        rows, failure = len(input_ids), None
        votes = torch.zeros(rows + 1, dtype=torch.int64, device=local_device(self._mesh))
        try:
            votes[:rows] = torch.as_tensor(self._own(input_ids, scores, **kwargs), device=votes.device)
        except Exception as error:
            failure = error
            votes[rows] = self._mesh.get_local_rank() + 1
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._mesh.get_group())
        if failure is not None:
            raise failure
        if failed := int(votes[rows]):
            name = "a streamer" if isinstance(self._own, _StreamEnds) else type(self._own).__name__
            raise MismatchError(
                f"generate: {name} failed on rank {failed - 1}, and so it does here; the message there says why."
            )
        return votes[:rows].to(input_ids.device).bool()


def streamed_together(mesh: DeviceMesh, given: dict[str, Any]) -> dict[str, Any]:
    """The keywords `given` to `generate`, so that a streamer that raises on a rank (its reader is gone) ends it on all, after
    the next token: the ranks without one would wait for that rank. Collective.
    """
    streamer = given.get("streamer")
    streams = torch.tensor([streamer is not None], dtype=torch.int64, device=local_device(mesh))
    dist.all_reduce(streams, op=dist.ReduceOp.MAX, group=mesh.get_group())
    if not streams.item():
        return given
    watched = None if streamer is None else _WatchedStreamer(streamer)
    criteria = [*(given.get("stopping_criteria") or ()), _StreamEnds(watched)]
    return {**given, "streamer": watched, "stopping_criteria": StoppingCriteriaList(criteria)}


class _WatchedStreamer:
    """A streamer whose exception is kept until the ranks can hear of it."""

    def __init__(self, own: Any) -> None:
        self._own = own
        self.failure: Exception | None = None

    def put(self, tokens: Tensor) -> None:
        """Hand on, until it fails."""
        if self.failure is None:
            try:
                self._own.put(tokens)
            except Exception as error:
                self.failure = error

    def end(self) -> None:
        """The last token has come: no rank waits any more."""
        if self.failure is not None:
            raise self.failure
        self._own.end()


class _StreamEnds(StoppingCriteria):  # type: ignore[misc]
    """Ends nothing, and raises what the streamer of this rank has raised."""

    def __init__(self, streamer: _WatchedStreamer | None) -> None:
        self._streamer = streamer

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._streamer is not None and self._streamer.failure is not None:
            raise self._streamer.failure
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _settings(config: GenerationConfig, criteria: Sequence[object]) -> dict[str, object]:
    """What of a call of `generate` must be the same on every rank, for `check_same`."""
    names = sorted(name for name in vars(GenerationConfig()) if name[0] != "_" and name not in _MAY_DIFFER)
    given = {name: getattr(config, name, None) for name in names}
    named = {f"the setting {name}": value if _is_plain(value) else "" for name, value in given.items()}
    return {**named, "the list of stopping criteria": [type(one).__name__ for one in criteria]}


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
