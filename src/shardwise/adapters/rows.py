"""The rows of adapters: how their tensors lie on the ranks, and which of their modules become parallel."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from shardwise.adapters.find import kind_of, nested, ordinary_name, unwrapped, wrappers
from shardwise.errors import ShardwiseError, describe
from shardwise.layers import (
    ColwiseGatherOutput,
    ColwiseParallel,
    CommonDropout,
    EmbeddingStyle,
    ExpertAdapter,
    LocalDropout,
    LocalMagnitude,
    MlaKvAProjGatherOutput,
    MlaKvAProjParallel,
    MoeExpertsParallel,
    ParallelStyle,
    Replicate,
    ReplicatedWithGradAllReduce,
    RowwiseInner,
    RowwiseParallel,
    RowwiseScatterOutput,
    RowwiseSplitInput,
    SummedMagnitude,
    WholeEmbeddingAdapter,
    is_parallel,
    stores_transposed,
)
from shardwise.layout import Layout, Packed, Replicated, Sharded
from shardwise.plan import Plan
from shardwise.spec import ModuleSpec, ShardSpec, sums_gradient

_VARIANTS = ("DoraLinearVariant", "ALoraLinearVariant")


def adapter_plan(model: nn.Module, plan: Plan) -> Plan:
    """The rows of all adapters in `model`, by the names that they have there now: tensors, and modules that become parallel.

    Raises `ShardwiseError` for an adapter that would be wrong on a parallel model.
    """
    known = {row.name: row for row in plan.modules}
    found = _Found(plan)
    for name, wrapper in wrappers(model):
        layer = _Layer(name, wrapper, unwrapped(wrapper), plan, known.get(ordinary_name(name)))
        kind = kind_of(wrapper)
        if kind == "lora":
            layer.check()
            layer.add_to(found)
        elif kind == "experts":
            for path, inner in nested(name, wrapper):
                replace(layer, name=path, wrapper=inner).add_parameter(found)
        elif kind == "copy":
            found.add_copies(layer)
        elif layer.concerned:
            raise layer.refused(f"{type(wrapper).__name__} is no plain LoRA layer, and the layer in it is parallel")
    return Plan(plan.size, tuple(found.tensors), tuple(found.modules), plan.ep_size)


@dataclass
class _Found:
    plan: Plan
    tensors: list[ShardSpec] = field(default_factory=list)
    modules: list[ModuleSpec] = field(default_factory=list)

    def add_copies(self, layer: _Layer) -> None:
        """Layers that are trained whole (`modules_to_save`): copies of parallel ones, which lie as these do."""
        for name, tensor in layer.wrapper.named_parameters():
            kind, _, rest = name.partition(".")
            _, _, inner = rest.partition(".")
            row = self.plan.get(f"{ordinary_name(layer.name)}.{inner}") if kind == "modules_to_save" else None
            if row is not None:
                self.tensors.append(replace(row, name=f"{layer.name}.{name}", aliases=(), dtype=tensor.dtype))


@dataclass
class _Layer:
    """A layer of PEFT's in a parallel model: its path there, itself, the layer in it, and what the table says of that."""

    name: str
    wrapper: Any
    base: nn.Module
    plan: Plan
    spec: ModuleSpec | None

    @property
    def weight(self) -> ShardSpec | None:
        """The base layer's row."""
        return self.plan.get(f"{ordinary_name(self.name)}.weight")

    @property
    def concerned(self) -> bool:
        """Whether tensor parallelism changes anything in the base layer."""
        path = ordinary_name(self.name)
        rows = [self.plan.get(f"{path}.{name}") for name, _ in self.base.named_parameters()]
        cut = any(row is not None and (row.sharded or row.partial) for row in rows)
        return cut or any(is_parallel(module) for module in self.base.modules())

    def refused(self, why: str) -> ShardwiseError:
        """The error that says so."""
        return ShardwiseError(
            describe(
                f"{self.name}: an adapter that shardwise cannot make parallel: {why}.",
                either=[
                    "plain LoRA on linear layers and embeddings (rank and scaling as you like), or",
                    "shardwise.unparallelize(model) before the adapter is added",
                ],
            )
        )

    def check(self) -> None:
        """Raise `ShardwiseError` for what works on the base layer's whole weight, of which a rank has a part."""
        if not self.concerned:
            return
        if self.spec is not None and self.spec.axis == "ep":
            raise self.refused("the layer belongs to an expert that other ranks don't have")
        for adapter, variant in self.wrapper.lora_variant.items():
            if type(variant).__name__ not in _VARIANTS:
                raise self.refused(f"adapter {adapter!r} is a {type(variant).__name__}")

    def add_to(self, found: _Found) -> None:
        """The rows of each adapter in this layer."""
        if self.wrapper.lora_embedding_A:
            self._add_embedding(found)
            return
        style = self.spec.style if self.spec is not None else Replicate
        if issubclass(style, EmbeddingStyle):
            raise self.refused("a linear adapter around an embedding")
        first, second = self._styles(style)
        for adapter, a in self.wrapper.lora_A.items():
            self._add(found, "lora_A", adapter, a, first)
            self._add(found, "lora_B", adapter, self.wrapper.lora_B[adapter], second)
            if isinstance(self.wrapper.lora_dropout[adapter], nn.Dropout):
                local = first in (RowwiseParallel, RowwiseInner)
                dropout = LocalDropout if local else CommonDropout
                found.modules.append(ModuleSpec(f"{self.name}.lora_dropout.{adapter}", dropout, region=not local))
        for adapter, magnitude in self.wrapper.lora_magnitude_vector.items():
            self._add_magnitude(found, adapter, magnitude.weight, style)

    def _add_magnitude(self, found: _Found, adapter: str, tensor: Tensor, style: type[ParallelStyle]) -> None:
        """DoRA's magnitudes, one for each output."""
        name, row = f"{self.name}.lora_magnitude_vector.{adapter}", self.weight
        rowwise, whole = issubclass(style, RowwiseParallel), style is Replicate
        gathers = issubclass(style, ColwiseGatherOutput | MlaKvAProjGatherOutput | MlaKvAProjParallel | RowwiseInner)
        if gathers or not (rowwise or whole or issubclass(style, ColwiseParallel)) or (whole and self._partial()):
            raise self.refused(f"DoRA around a layer of style {style.__name__}")
        layout: Layout = Replicated()
        if row is not None and not rowwise and row.layout.cut(row.shape) is not None:
            assert isinstance(row.layout, Sharded | Packed)
            layout = replace(row.layout, dim=0)
        shape = (self._full_shape("lora_B", tensor)[0],)
        found.tensors.append(ShardSpec(f"{name}.weight", shape, tensor.dtype, layout, self._partial() and not rowwise))
        if not whole:
            found.modules.append(ModuleSpec(name, SummedMagnitude if rowwise else LocalMagnitude))

    def _styles(self, style: type[ParallelStyle]) -> tuple[type[ParallelStyle] | None, type[ParallelStyle] | None]:
        """Of A and of B, for the style of the base; None where the module stays as it is."""
        if issubclass(style, RowwiseScatterOutput):
            raise self.refused(f"the layer's style, {style.__name__}, does more than cut a product")
        if issubclass(style, (MlaKvAProjGatherOutput, MlaKvAProjParallel)):
            return None, style
        if issubclass(style, ColwiseParallel):
            return None, ColwiseGatherOutput if issubclass(style, ColwiseGatherOutput) else ColwiseParallel
        if issubclass(style, RowwiseInner):
            return RowwiseInner, ReplicatedWithGradAllReduce
        if issubclass(style, RowwiseParallel):
            return RowwiseSplitInput if issubclass(style, RowwiseSplitInput) else RowwiseParallel, None
        if style not in (Replicate, ReplicatedWithGradAllReduce):
            raise self.refused(f"the layer's style is {style.__name__}")
        row = self.weight
        if row is not None and sums_gradient(row, self.plan.size, self.plan.ep_size):
            return ReplicatedWithGradAllReduce, ReplicatedWithGradAllReduce
        return None, None

    def _add(self, found: _Found, part: str, adapter: str, linear: nn.Module, style: type[ParallelStyle] | None) -> None:
        """One of the two products."""
        name = f"{self.name}.{part}.{adapter}"
        for child, tensor in linear.named_parameters():
            layout, shape = self._layout(style, part, tensor.dim()), self._full_shape(part, tensor)
            partial = style is ReplicatedWithGradAllReduce or (style is not None and part == "lora_B" and self._partial())
            found.tensors.append(ShardSpec(f"{name}.{child}", shape, tensor.dtype, layout, partial))
        if style is not None:
            same = self.spec is not None and style is self.spec.style
            found.modules.append(ModuleSpec(name, style, options=self.spec.options if same and self.spec else {}))

    def add_parameter(self, found: _Found) -> None:
        """The rows of each adapter of a parameter: of a router, which is whole, or of a stack of experts' matrices.

        Of a stack that is cut, the factor that has the cut dim is cut along it. The other one is whole, and meets a part of the
        product on each rank: its gradient is summed.
        """
        if not self.concerned:
            for part in ("lora_A", "lora_B"):
                for adapter, linear in getattr(self.wrapper, part).items():
                    self._add(found, part, adapter, linear, None)
            return
        row, wrapper = self.plan.get(f"{ordinary_name(self.name)}.{self.wrapper.parameter_name}"), self.wrapper
        style = self.spec.style if self.spec is not None else Replicate
        cut = row.layout.cut(row.shape) if row is not None else None
        if row is None or cut is None or len(row.shape) != 3 or cut[0] == 0 or not issubclass(style, MoeExpertsParallel):
            raise self.refused(f"the parameter {wrapper.parameter_name} is no stack of experts' matrices, each of them cut")
        assert isinstance(row.layout, Sharded | Packed)
        outputs_last = not wrapper._did_swap_in_out_features
        split = "lora_B" if (cut[0] == 2) == outputs_last else "lora_A"
        inputs, outputs = row.shape[1:] if outputs_last else reversed(row.shape[1:])
        found.modules.append(ModuleSpec(self.name, ExpertAdapter))
        for adapter in wrapper.lora_A:
            for part in ("lora_A", "lora_B"):
                tensor, name = getattr(wrapper, part)[adapter].weight, f"{self.name}.{part}.{adapter}"
                shape = (tensor.shape[0], inputs) if part == "lora_A" else (outputs, tensor.shape[1])
                layout = replace(row.layout, dim=1 if part == "lora_A" else 0) if part == split else Replicated()
                found.tensors.append(ShardSpec(f"{name}.weight", shape, tensor.dtype, layout, part != split))
                if part != split:
                    found.modules.append(ModuleSpec(name, ReplicatedWithGradAllReduce))

    def _partial(self) -> bool:
        row = self.weight
        return row is not None and row.partial

    def _layout(self, style: type[ParallelStyle] | None, part: str, dims: int) -> Layout:
        """The base weight's cut, along the dim of it that the adapter's matrix has too."""
        row = self.weight
        whole = style in (None, ReplicatedWithGradAllReduce) or (part == "lora_A" and dims == 1)
        if whole or row is None or row.layout.cut(row.shape) is None:
            return Replicated()
        assert isinstance(row.layout, Sharded | Packed)
        return replace(row.layout, dim=0 if part == "lora_B" else 1)

    def _full_shape(self, part: str, tensor: Tensor) -> tuple[int, ...]:
        row = self.weight
        if row is None or not self.concerned:
            return tuple(tensor.shape)
        outputs, inputs = reversed(row.shape) if stores_transposed(self.base) else row.shape
        if part == "lora_B":
            return (outputs, *tensor.shape[1:])
        return (tensor.shape[0], inputs)

    def _add_embedding(self, found: _Found) -> None:
        row, wrapper = self.weight, self.wrapper
        if row is not None and sums_gradient(row, self.plan.size, self.plan.ep_size):
            raise self.refused("each rank has a part of the embedding's gradient")
        for part, parameters in (
            ("lora_embedding_A", wrapper.lora_embedding_A),
            ("lora_embedding_B", wrapper.lora_embedding_B),
        ):
            for adapter, tensor in parameters.items():
                name = f"{self.name}.{part}.{adapter}"
                found.tensors.append(ShardSpec(name, tuple(tensor.shape), tensor.dtype, Replicated()))
        if self.spec is not None and issubclass(self.spec.style, EmbeddingStyle):
            found.modules.append(ModuleSpec(self.name, WholeEmbeddingAdapter))
