"""Column-wise and row-wise linear layers.

    colwise    Y = X Aᵀ + b, rows of A split:     X (..., in) I          ->  Y (..., out/tp) S(-1)
    rowwise    Y = X Aᵀ + b, columns of A split:  X (..., in/tp) S(-1)   ->  Y (..., out) I, the bias added once, after the sum

A and b as `torch.nn.Linear` keeps them; transformers' `Conv1D` (GPT-2) keeps A transposed. Megatron-LM, arXiv:1909.08053.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shardwise.collectives import copy_to_tp, gather_from_tp, reduce_from_tp, scatter_to_tp
from shardwise.errors import ShardwiseError, describe
from shardwise.layers import traced
from shardwise.layers.base import Cut, Local, ParallelStyle
from shardwise.layout import Block, Layout, Packed, Replicated, Shape


def stores_transposed(module: nn.Module) -> bool:
    """Whether `module` keeps its weight as (in, out), as transformers' Conv1D does."""
    return hasattr(module, "nf") and not hasattr(module, "out_features")


def is_plain(module: nn.Module) -> bool:
    """Whether `module`'s forward is that of torch's linear layer."""
    return type(module).forward is nn.Linear.forward


def is_product(module: nn.Module) -> bool:
    """Whether we know what `module`'s forward computes: it is torch's linear layer, or transformers' Conv1D."""
    return is_plain(module) or stores_transposed(module)


def is_computed(module: nn.Module) -> bool:
    """Whether `module`'s weight is no parameter, but made of others in each forward."""
    made_of = ("weight_orig", "weight_g", "parametrizations")
    return "weight" not in module._parameters and any(name in (*module._parameters, *module._modules) for name in made_of)


def refuse_whole_matrix(module: nn.Module) -> None:
    """Raise `ShardwiseError` where the weight of a parallel `module` has since been put under what looks at the whole matrix
    (its norm, its largest elements), and would see this rank's part.
    """
    if not is_computed(module):
        return
    lists = module._modules.get("parametrizations")
    # Each parameter has a list of them, and a tensor or two beside it.
    kinds = {type(one).__name__ for many in (lists.children() if lists is not None else ()) for one in many.children()}
    if lists is None or kinds & {"_WeightNorm", "_SpectralNorm", "_Orthogonal"}:
        raise ShardwiseError(
            describe(
                f"{type(module).__name__}: what its weight is made by would see this rank's part alone.",
                why="pruning, weight_norm, spectral_norm and the like look at the whole matrix",
                found=", ".join(sorted(kinds)) or ", ".join(module._parameters),
                either=[
                    "make it permanent in the ordinary model (prune.remove, ...), and parallelize that, or",
                    "give the layer the style replicate",
                ],
            )
        )


class LinearStyle(ParallelStyle):
    """What the linear styles share: which attributes of the module say its width, and how it prints."""

    weight: Tensor
    _facts: traced.Facts

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        if not (hasattr(module, "out_features") or stores_transposed(module)):
            return f"{type(module).__name__} is not a linear layer (it has no out_features)"
        if is_computed(module):
            return "its weight is computed anew from others (a parametrization, weight_norm, pruning): make it permanent first"
        return None

    @classmethod
    def local_attributes(cls, module: nn.Module, local: Local) -> dict[str, int | None]:
        # `in_features` and `out_features` stay the whole layer's: no forward reads them, and what is put around a layer by them
        # (adapters) starts out as in one process. Conv1D's forward reads `nf`.
        rows, columns = local.shape("weight")
        return {"nf": columns, "nx": rows} if stores_transposed(module) else {}

    def extra_repr(self) -> str:
        local, full = self._parameters["weight"], self._tp.layouts["weight"][1]
        assert local is not None
        pairs = list(zip(local.shape, full, strict=True))
        outputs, inputs = reversed(pairs) if self._tp.transposed else pairs
        words = [
            f"{name}={a} of {b}" if a != b else f"{name}={a}"
            for name, (a, b) in (("in_features", inputs), ("out_features", outputs))
        ]
        return ", ".join([*words, f"bias={self._parameters.get('bias') is not None}", f"tp={self._tp.mesh.size()}"])


