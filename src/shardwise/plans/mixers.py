"""State-space mixers on local channels (Mamba, arXiv:2312.00752) or local heads (Mamba-2, arXiv:2405.21060)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from shardwise.layers import Cut
from shardwise.layout import Block, local_lengths
from shardwise.plan import wildcard
from shardwise.plans.parts import places, rule
from shardwise.spec import Rule

_CHANNELS = "a state-space mixer on local channels"
_HEADS = "a state-space mixer on local heads"


def mamba(model: nn.Module, prefix: str, path: str, size: int) -> list[Rule]:
    """Mamba mixers at `path`, on local channels; whole where these are fewer than the ranks."""
    return _at(model, prefix, path, size, "x_proj")


def mamba2(model: nn.Module, prefix: str, path: str, size: int) -> list[Rule]:
    """Mamba-2 mixers at `path`, on local heads; whole where these, and the groups that they read, don't fit the ranks."""
    return _at(model, prefix, path, size, "dt_bias")


def multi_head_mamba(model: nn.Module, prefix: str, path: str, size: int) -> list[Rule]:
    """Zamba's mixers at `path`, on local heads; whole where these are fewer than the ranks."""
    return _at(model, prefix, path, size, "x_proj_weight")


def dealt(name: str, module: nn.Module, size: int) -> list[Rule] | None:
    """The rules for `module`, called `name`, as a state-space mixer on `size` ranks: shared by them, or where they don't fit,
    computed whole. None where it is none.
    """
    if not all(isinstance(getattr(module, child, None), nn.Module) for child in ("in_proj", "conv1d", "out_proj")):
        return None
    rules = next((rules for rules, needed in _KINDS.items() if all(hasattr(module, one) for one in needed)), None)
    return None if rules is None else rules(name, module, size) or _whole(name, module, size)


def _at(model: nn.Module, prefix: str, path: str, size: int, having: str) -> list[Rule]:
    found: list[Rule] = []
    for place in places(model, path, having=having):
        first = next(module for name, module in model.named_modules() if place in (name, wildcard(name)))
        found += dealt(prefix + place, first, size) or []
    return found


def _channels(name: str, module: Any, size: int) -> list[Rule] | None:
    """Mamba: `in_proj` gives x | z, the convolution and the recurrence are channel by channel.

    `x_proj` reads all channels, and its outputs (the step sizes' low rank, B, C) are read by each: row-wise in the middle. Of
    `dt_proj` the code reads the weight.
    """
    if module.intermediate_size < size:
        return None
    channels = Block(module.intermediate_size)
    return [
        _rule(f"{name}.in_proj", "packed_colwise", _CHANNELS, blocks=(channels, channels)),
        *_convolution(name, (channels,), size, _CHANNELS),
        _rule(f"{name}.x_proj", "rowwise_inner", _CHANNELS),
        *(_rule(f"{name}.{child}", "local_rows", _CHANNELS) for child in ("dt_proj", "A_log", "D")),
        *_summed_norms(name, module),
        _rule(f"{name}.out_proj", "rowwise", _CHANNELS),
        _local(name, module, {"intermediate_size": local_lengths((channels,), size)}, _CHANNELS),
    ]


def _heads_of_channels(name: str, module: Any, size: int) -> list[Rule] | None:
    """Zamba: Mamba in heads, each with a product of its own for the step sizes, B and C. `in_proj` gives x and z channel by
    channel (x z | x z | ...).
    """
    heads, width = module.n_mamba_heads, module.mamba_head_dim
    if heads < size:
        return None
    owned = ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")
    channels = Block(heads * width, width)
    local = {"n_mamba_heads": local_lengths((Block(heads),), size), "intermediate_size": local_lengths((channels,), size)}
    return [
        _rule(f"{name}.in_proj", "colwise", _HEADS, unit=2 * width),
        *_convolution(name, (channels,), size, _HEADS),
        *(_rule(f"{name}.{child}", "local_rows", _HEADS) for child in owned),
        _rule(f"{name}.out_proj", "rowwise", _HEADS, unit=width),
        _local(name, module, local, _HEADS),
    ]


def _heads(name: str, module: Any, size: int) -> list[Rule] | None:
    """Mamba-2: `in_proj` gives z | x | B | C | dt, the convolution goes over x | B | C.

    With fewer groups than ranks, several ranks have the B and C of a group, and their gradients are summed.
    """
    parts = _Mamba2.of(module, size)
    return list(parts.rules(name, module)) if parts is not None else None


