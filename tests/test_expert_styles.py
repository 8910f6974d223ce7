"""The styles of mixture-of-experts modules: every expert split, or every rank some experts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GptOssConfig, Llama4TextConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import shardwise
from blocks import (
    check_parity,
    randomize,
    tp_axis,
    train,
    under,
    weights_like,
    x,
)
from shardwise.model_state import required_state

SIZES = (2, 3, 4)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def experts_block(implementation: str, only_first: bool = False) -> nn.Module:
    """Mixtral's router and 4 experts, of which each token takes 2; with `only_first` always experts 0 and 1."""
    config = MixtralConfig(hidden_size=8, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = implementation
    block = randomize(MixtralSparseMoeBlock(config)).train()
    if only_first:
        with torch.no_grad():
            block.gate.weight[2:] = block.gate.weight[:2].abs().neg()
            block.gate.weight[:2].abs_()
    return block


TP_EXPERTS = {
    "gate": "replicate",
    "experts.gate_up_proj": "packed_colwise",
    "experts.down_proj": "rowwise",
    "experts": "moe_tp_experts",
}
UNSAID = {name: style for name, style in TP_EXPERTS.items() if name != "experts"}
EP_EXPERTS = {
    "gate": "ep_router",
    "experts.gate_up_proj": "grouped_gemm",
    "experts.down_proj": "grouped_gemm",
    "experts": "ep_dispatch_experts",
}


def test_split_experts_are_summed(threads):
    """Guards: a rank's part of the experts' sum taken for all of it, where rules name the weights alone (Llama 4's plan in
    transformers 5.14).
    """
    check_parity(threads, 2, experts_block("eager"), UNSAID, (x(2, 5, 8),), tolerance=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("plan", [TP_EXPERTS, EP_EXPERTS], ids=["tp", "ep"])
def test_experts(plan, size, implementation, threads):
    """Guards: router gradients that are parts, gate/up pairs of experts torn apart, tokens computed by no rank or by two."""
    check_parity(threads, size, experts_block(implementation), plan, (x(2, 5, 8),), (x(2, 5, 8),), tolerance=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("plan", [TP_EXPERTS, EP_EXPERTS], ids=["tp", "ep"])
def test_experts_without_tokens(plan, size, implementation, threads):
    """Guards: a rank whose experts get no token, and which therefore has no graph and skips its share of the backward's sums
    (a hang); gradients of such experts.
    """
    check_parity(threads, size, experts_block(implementation, only_first=True), plan, (x(2, 5, 8).abs(),), tolerance=1e-5)


def _grouped(block: nn.Module, plan: dict[str, str], hidden: Tensor) -> tuple[Tensor, dict[str, Tensor], object]:
    model = shardwise.parallelize(copy.deepcopy(block), tp_axis(), plan=plan)
    seen = train(model, [(hidden,)], weights_like(hidden))
    return seen, required_state(model).plan


@pytest.mark.parametrize("only_first", [False, True])
@pytest.mark.parametrize("plan", [TP_EXPERTS, EP_EXPERTS], ids=["tp", "ep"])
def test_experts_by_grouped_mm(plan, only_first, threads):
    """Guards: as above, for transformers' default implementation, which leaves the rows of other ranks' experts uninitialised.

    It takes float32 only (in which sums differ by 1e-6), and shapes that are multiples of 16 bytes.
    """
    block = experts_block("grouped_mm", only_first).float()
    hidden = torch.randn(2, 5, 8).abs()
    alone = train(copy.deepcopy(block), [(hidden,)], weights_like(hidden))
    for rank, (seen, table) in enumerate(threads(_grouped, 2, block, plan, hidden)):
        assert_close(seen.output, alone.output, rtol=1e-5, atol=1e-5)
        assert_close(seen.inputs[0], alone.inputs[0], rtol=1e-5, atol=1e-5)
        for name, gradient in alone.gradients.items():
            assert_close(seen.gradients[name], table[name].layout.shard(gradient, rank, 2), rtol=1e-5, atol=1e-5)


class ExpertsWithIdentity(nn.Module):
    """Experts of which the last returns its input, as LongCat's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(2, 7, 6)), nn.Parameter(torch.zeros(2, 6, 7))
        self.identity_expert = nn.Identity()

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for slot in range(ids.shape[1]):
            parts = [(hidden @ up.t()).sin() @ down.t() for up, down in zip(self.up, self.down, strict=True)]
            every = torch.stack([*parts, self.identity_expert(hidden)], 1)
            chosen = every.gather(1, ids[:, slot, None, None].expand(-1, 1, hidden.shape[1]))[:, 0]
            output = output + chosen * weights[:, slot, None]
        return output


@pytest.mark.parametrize("size", SIZES)
def test_identity_expert(size, threads):
    """Guards: an identity expert that every rank adds, so that it counts `size` times, in values or in gradients."""
    plan = {
        "0.up": "colwise",
        "0.down": "rowwise",
        "0": "moe_tp_experts",
        "0.identity_expert": "moe_identity_expert",
    }
    ids = torch.tensor([[0, 2], [2, 1], [1, 0], [2, 2]])

    class Caller(nn.Sequential):
        def forward(self, hidden: Tensor, weights: Tensor) -> Tensor:
            return self[0](hidden, ids, weights)

    check_parity(threads, size, randomize(Caller(ExpertsWithIdentity())), plan, (x(4, 6), x(4, 2)), (x(4, 6), x(4, 2)))


class First(nn.Module):
    """The first output of a block that also returns what its router found."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor) -> Tensor:
        return self.block(hidden)[0].reshape(hidden.shape)


def gpt_oss_block(implementation: str) -> nn.Module:
    """The router and 4 experts of gpt-oss, with biases."""
    config = GptOssConfig(hidden_size=8, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = implementation
    return First(randomize(GptOssMLP(config))).train()


BIASED = {
    "router": "replicate",
    "experts.gate_up_proj": "rowwise",
    "experts.gate_up_proj_bias": "rowwise",
    "experts.down_proj": "colwise",
    "experts.down_proj_bias": "replicate",
    "experts": "moe_tp_experts",
}
BIASED_DEALT = {
    "router": "ep_router",
    **{f"experts.{name}": "grouped_gemm" for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")},
    "experts": "ep_dispatch_experts",
}


@pytest.mark.parametrize(
    ("plan", "implementation"),
    [(BIASED, "eager"), (BIASED, "batched_mm"), (BIASED_DEALT, "eager"), (BIASED_DEALT, "batched_mm")],
    ids=["tp-eager", "tp-batched", "ep-eager", "ep-batched"],
)
@pytest.mark.parametrize("size", [2, 4])
def test_experts_with_biases(size, plan, implementation, threads):
    """Guards: a bias that each rank adds to its part of the sum, or whose gradient some ranks lack; experts in eager mode that
    do not skip other ranks' experts.
    """
    check_parity(
        threads, size, gpt_oss_block(implementation), under("block", plan), (x(2, 5, 8),), (x(2, 5, 8),), tolerance=1e-5
    )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_experts_that_take_sorted_rows(size, threads):
    """Guards: rows given to another rank's experts, where 4 experts are dealt to 3 ranks too; the router's gradient."""
    config = Llama4TextConfig(hidden_size=8, intermediate_size=16, num_local_experts=4, num_experts_per_tok=1)
    plan = {
        "experts.gate_up_proj": "grouped_gemm",
        "experts.down_proj": "grouped_gemm",
        "experts": "ep_sorted_experts",
    }
    block = First(randomize(Llama4TextMoe(config))).train()
    check_parity(threads, size, block, under("block", plan), (x(2, 5, 8),), (x(2, 5, 8),), tolerance=1e-5)
