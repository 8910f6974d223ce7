"""The parallel styles: a class each, found by the name that plans use in `STYLES`.

| | |
|---|---|
| `base` | what every style is, and how a module's class becomes parallel |
| `linear`, `embedding`, `norm` | layers whose weights are cut |
| `replicated` | modules that stay whole, and what is summed or sliced around them |
| `stacked` | products that no linear layer computes: stacked matrices, bare parameters; `operands`: which operators they are |
| `experts`, `dispatch` | mixtures of experts: each split, or dealt whole; tokens that travel to their experts |
| `multihead`, `heads`, `alibi`, `width`, `sparse`, `latent`, `recurrent` | attention and mixers on local heads, by their code |
| `sequence` | sequence parallelism, in front of the other styles |
| `region`, `overlap` | what column-wise layers of one module share: one copy of their input, one all-reduce; overlap |
| `traced` | the linear styles under torch.compile |
| `gradients` | parameters whose gradient is summed or averaged over ranks |
| `adapters`, `whole` | what happens in a LoRA layer around a parallel one; weights that PEFT reads whole |
| `part` | a model inside of a parallel one, which is no whole model to save or clip |
| `registry` | styles by name, those of users among them |
"""

from __future__ import annotations

from types import MappingProxyType

from shardwise.layers.adapters import (
    CommonDropout,
    ExpertAdapter,
    LocalDropout,
    LocalMagnitude,
    SummedMagnitude,
    WholeEmbeddingAdapter,
)
from shardwise.layers.alibi import LocalHeadBias
from shardwise.layers.base import (
    Axis,
    Cut,
    Local,
    LocalConfig,
    ParallelStyle,
    ShardState,
    is_parallel,
    original_class,
    parallel_class,
)
from shardwise.layers.embedding import EmbeddingColwise, EmbeddingRowwise, EmbeddingStyle, looks_up_what_it_is_given
from shardwise.layers.experts import (
    ALIGNED,
    EpAllToAllExperts,
    EpDispatchExperts,
    EpRouter,
    EpSortedExperts,
    ExpertParallel,
    GroupedGemm,
    MoeExpertsParallel,
    MoeIdentityExpert,
)
from shardwise.layers.gradients import sum_gradient
from shardwise.layers.heads import AgreedSeeds, HashedHeads, NgramHeads
from shardwise.layers.latent import MlaKvAProjGatherOutput, MlaKvAProjParallel
from shardwise.layers.linear import (
    ColwiseGatherOutput,
    ColwiseParallel,
    LinearStyle,
    PackedColwiseParallel,
    PackedRowwiseParallel,
    ReadWhole,
    RowwiseInner,
    RowwiseParallel,
    RowwiseScatterOutput,
    RowwiseSplitInput,
    is_plain,
    is_product,
    stores_transposed,
)
from shardwise.layers.multihead import LocalMultihead
from shardwise.layers.norm import ShardedNorm, ShardedStatistics
from shardwise.layers.overlap import OverlappedLinear, OverlappedRegion
from shardwise.layers.part import PartOfModel
from shardwise.layers.recurrent import LocalHeadState, LocalState
from shardwise.layers.region import Region
from shardwise.layers.replicated import (
    AllReduceParallel,
    LocalMixer,
    LocalParamsParallel,
    LocalRows,
    Replicate,
    ReplicatedWithGradAllReduce,
    SequenceParallel,
    UnfusedMixer,
)
from shardwise.layers.sequence import (
    SequenceLayer,
    SequencePointwise,
    SequenceRegion,
    SequenceRowwise,
    SequenceStyle,
    SequenceWhole,
    Stream,
)
from shardwise.layers.sparse import BlockHeads, SwitchedAttention
from shardwise.layers.stacked import BareProducts, StackedColwise, StackedRowwise
from shardwise.layers.traced import Facts
from shardwise.layers.whole import WholeWeight, gather_whole
from shardwise.layers.width import ColwiseWholeInput, LocalWidth