_KINDS: Mapping[Callable[[str, Any, int], list[Rule] | None], tuple[str, ...]] = MappingProxyType(
    {
        _channels: ("x_proj", "dt_proj", "A_log", "D", "intermediate_size"),
        _heads_of_channels: (
            "x_proj_weight",
            "dt_proj_weight",
            "dt_proj_bias",
            "A_log",
            "D",
            "n_mamba_heads",
            "mamba_head_dim",
        ),
        _heads: ("dt_bias", "A_log", "D", "norm", "num_heads", "n_groups", "head_dim", "ssm_state_size", "intermediate_size"),
    }
)
"""Kinds of mixers, by what their modules have."""


@dataclass(frozen=True)
class _Mamba2:
    """The blocks of a Mamba-2 mixer on `size` ranks: heads, their features, and the groups of B or of C."""

    size: int
    heads: Block
    features: Block
    groups: Block

    @classmethod
    def of(cls, module: Any, size: int) -> _Mamba2 | None:
        """None where the ranks can't be given heads with the groups that these read."""
        heads, groups, width, state = module.num_heads, module.n_groups, module.head_dim, module.ssm_state_size
        if heads < size or heads % groups or heads * width != module.intermediate_size:
            return None
        if groups >= size:
            unit = heads // groups
            return cls(size, Block(heads, unit), Block(heads * width, unit * width), Block(groups * state, state))
        if size % groups or (groups > 1 and heads % size):
            return None
        return cls(size, Block(heads), Block(heads * width, width), Block(groups * state, state, "share"))

    def rules(self, name: str, module: Any) -> Iterator[Rule]:
        """The rules for the mixer called `name`."""
        convolved = (self.features, self.groups, self.groups)
        projected = (self.features, *convolved, self.heads)
        shared = f"{_HEADS}; ranks share the B and C of a group"
        reason = shared if self.groups.copies(self.size) > 1 else _HEADS
        yield _rule(f"{name}.in_proj", "colwise", reason, blocks=projected)
        if "mup_vector" in module._buffers:  # a factor for each output of in_proj, along the last dim
            yield _rule(f"{name}.mup_vector", "rowwise", _HEADS, blocks=projected)
        yield from _convolution(name, convolved, self.size, _HEADS)
        for child in ("A_log", "D", "dt_bias"):
            yield _rule(f"{name}.{child}", "local_rows", _HEADS, unit=self.heads.unit)
        if any(True for _ in module.norm.parameters()):
            yield _rule(f"{name}.norm", "sharded_norm", _HEADS, unit=self.features.unit)
        yield _rule(f"{name}.out_proj", "rowwise", _HEADS, unit=self.features.unit)
        groups = local_lengths((self.groups,), self.size)
        yield _local(
            name,
            module,
            {
                "num_heads": local_lengths((self.heads,), self.size),
                "intermediate_size": local_lengths((self.features,), self.size),
                "n_groups": tuple(length // module.ssm_state_size for length in groups),
                "groups_time_state_size": groups,
                "conv_dim": local_lengths(convolved, self.size),
            },
            _HEADS,
        )


def _convolution(name: str, blocks: tuple[Block, ...], size: int, reason: str) -> Iterator[Rule]:
    """The depthwise convolution of a mixer."""
    lengths = local_lengths(blocks, size)
    attributes = dict.fromkeys(("in_channels", "out_channels", "groups"), lengths)
    yield replace(_rule(f"{name}.conv1d", "local_rows", reason, blocks=blocks), attributes=attributes)


def _summed_norms(name: str, module: Any) -> Iterator[Rule]:
    for child in ("dt_layernorm", "b_layernorm", "c_layernorm"):
        if any(True for _ in getattr(module, child, nn.Identity()).parameters()):
            yield rule(f"{name}.{child}", "replicated_with_grad_allreduce", "each rank's channels read what it norms")


def _local(name: str, module: Any, numbers: Mapping[str, tuple[int, ...]], reason: str) -> Rule:
    """The rule for the mixer itself, with those of the numbers that it has."""
    known = {key: values for key, values in numbers.items() if hasattr(module, key)}
    return replace(rule(name, "unfused_mixer", reason), attributes=known)


def _whole(name: str, module: nn.Module, size: int) -> list[Rule]:
    """A mixer that every rank computes whole, of which the large projections are cut and their outputs gathered."""
    reason = f"a state-space mixer, computed whole: its heads can't be dealt to {size} ranks"
    cut = ("in_proj", "out_proj")
    kept = [child for child, _ in module.named_parameters() if child.partition(".")[0] not in cut]
    return [
        *(rule(f"{name}.{child}", "colwise_gather_output", reason) for child in cut),
        *(rule(f"{name}.{child}", "replicate", reason) for child in kept),
        rule(name, "unfused_mixer", reason),  # it calls its output projection, which a fused kernel would not
    ]


def _rule(name: str, style: str, reason: str, unit: int = 1, blocks: tuple[Block, ...] = ()) -> Rule:
    return replace(rule(name, style, reason), cut=Cut(unit=unit, blocks=blocks))
