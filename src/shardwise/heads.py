"""Where an attention module may be cut: between its heads, and how when it has fewer KV heads than there are ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from shardwise.layers import Cut

_KV_NAMES = frozenset({"k_proj", "v_proj", "key", "value", "key_proj", "value_proj"})
_MARKS = ("num_key_value_groups", "num_heads", "num_attention_heads", "head_dim", "head_size", "qk_head_dim")


@dataclass(frozen=True, slots=True)
class Heads:
    """The query heads and KV heads of one attention module."""

    query: int
    kv: int

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.query // self.kv

    def shared(self, size: int) -> bool:
        """Whether KV heads must be kept by several ranks each."""
        return self.kv < size

    def problem(self, size: int) -> str | None:
        """Why the heads can't be dealt to `size` ranks, in words; None where they can."""
        if not self.shared(size):
            return None
        if size % self.kv == 0 and self.query % size == 0:
            return None
        return f"{self.query} query heads and {self.kv} KV heads cannot be split over tp={size}"

    def possible(self) -> list[int]:
        """The sizes that the heads can be dealt to."""
        return [size for size in range(1, self.query + 1) if self.problem(size) is None]

    def query_cut(self, length: int, size: int) -> Cut:
        """How to cut `length` indices that run over the query heads: whole groups, so that a query stays with its KV head."""
        return Cut(unit=length // self.query * (1 if self.shared(size) else self.group))

    def kv_cut(self, length: int, size: int) -> Cut:
        """How to cut `length` indices that run over the KV heads; with fewer heads than ranks, neighbouring ranks share one."""
        return Cut(unit=length // self.kv, spread="share" if self.shared(size) else "split")

    def local_group(self, size: int) -> int:
        """Query heads for each KV head on a rank."""
        return self.query // size if self.shared(size) else self.group

    def local_kv(self, rank: int, size: int) -> int:
        """KV heads on `rank`."""
        return 1 if self.shared(size) else self.kv // size + (rank < self.kv % size)

    def local_query(self, rank: int, size: int) -> int:
        """Query heads on `rank`."""
        return self.local_group(size) * self.local_kv(rank, size)


def is_attention(module: nn.Module) -> bool:
    """Whether `module` says that it has heads."""
    return any(isinstance(getattr(module, mark, None), int) for mark in _MARKS)


def heads_of(module: nn.Module) -> Heads | None:
    """The heads of an attention module, from its projections' widths where they tell, else from its attributes and config."""
    if not is_attention(module):
        return None
    config = getattr(module, "config", None)
    query = _first_int(module, config, "num_attention_heads", "num_heads", "n_head", "n_heads")
    if query is None:
        return None
    kv = _kv_from_width(module) or _kv_of_others(module, query) or (query if _expands_latents(module) else None)
    kv = kv or _first_int(module, config, "num_key_value_heads", "num_kv_heads") or query
    return Heads(query, kv) if kv <= query and query % kv == 0 else None


def runs_over_kv(child: str) -> bool:
    """Whether the projection called `child` has the KV heads on its outputs."""
    return child in _KV_NAMES


def _kv_from_width(module: nn.Module) -> int | None:
    head_dim, key = getattr(module, "head_dim", None), getattr(module, "k_proj", None)
    width = getattr(key, "out_features", None)
    return (
        width // head_dim
        if isinstance(head_dim, int) and isinstance(width, int) and head_dim and width % head_dim == 0
        else None
    )


def _expands_latents(module: nn.Module) -> bool:
    """Whether each query head has keys and values of its own, made of a latent, whatever number of KV heads the config says."""
    return "kv_b_proj" in module._modules and "k_proj" not in module._modules


def _kv_of_others(module: nn.Module, query: int) -> int | None:
    """Of a layer that reads the keys of another one, and has no projection to them."""
    group = getattr(module, "num_key_value_groups", None)
    return query // group if reads_other_keys(module) and isinstance(group, int) and group and query % group == 0 else None


def reads_other_keys(module: nn.Module) -> bool:
    """Whether attention has queries of its own, and the keys and values of another layer, or of another model."""
    return "q_proj" in module._modules and "k_proj" not in module._modules and hasattr(module, "is_kv_shared_layer")


def _first_int(module: nn.Module, config: object, *names: str) -> int | None:
    for holder in (module, config):  # of layers that differ, the config may say another number than the module
        for name in names:
            value = _read(holder, name)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _read(holder: object, name: str) -> object:
    try:
        return getattr(holder, name, None)
    except RuntimeError:  # a config whose layers differ does not answer for all of them
        return None