STYLES: MappingProxyType[str, type[ParallelStyle]] = MappingProxyType(
    {
        "colwise": ColwiseParallel,
        "colwise_gather_output": ColwiseGatherOutput,
        "colwise_rep": ColwiseGatherOutput,
        "rowwise": RowwiseParallel,
        "rowwise_split_input": RowwiseSplitInput,
        "rowwise_rep": RowwiseSplitInput,
        "rowwise_scatter_output": RowwiseScatterOutput,
        "rowwise_inner": RowwiseInner,
        "packed_colwise": PackedColwiseParallel,
        "packed_rowwise": PackedRowwiseParallel,
        "embedding_rowwise": EmbeddingRowwise,
        "embedding_colwise": EmbeddingColwise,
        "sequence_parallel": SequenceParallel,
        "replicate": Replicate,
        "replicated_with_grad_allreduce": ReplicatedWithGradAllReduce,
        "all_reduce": AllReduceParallel,
        "sharded_norm": ShardedNorm,
        "sharded_statistics": ShardedStatistics,
        "mla_kv_a_proj": MlaKvAProjParallel,
        "mla_kv_a_proj_gather_output": MlaKvAProjGatherOutput,
        "moe_tp_experts": MoeExpertsParallel,
        "moe_identity_expert": MoeIdentityExpert,
        "local_params": LocalParamsParallel,
        "local_mixer": LocalMixer,
        "unfused_mixer": UnfusedMixer,
        "local_rows": LocalRows,
        "local_state": LocalState,
        "local_head_state": LocalHeadState,
        "switched_attention": SwitchedAttention,
        "block_heads": BlockHeads,
        "stacked_colwise": StackedColwise,
        "stacked_rowwise": StackedRowwise,
        "products": BareProducts,
        "einsum": BareProducts,
        "agreed_seeds": AgreedSeeds,
        "hashed_heads": HashedHeads,
        "ngram_heads": NgramHeads,
        "local_head_bias": LocalHeadBias,
        "local_multihead": LocalMultihead,
        "local_width": LocalWidth,
        "colwise_whole_input": ColwiseWholeInput,
        "grouped_gemm": GroupedGemm,
        "ep_router": EpRouter,
        "ep_dispatch_experts": EpDispatchExperts,
        "ep_all_to_all_experts": EpAllToAllExperts,
        "ep_sorted_experts": EpSortedExperts,
    }
)

__all__ = [
    "ALIGNED",
    "STYLES",
    "AgreedSeeds",
    "AllReduceParallel",
    "Axis",
    "BareProducts",
    "BlockHeads",
    "ColwiseGatherOutput",
    "ColwiseParallel",
    "ColwiseWholeInput",
    "CommonDropout",
    "Cut",
    "EmbeddingColwise",
    "EmbeddingRowwise",
    "EmbeddingStyle",
    "EpAllToAllExperts",
    "EpDispatchExperts",
    "EpRouter",
    "EpSortedExperts",
    "ExpertAdapter",
    "ExpertParallel",
    "Facts",
    "GroupedGemm",
    "HashedHeads",
    "LinearStyle",
    "Local",
    "LocalConfig",
    "LocalDropout",
    "LocalHeadBias",
    "LocalHeadState",
    "LocalMagnitude",
    "LocalMixer",
    "LocalMultihead",
    "LocalParamsParallel",
    "LocalRows",
    "LocalState",
    "LocalWidth",
    "MlaKvAProjGatherOutput",
    "MlaKvAProjParallel",
    "MoeExpertsParallel",
    "MoeIdentityExpert",
    "NgramHeads",
    "OverlappedLinear",
    "OverlappedRegion",
    "PackedColwiseParallel",
    "PackedRowwiseParallel",
    "ParallelStyle",
    "PartOfModel",
    "ReadWhole",
    "Region",
    "Replicate",
    "ReplicatedWithGradAllReduce",
    "RowwiseInner",
    "RowwiseParallel",
    "RowwiseScatterOutput",
    "RowwiseSplitInput",
    "SequenceLayer",
    "SequenceParallel",
    "SequencePointwise",
    "SequenceRegion",
    "SequenceRowwise",
    "SequenceStyle",
    "SequenceWhole",
    "ShardState",
    "ShardedNorm",
    "ShardedStatistics",
    "StackedColwise",
    "StackedRowwise",
    "Stream",
    "SummedMagnitude",
    "SwitchedAttention",
    "UnfusedMixer",
    "WholeEmbeddingAdapter",
    "WholeWeight",
    "gather_whole",
    "is_parallel",
    "is_plain",
    "is_product",
    "looks_up_what_it_is_given",
    "original_class",
    "parallel_class",
    "stores_transposed",
    "sum_gradient",
]
