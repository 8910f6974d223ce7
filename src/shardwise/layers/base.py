"""What every parallel style is: a class mixed in front of a module's own, and the layouts that its parameters get.

A module becomes parallel by having its class assigned, `module.__class__ = parallel_class(style, type(module))`, as FSDP2
does: no hooks, no wrappers, no replaced `forward`. So state-dict keys stay, `deepcopy` and `pickle` work, our line stands in
the traceback, and undoing it is one assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from shardwise.collectives import Sizes, copy_to_tp
from shardwise.layers.gradients import mean_gradient, sum_gradient
from shardwise.layers.region import Region
from shardwise.layout import Block, Layout, Packed, Replicated, Shape, Sharded, Spread

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from shardwise.layers.sequence import Stream

Axis = Literal["tp", "ep"]
"""On which ranks something lies: those that compute the same tokens, or those to which experts are dealt (these, or more)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a style may cut a parameter: what its layout needs to know besides the shape.

    Args:
        unit: indices that stay together (a head's dims).
        spread: what to do with fewer units than ranks, see `shardwise.layout.Block`.
        blocks: the matrices that are fused along the cut dim, where there are several.
        transposed: the weight is kept as (in, out).
        dim: which dim to cut of a tensor that a rule names itself; None where the style says it.
    """

    unit: int = 1
    spread: Spread = "split"
    blocks: tuple[Block, ...] = ()
    transposed: bool = False
    dim: int | None = None

    def along(self, dim: int) -> Layout:
        """The layout that cuts `dim` so, or the dim that the cut itself names."""
        dim = dim if self.dim is None else self.dim
        return Packed(dim, self.blocks) if self.blocks else Sharded(dim, self.unit, self.spread)


@dataclass(frozen=True, slots=True)
class Local:
    """What one rank holds of a module's tensors, for `ParallelStyle.local_attributes`."""

    layouts: Mapping[str, tuple[Layout, Shape]]
    rank: int
    size: int

    def shape(self, name: str) -> Shape:
        """The local shape of the tensor called `name`."""
        layout, shape = self.layouts[name]
        return layout.local_shape(shape, self.rank, self.size)

    def start(self, name: str) -> int:
        """Where in the full tensor the local one starts, along the cut dim."""
        layout, shape = self.layouts[name]
        pieces = layout.pieces(shape, self.rank, self.size)
        return pieces[0].full.start if pieces else 0


class LocalConfig:
    """A view of a model's config in which some numbers are local, for a module whose code reads them there
    (`config.num_attention_heads`).

    Everything else is read from the shared config at the time of reading, so that a later `set_attn_implementation` is seen.
    """

    def __init__(self, config: object, local: Mapping[str, int | None]) -> None:
        self.__dict__.update(local, _shared_config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_shared_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_shared_config"], name)


@dataclass
class ShardState:
    """What a parallel module knows about itself: its axis, its parameters' layouts and full shapes, and its siblings.

    Args:
        mesh: the one-dimensional mesh that the module's parameters lie on.
        tp: the one whose ranks compute the same tokens: `mesh` itself, but for experts that are dealt to more ranks.
        layouts: layout and full shape by name, for each parameter and buffer of this module that has a row in the plan.
        transposed: the weight is kept as (in, out).
        options: what the plan says to the style besides (the rotary dims of a latent projection, ...).
        region: what the module shares with its siblings between a column-wise and a row-wise layer; None where there is
            nothing to share.
        restore: attributes as they were before, for the way back.
        summed: while the module's forward runs, the parameters that it has read whose gradient is summed; else None.
        own_forward: the layer's own forward runs, which reads its weight and bias otherwise than everybody else: not gathered
            (`ReadWhole`), or without the bias, which is added after a sum (`RowwiseParallel`).
        stream: what the modules of a sequence-parallel model share; None of another.
        stream_parameters: of a decoder layer of such a model, the whole parameters that see a slice of the positions, each by
            the path of its module and its name.

    `sizes` has the ranks' lengths along each parameter's cut dim; `batches` says how many different batches of tokens the
    ranks of `mesh` compute.
    """

    mesh: DeviceMesh
    tp: DeviceMesh
    layouts: dict[str, tuple[Layout, Shape]] = field(default_factory=dict)
    transposed: bool = False
    options: Mapping[str, int] = field(default_factory=dict)
    region: Region | None = None
    restore: dict[str, object] = field(default_factory=dict)
    summed: dict[str, Tensor] | None = None
    own_forward: bool = False
    stream: Stream | None = None
    stream_parameters: tuple[tuple[tuple[str, ...], str], ...] = ()

    def __post_init__(self) -> None:
        size = self.mesh.size()
        self.batches = size // self.tp.size()
        self.sizes: dict[str, Sizes] = {}
        for name, (layout, shape) in self.layouts.items():
            if lengths := layout.lengths(shape, size):
                self.sizes[name] = lengths

    def enter(self, x: Tensor, training: bool) -> Tensor:
        """The input of a column-wise layer: I -> R, shared among siblings."""
        return copy_to_tp(x, self.mesh) if self.region is None else self.region.enter(x, self.mesh, training)

    def sum(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter called `name`, such that its gradient is summed over the ranks that have a part of it."""
        if self.batches > 1:
            return mean_gradient(parameter, self.mesh, self.batches)
        return sum_gradient(parameter, *self.layouts[name], self.mesh)

    def own(self, ids: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """`ids` along the cut dim of parameter `name`, counted from where this rank's part starts; and which of them other
        ranks hold: what no rank holds is out of range on each, as in one process. Shapes: as `ids`, the second bool.
        """
        sizes, rank = self.sizes[name], self.mesh.get_local_rank()
        local = ids - sum(sizes[:rank])
        return local, ((local < 0) | (local >= sizes[rank])) & (ids >= 0) & (ids < sum(sizes))

    def leave(self) -> None:
        """The end of a parallel region, in front of the row-wise product."""
        if self.region is not None:
            self.region.leave()


class ParallelStyle(nn.Module):
    """Base of the styles. A subclass overrides `forward` and says how the module's parameters lie.

    `shardwise.register_style("mine", MyStyle)` makes a style available to plans under a name. The class is mixed in front of
    the module's own, so `super().forward(...)` is the module's own forward, on local parameters.
    """

    prefix: ClassVar[str] = "Parallel"
    axis: ClassVar[Axis] = "tp"
    opens_region: ClassVar[bool] = False
    closes_region: ClassVar[bool] = False
    gradient_is_partial: ClassVar[bool] = False
    sums_itself: ClassVar[bool] = True  # else whoever calls the module says which values its summed parameters have
    _tp: ShardState

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """What is made anew with the class of a parallel module (`type(model).from_pretrained(...)`) is an ordinary one."""
        recipe: Recipe | None = vars(cls).get("_recipe")
        return object.__new__(cls) if recipe is None else recipe[1](*args, **kwargs)

    @classmethod
    def layout(cls, shape: Shape, cut: Cut) -> Layout:
        """The layout of a parameter of full `shape`: of the module under the style, or one that a rule names itself."""
        return Replicated()

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why the style can't be applied to `module`, in words; None where it can."""
        return None

    @classmethod
    def local_attributes(cls, module: nn.Module, local: Local) -> dict[str, int | None]:
        """Attributes of `module` that its code reads and that must become local, by name.

        Asked once for modules of the same class, config and layouts whose own numbers and strings are the same, so these and
        `local` are what the answer may depend on.
        """
        return {}

    @classmethod
    def options(cls, module: nn.Module, parent: nn.Module) -> dict[str, int]:
        """What the style has to know of `module` or its `parent` besides, read once when the plan is made."""
        return {}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Of a full tensor, what `load_state_dict` of this module, or of one around it, takes is this rank's part."""
        rank, size = self._tp.mesh.get_local_rank(), self._tp.mesh.size()
        for name, (layout, shape) in self._tp.layouts.items():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and tuple(given.shape) == shape and layout.cut(shape) is not None:
                state_dict[prefix + name] = layout.shard(given, rank, size)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}, tp={self._tp.mesh.size()}" if own else f"tp={self._tp.mesh.size()}"


Recipe = tuple[type[ParallelStyle], type[nn.Module], tuple[str, ...], tuple[type[ParallelStyle], ...]]


def parallel_class(
    style: type[ParallelStyle],
    base: type[nn.Module],
    summed: tuple[str, ...] = (),
    between: tuple[type[ParallelStyle], ...] = (),
) -> type[nn.Module]:
    """The class of a `base` module under `style`: the same object for the same arguments, or torch.compile would recompile.

    Args:
        style: what to mix in front.
        base: the module's own class.
        summed: parameters of which each rank's gradient is a part: reading one gives a value whose gradient is summed.
        between: what to mix in between the two, whose `super().forward` is the module's own.
    """
    return _make_class((style, base, summed, between))


@cache
def _make_class(recipe: Recipe) -> type[nn.Module]:
    style, base, summed, between = recipe
    namespace: dict[str, object] = {name: _summed_parameter(name) for name in summed}
    namespace |= {"__module__": base.__module__, "_recipe": recipe, "__reduce_ex__": _reduce_parallel}
    if summed and style.sums_itself:
        namespace["forward"] = _summing_forward(style, *between, base)
    return type(f"{style.prefix}{base.__name__}", (style, *between, base), namespace)


def _summing_forward(*bases: type[nn.Module]) -> Callable[..., Any]:
    # Elsewhere `module.weight` is the parameter itself: to be frozen, penalised, given to an optimizer.
    inner: Any = type(bases[0].__name__, bases, {})

    def forward(self: ParallelStyle, *args: Any, **kwargs: Any) -> Any:
        earlier = self._tp.summed
        self._tp.summed = {} if earlier is None else earlier
        try:
            return inner.forward(self, *args, **kwargs)
        finally:
            self._tp.summed = earlier

    return forward


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that `module` had before it became parallel."""
    recipe: Recipe | None = vars(type(module)).get("_recipe")
    return type(module) if recipe is None else recipe[1]


def is_parallel(module: nn.Module) -> bool:
    """Whether `module` had its class assigned by us."""
    return "_recipe" in vars(type(module))


def _summed_parameter(name: str) -> property:
    def read(self: ParallelStyle) -> Tensor | None:
        parameter = self._parameters[name]
        if parameter is None or self._tp.summed is None:
            return parameter
        if name not in self._tp.summed:  # once a forward: a loop over experts may read it many times, or never
            self._tp.summed[name] = self._tp.sum(name, parameter)
        return self._tp.summed[name]

    return property(read)


def _reduce_parallel(module: nn.Module, protocol: int) -> tuple[object, ...]:
    return _rebuild, vars(type(module))["_recipe"], module.__dict__


def _rebuild(*recipe: Any) -> nn.Module:
    return object.__new__(parallel_class(*recipe))