class ColwiseParallel(LinearStyle):
    """Y = X Aᵀ + b with the rows of A split.  X (..., in) I -> Y (..., out/tp) S(-1).

    Backward sums the input's gradient over the ranks, once for all siblings that read the same input.
    """

    prefix = "Colwise"
    opens_region = True

    @classmethod
    def layout(cls, shape: Shape, cut: Cut) -> Layout:
        return cut.along(_output_dim(shape, cut))

    def forward(self, input: Tensor) -> Tensor:
        facts, own = self._facts, self._parameters
        if torch.compiler.is_compiling() and facts["plain"]:
            return traced.colwise(self, input)
        entered = self._tp.enter(input, self.training)
        if facts["direct"] and len(own) == 2 and (weight := own.get("weight")) is not None:
            return linear(entered, weight, own["bias"])
        refuse_whole_matrix(self)
        output: Tensor = super().forward(entered)
        return output


class ColwiseGatherOutput(ColwiseParallel):
    """`ColwiseParallel`, and the outputs gathered.  X (..., in) I -> Y (..., out) I."""

    prefix = "ColwiseGather"

    def forward(self, input: Tensor) -> Tensor:
        local = super().forward(input)
        return gather_from_tp(local, self._tp.mesh, -1, self._tp.sizes["weight"])


class ReadWhole(ParallelStyle):
    """In front of a column-wise layer whose weight somebody reads to multiply by it himself (TRL and Liger, the head's): it is
    gathered, (out, in) I, as is the bias, (out,) I; backward takes this rank's slice. The layer's own forward reads its part.

    Reading is a collective then. The parameters, which optimizers and state dicts see, stay the rank's.
    """

    prefix = "ReadWhole"

    @property
    def weight(self) -> Tensor | None:
        """All of it, but in the layer's own forward."""
        return self._read("weight")

    @property
    def bias(self) -> Tensor | None:
        """All of it, but in the layer's own forward."""
        return self._read("bias")

    def forward(self, input: Tensor) -> Tensor:
        self._tp.own_forward = True
        try:
            output: Tensor = super().forward(input)
        finally:
            self._tp.own_forward = False
        return output

    def _read(self, name: str) -> Tensor | None:
        state, own = self._tp, self._parameters[name]
        if own is None or state.own_forward or name not in state.sizes:
            return own
        return gather_from_tp(own, state.mesh, 0, state.sizes[name])


class RowwiseParallel(LinearStyle):
    """Y = X Aᵀ + b with the columns of A split.  X (..., in/tp) S(-1) -> Y (..., out) I. The bias is added once, after the
    sum.
    """

    prefix = "Rowwise"
    closes_region = True

    @classmethod
    def layout(cls, shape: Shape, cut: Cut) -> Layout:
        return Replicated() if len(shape) == 1 else cut.along(_input_dim(shape, cut))

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        if _adds_bias_itself(module) and not _only_weight_and_bias(module):
            return f"{type(module).__name__} has a forward of its own with a bias, which would be added by every rank"
        return super().refuses(module)

    @classmethod
    def options(cls, module: nn.Module, parent: nn.Module) -> dict[str, int]:
        return {} if is_product(module) else {"own_forward": 1}

    @property
    def bias(self) -> Tensor | None:
        """None while a forward of the module's own runs, which would add it on every rank."""
        if "bias" not in self._parameters:
            raise AttributeError(f"{type(self).__name__} has no bias")
        return None if self._tp.own_forward else self._parameters["bias"]

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self._facts["plain"]:
            return traced.rowwise(self, input)
        state, bias = self._tp, self._parameters.get("bias")
        state.leave()
        output = reduce_from_tp(self._product(input), state.mesh)
        return output if bias is None else output + bias

    def _product(self, input: Tensor) -> Tensor:
        """What this rank adds to the sum, without the bias."""
        own = self._parameters
        if self._facts["direct"] and len(own) == 2 and (mine := own.get("weight")) is not None:
            return linear(input, mine)
        refuse_whole_matrix(self)
        if self._tp.options.get("own_forward"):
            return self._without_bias(input)
        weight = self.weight
        return torch.matmul(input, weight) if self._tp.transposed else linear(input, weight)

    def _without_bias(self, input: Tensor) -> Tensor:
        self._tp.own_forward = True
        try:
            partial: Tensor = super().forward(input)
        finally:
            self._tp.own_forward = False
        return partial


