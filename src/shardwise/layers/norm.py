"""Norms, and other modules, whose features are split over the ranks, and whose statistics are those of all features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from shardwise.collectives import Sizes, copy_to_tp, even_sizes, reduce_from_tp
from shardwise.errors import PlanError, ShardwiseError, describe
from shardwise.layers.base import Cut, Local, ParallelStyle, original_class
from shardwise.layers.replicated import LocalParamsParallel
from shardwise.layout import Layout, Shape

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ShardedNorm(ParallelStyle):
    """An RMSNorm or LayerNorm of features that are split.  X (..., n/tp) S(-1) -> Y (..., n/tp) S(-1).

    The module's own forward runs on local features and a local weight; each mean over its features (of the squares, of the
    values) goes over those of all ranks: each rank's part P, summed I, and read by the rank's own features R. That is one
    all-reduce of a number a token in forward and one in backward, for a LayerNorm two. A norm in groups (`group_size`,
    `n_groups`) sums over the ranks that share a group, and not at all where groups lie on one rank.

    A rule for a norm behind a projection that is cut by heads needs the projection's cut: `Rule(..., cut=Cut(unit=head_dim))`.
    """

    prefix = "Sharded"

    @classmethod
    def layout(cls, shape: Shape, cut: Cut) -> Layout:
        return cut.along(0)

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1:
            return None
        return f"{type(module).__name__} is not a norm with a weight for each feature"

    @classmethod
    def options(cls, module: nn.Module, parent: nn.Module) -> dict[str, int]:
        return {"groups": _groups(module)}

    @classmethod
    def local_attributes(cls, module: nn.Module, local: Local) -> dict[str, int | None]:
        layout, (width,) = local.layouts["weight"]
        sizes, group = layout.lengths((width,), local.size), width // _groups(module)
        starts = [layout.pieces((width,), rank, local.size)[0].full.start for rank in range(local.size)]
        within = all(start // group == (start + size - 1) // group for start, size in zip(starts, sizes, strict=True))
        if not within and not _whole(sizes, group):
            found = f"groups of {group} features, and the ranks' features start at {', '.join(map(str, starts))}"
            raise PlanError(describe(f"{type(module).__name__}: {found}.", either=["a smaller tp_size, or", "replicate"]))
        length = sizes[local.rank]
        if hasattr(module, "group_size"):
            return {"group_size": min(group, length)}
        return {"n_groups": max(1, length // group)} if hasattr(module, "n_groups") else {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        group = self._group()
        if group is None:
            return super().forward(*args, **kwargs)
        with group:
            output = super().forward(*args, **kwargs)
        if not group.taken:
            kind = original_class(self).__name__
            raise ShardwiseError(
                describe(
                    f"{kind}: its forward takes no mean over its features, so its statistics can't be summed over the ranks.",
                    either=["colwise_gather_output in front of it and rowwise_split_input behind it, or", "replicate for all"],
                )
            )
        return output

    def _group(self) -> _MeansOverRanks | None:
        """The statistics that this rank has a part of; None where its groups of features are its own."""
        state = self._tp
        sizes, groups, rank = state.sizes["weight"], state.options["groups"], state.mesh.get_local_rank()
        if groups == 1:
            return _MeansOverRanks(state.mesh, sizes[rank], sum(sizes), 0, 1)
        layout, (width,) = state.layouts["weight"]
        group = width // groups
        if _whole(sizes, group):
            return None
        slots = [layout.pieces((width,), other, len(sizes))[0].full.start // group for other in range(len(sizes))]
        count = sum(size for size, slot in zip(sizes, slots, strict=True) if slot == slots[rank])
        return _MeansOverRanks(state.mesh, sizes[rank], count, slots[rank], groups)


class ShardedStatistics(LocalParamsParallel):
    """An MLP whose forward takes means and deviations over its width, which is split (Gemma 3n's activation sparsity): they go
    over the features of all ranks. Two all-reduces of a number a token in forward, and two in backward.
    """

    prefix = "ShardedStatistics"

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        says = isinstance(getattr(module, "intermediate_size", None), int)
        return None if says else f"{type(module).__name__} does not say how wide it is (intermediate_size)"

    @classmethod
    def options(cls, module: nn.Module, parent: nn.Module) -> dict[str, int]:
        return {"width": int(module.intermediate_size)}  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mesh, width = self._tp.mesh, self._tp.options["width"]
        local = even_sizes(width, mesh.size())[mesh.get_local_rank()]
        with _MeansOverRanks(mesh, local, width, 0, 1):
            return super().forward(*args, **kwargs)


def _whole(sizes: Sizes, group: int) -> bool:
    """Whether the ranks have whole groups."""
    return all(size % group == 0 for size in sizes)


def _groups(module: nn.Module) -> int:
    """In how many groups `module` norms its features."""
    weight, size = module._parameters["weight"], getattr(module, "group_size", None)
    assert weight is not None
    return len(weight) // size if isinstance(size, int) else int(getattr(module, "n_groups", 1))


class _MeansOverRanks(TorchFunctionMode):
    """While it is on, a mean or deviation over the last dim of `width` local features is that over all ranks' `count` features.

    With several `groups`, each rank has features of one, its `slot`: the ranks' parts are summed side by side.
    """

    def __init__(self, mesh: DeviceMesh, width: int, count: int, slot: int, groups: int) -> None:
        super().__init__()
        self.mesh, self.width, self.count, self.slot, self.groups = mesh, width, count, slot, groups
        self.taken = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OTHER_STATISTICS and args[0].shape[-1:] == (self.width,):
            raise ShardwiseError(
                f"sharded_norm: {func.__name__} over features that are split is not known to it, only means and deviations are."
            )
        if func in _MEANS:
            return self._mean(func, *args, **kwargs)
        if func in _DEVIATIONS:
            return self._deviation(func, *args, **kwargs)
        if func in _RMS_NORMS:
            return self._rms_norm(*args, **kwargs)
        if func in _LAYER_NORMS:
            return self._layer_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _mean(self, func: Callable[..., Any], x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
        last = (dim,) if isinstance(dim, int) else tuple(dim or ())
        if x.shape[-1] != self.width or last not in ((-1,), (x.dim() - 1,)):
            return func(x, dim, keepdim, **kwargs)  # type: ignore[no-any-return]
        mean = self._over_ranks(x.sum(-1, keepdim=True, **kwargs) / self.count)
        return mean if keepdim else mean.squeeze(-1)

    def _deviation(
        self, func: Callable[..., Any], x: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **kwargs: Any
    ) -> Tensor:
        last = (dim,) if type(dim) is int else tuple(dim or ()) if not isinstance(dim, bool) else ()
        if x.shape[-1] != self.width or last not in ((-1,), (x.dim() - 1,)):
            return func(x, dim, keepdim=keepdim, **{"correction": int(unbiased), **kwargs})  # type: ignore[no-any-return]
        fewer = kwargs.get("correction", int(unbiased))
        variance = self._over_ranks((x - self._all(x)).pow(2).sum(-1, keepdim=True) / (self.count - fewer))
        spread = variance > 0  # where there is none, its root has no gradient
        found = variance.where(spread, 1).sqrt().where(spread, 0) if func in _ROOTS else variance
        return found if keepdim else found.squeeze(-1)

    def _over_ranks(self, part: Tensor) -> Tensor:
        """P -> R: the sum of the ranks' parts (..., 1), of those that share this rank's group."""
        self.taken = True
        if self.groups > 1:
            part = pad(part, (self.slot, self.groups - 1 - self.slot))
        total = copy_to_tp(reduce_from_tp(part, self.mesh), self.mesh)
        return total[..., self.slot : self.slot + 1] if self.groups > 1 else total

    def _all(self, x: Tensor) -> Tensor:
        return self._over_ranks(x.sum(-1, keepdim=True) / self.count)

    def _rms_norm(self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        wide = _wide(x)
        eps = torch.finfo(wide.dtype).eps if eps is None else eps
        normed = wide * torch.rsqrt(self._all(wide.pow(2)) + eps)
        return (normed if weight is None else normed * weight).to(x.dtype)

    def _layer_norm(
        self, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
    ) -> Tensor:
        wide = _wide(x)
        centred = wide - self._all(wide)
        normed = centred * torch.rsqrt(self._all(centred.pow(2)) + eps)
        normed = normed if weight is None else normed * weight
        return (normed if bias is None else normed + bias).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    # Torch's own norms compute in float32 what is given in less.
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


_MEANS = frozenset({torch.mean, torch.Tensor.mean})
_ROOTS = frozenset({torch.std, torch.Tensor.std})
_DEVIATIONS = _ROOTS | {torch.var, torch.Tensor.var}
_RMS_NORMS = frozenset({functional.rms_norm, torch.rms_norm})
_LAYER_NORMS = frozenset({functional.layer_norm, torch.layer_norm})
_OTHER_STATISTICS = frozenset(
    {
        *(getattr(torch, name) for name in ("var_mean", "std_mean", "norm", "sum")),
        *(getattr(torch.Tensor, name) for name in ("norm", "sum")),
        *(functional.normalize, functional.group_norm, torch.linalg.vector_norm),
    }
)