class RowwiseSplitInput(RowwiseParallel):
    """`RowwiseParallel` behind a layer that is not split: takes its slice of the input.  X (..., in) I -> Y (..., out) I."""

    prefix = "RowwiseSplit"

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(scatter_to_tp(input, self._tp.mesh, -1, self._tp.sizes["weight"]))


class RowwiseScatterOutput(RowwiseParallel):
    """`RowwiseParallel` of which every rank keeps its part of the outputs.  X (..., in/tp) S(-1) -> Y (..., out/tp) S(-1).

    For a product inside a parallel region, whose outputs belong to the same heads as its inputs: they are cut in proportion.
    Inputs that several ranks hold (a shared KV head) are counted once, and those ranks keep the same outputs.
    """

    prefix = "RowwiseScatter"
    closes_region = False

    def forward(self, input: Tensor) -> Tensor:
        state, (layout, shape) = self._tp, self._tp.layouts["weight"]
        mesh, inputs = state.mesh, state.sizes["weight"]
        copies = layout.copies(shape, mesh.size())
        if copies == 1:
            output = super().forward(input)
            sizes = tuple(output.shape[-1] * length // sum(inputs) for length in inputs)
            return scatter_to_tp(output, mesh, -1, sizes)
        output = copy_to_tp(super().forward(input / copies), mesh)
        cut = layout.cut(shape)
        assert cut is not None
        rank, length = mesh.get_local_rank(), shape[cut[0]]
        start = layout.pieces(shape, rank, mesh.size())[0].full.start
        return output.narrow(-1, output.shape[-1] * start // length, output.shape[-1] * inputs[rank] // length)


class RowwiseInner(RowwiseParallel):
    """`RowwiseParallel` of which local heads or channels read the outputs.  X (..., in/tp) S(-1) -> Y (..., out) R.

    For a product inside a parallel region that looks at all of its channels (Mamba's step sizes, B and C): one all-reduce in
    forward, and one of the outputs' partial gradients in backward. What is between it and the local channels sees partial
    gradients too: norms there are `replicated_with_grad_allreduce`, products with a cut weight `local_rows`.
    """

    prefix = "RowwiseInner"
    closes_region = False

    def forward(self, input: Tensor) -> Tensor:
        state, bias = self._tp, self._parameters.get("bias")
        output = reduce_from_tp(self._product(input), state.mesh)
        return copy_to_tp(output if bias is None else output + bias, state.mesh)


class PackedColwiseParallel(ColwiseParallel):
    """`ColwiseParallel` of a weight in which two matrices are fused (gate | up): each is cut on its own, so each rank gets a
    pair.
    """

    prefix = "PackedColwise"

    @classmethod
    def layout(cls, shape: Shape, cut: Cut) -> Layout:
        return _halves(shape, cut, _output_dim(shape, cut))


class PackedRowwiseParallel(RowwiseParallel):
    """`RowwiseParallel` of a weight whose inputs are two fused halves, each cut on its own."""

    prefix = "PackedRowwise"

    @classmethod
    def layout(cls, shape: Shape, cut: Cut) -> Layout:
        return Replicated() if len(shape) == 1 else _halves(shape, cut, _input_dim(shape, cut))


def _adds_bias_itself(module: nn.Module) -> bool:
    return not is_product(module) and getattr(module, "bias", None) is not None


def _only_weight_and_bias(module: nn.Module) -> bool:
    # Then its forward, without the bias, is the product (Falcon's linear layers); with more it may be anything.
    return isinstance(module, nn.Linear) and not module._modules and set(module._parameters) == {"weight", "bias"}


def _output_dim(shape: Shape, cut: Cut) -> int:
    return len(shape) - 1 if len(shape) == 1 or cut.transposed else len(shape) - 2


def _input_dim(shape: Shape, cut: Cut) -> int:
    return len(shape) - 2 if cut.transposed else len(shape) - 1


def _halves(shape: Shape, cut: Cut, dim: int) -> Layout:
    half = Block(shape[dim] // 2, cut.unit, cut.spread)
    return cut.along(dim) if cut.blocks else Packed(dim, (half, half))
