"""Whole experts on the ranks: on those of the tp axis, or on several replicas' together, by a sum or by tokens that travel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import shardwise
from figures import gradient_error, gradients
from models import batches
from parity.job import GRADIENTS, LOGITS
from parity.types import build, planned
from shardwise import tiny
from shardwise.errors import MeshError, PlanError, ShardwiseError
from shardwise.layers import EpDispatchExperts
from shardwise.model_state import required_state
from shardwise.plan import wildcard
from shardwise.plans import SORTED_EXPERTS
from shardwise.testing import RankError, RankPool

TRAVEL = "ep_all_to_all_experts"


@dataclass(frozen=True)
class Seen:
    """Of one process or rank: logits of each batch, gradients and parameters (None but on the first rank), norm, tokens."""

    logits: list[Tensor]
    gradients: dict[str, Tensor] | None
    norm: Tensor
    clipped: dict[str, Tensor] | None
    tokens: Tensor


WITHOUT_EXPERTS = ("gemma4_text",)
"""Types that have experts only where an option says so: `test_gemma4_with_experts`."""

DEALT = sorted(
    {name for name in planned() if getattr(CONFIG_MAPPING[name], "base_model_ep_plan", None)} - {*WITHOUT_EXPERTS}
    | {"dbrx", "llama4", *SORTED_EXPERTS}
)


def loaded(path: Path, implementation: str | None, **keywords: object) -> PreTrainedModel:
    """The shards that `from_pretrained` loads, or, without keywords, the ordinary model; None is transformers' default."""
    auto = shardwise.AutoModelForCausalLM if keywords else AutoModelForCausalLM
    chosen = {} if implementation is None else {"experts_implementation": implementation}
    return auto.from_pretrained(path, dtype=torch.float32, **chosen, **keywords).train()


def run(model: PreTrainedModel, numbers: list[int]) -> list[Tensor]:
    """Forward and backward of some batches, their losses divided by how many they are; gives their logits."""
    seen = []
    for number in numbers:
        batch = batches()[number]
        torch.manual_seed(0)  # for a router that draws
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        (output.loss / len(numbers)).backward()
        seen.append(output.logits.detach())
    return seen


def observe(model: PreTrainedModel, logits: list[Tensor]) -> Seen:
    """What is compared, after the backward passes."""
    found = gradients(model)
    norm = shardwise.clip_grad_norm_(model, 1e-2)
    clipped = gradients(model)
    model.zero_grad()
    prompt = batches()[0]
    tokens = model.eval().generate(
        prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    return Seen(logits, found, norm, clipped, tokens)


def sharded(path: Path, implementation: str | None, travel: bool) -> Seen:
    """On the ranks of one tp axis, which have the same tokens."""
    plan: str | dict[str, str] = "auto"
    if travel:
        table = shardwise.plan(loaded(path, implementation), dist.get_world_size(), ep_size=dist.get_world_size())
        plan = {wildcard(row.name): TRAVEL for row in table.modules if row.style is EpDispatchExperts}
        assert plan
    model = loaded(path, implementation, tp_plan=plan, ep_size=dist.get_world_size())
    return observe(model, run(model, [0, 1]))


def check(seen: list[Seen], plain: Seen) -> None:
    """What the ranks found beside one process: the first has the gradients, all have the rest."""
    for rank in seen:
        assert max((a - e).abs().max().item() for a, e in zip(rank.logits, plain.logits, strict=True)) < LOGITS
        assert abs(rank.norm - plain.norm) < GRADIENTS * plain.norm
        assert torch.equal(rank.tokens, plain.tokens)
    assert gradient_error(seen[0].gradients, plain.gradients) < GRADIENTS
    assert gradient_error(seen[0].clipped, plain.clipped) < GRADIENTS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory of a type's tiny checkpoint, written once."""
    directory = tmp_path_factory.mktemp("dealt")

    def path(name: str) -> Path:
        if not (directory / name).exists():
            build(name).save_pretrained(directory / name)
        return directory / name

    return path


def alone(path: Path, implementation: str | None = None) -> Seen:
    """One process, both batches."""
    model = loaded(path, implementation)
    return observe(model, run(model, [0, 1]))


@pytest.mark.parametrize("name", DEALT)
def test_dealt_to_the_tp_axis(name, pool2, checkpoint):
    """Guards: a layout of experts, or a router, whose gradients are parts or doubled when whole experts are dealt."""
    check(pool2.run(sharded, checkpoint(name), None, travel=False), alone(checkpoint(name)))


@pytest.mark.parametrize("name", [name for name in DEALT if not name.startswith("llama4")])
def test_tokens_travel(name, pool2, checkpoint):
    """Guards: tokens that come back in another order, with another token's weight, or not at all; gradients that stay with the
    rank that has the expert.
    """
    check(pool2.run(sharded, checkpoint(name), None, travel=True), alone(checkpoint(name)))


@pytest.mark.parametrize("travel", [False, True], ids=["sum", "travel"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "zaya"])
def test_every_implementation(name, implementation, travel, pool2, checkpoint):
    """Guards: transformers' loops over experts, of which some have no place for an id of another rank's expert."""
    seen = pool2.run(sharded, checkpoint(name), implementation, travel=travel)
    check(seen, alone(checkpoint(name), implementation))


def replicated(path: Path, tp_size: int, ep_size: int, saved: Path) -> Seen:
    """On four ranks: each replica has batches of its own, and DDP averages what is not dealt."""
    model = loaded(path, None, tp_plan="auto", tp_size=tp_size, ep_size=ep_size)
    model.save_pretrained(saved)
    mesh = required_state(model).mesh
    replicas, here = dist.get_world_size() // tp_size, dist.get_rank() // tp_size
    mine = [0, 1] if replicas == 1 else [here % 2]  # with four replicas two have the same batch: the mean is that of two
    wrapped = DistributedDataParallel(model, process_group=mesh._get_root_mesh().get_group("dp"))
    logits = run(wrapped, mine)
    return observe(model, logits)


LAYOUTS = [(name, 2, 4) for name in ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "dbrx", "zaya")]
LAYOUTS += [(name, tp_size, ep_size) for name in ("mixtral", "llama4_text", "dbrx") for tp_size, ep_size in ((1, 4), (1, 2))]


@pytest.mark.parametrize(("name", "tp_size", "ep_size"), LAYOUTS)
def test_dealt_to_several_replicas(name, tp_size, ep_size, pool4, checkpoint, tmp_path):
    """Guards: experts that see one replica's tokens only; their gradients summed where others' are averaged, or averaged twice;
    DDP making all replicas' experts the first one's; a norm that leaves out other replicas' experts; a file that lacks them.
    """
    path = checkpoint(name)
    plain, seen = alone(path), pool4.run(replicated, path, tp_size, ep_size, tmp_path)
    for rank, found in enumerate(seen):
        batch = plain.logits[rank // tp_size % 2]
        assert (found.logits[0] - batch).abs().max() < LOGITS
        assert abs(found.norm - plain.norm) < GRADIENTS * plain.norm
        assert torch.equal(found.tokens, plain.tokens)
    assert gradient_error(seen[0].gradients, plain.gradients) < GRADIENTS
    assert gradient_error(seen[0].clipped, plain.clipped) < GRADIENTS
    for file in path.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def drawn(path: Path, ep_size: int) -> Tensor:
    """On a rank: as many tokens as the number of its replica says, and the last replica many."""
    model = loaded(path, None, **({"tp_plan": "auto", "tp_size": 1, "ep_size": ep_size} if ep_size else {})).eval()
    here = dist.get_rank() if ep_size else int(path.name)
    prompt = batches()[here].input_ids[:1, : 4 + here]
    return model.generate(prompt, max_new_tokens=3 + 4 * here, min_new_tokens=3 + 4 * here, do_sample=False)


def test_replicas_that_generate_different_numbers_of_tokens(pool2, tmp_path):
    """Guards: a replica that is done and leaves, while the others wait for its experts."""
    for here in (0, 1):
        build("mixtral").save_pretrained(tmp_path / str(here))
    seen = pool2.run(drawn, tmp_path / "0", 2, timeout=60)
    for here in (0, 1):
        assert torch.equal(seen[here], drawn(tmp_path / str(here), 0))


def with_experts(path: Path) -> Seen:
    """On every rank, of the checkpoint's model with its experts dealt."""
    return sharded(path, None, travel=False)


def test_gemma4_with_experts(pool2, tmp_path):
    """Guards: a type whose plan names experts that only an option gives it."""
    options = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    tiny.build("gemma4_text", **options).save_pretrained(tmp_path)
    check(pool2.run(with_experts, tmp_path), alone(tmp_path))


def test_sizes_that_cannot_be(pool2, checkpoint):
    """Guards: groups of more ranks than there are, which would wait for each other; the reason is to name sizes that work."""
    with pytest.raises(RankError) as caught:
        pool2.run(replicated, checkpoint("mixtral"), 1, 4, Path("unused"))
    assert isinstance(caught.value.__cause__, MeshError)
    assert "ep_size=1, 2" in str(caught.value.__cause__)


def test_more_ranks_than_experts():
    """Guards: ranks without an expert, of which nothing would be known before the first backward hangs."""
    with pytest.raises(PlanError, match=r"gate_up_proj[^$]*an ep_size of at most 4"):
        shardwise.plan(build("mixtral"), 4, ep_size=8)


def test_the_report_counts_dealt_experts():
    """Guards: bytes a rank that leave out that experts lie on more ranks than the rest."""
    model = build("mixtral")
    split, dealt = shardwise.plan(model, 2), shardwise.plan(model, 2, ep_size=4)
    experts = sum(row.bytes for row in dealt if row.axis == "ep")
    assert experts > 0
    assert dealt.local_bytes(3) == split.local_bytes(1) - experts // 2 + experts // 4
    assert "experts over 4" in str(dealt)


class Around(nn.Module):
    """A module around a parallel model, as a reward model is."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids).logits


def wrapped(path: Path, how: str) -> Tensor:
    """On two ranks: the logits of a model in DDP."""
    model = loaded(path, None, tp_plan="auto", tp_size=1, ep_size=2)
    group = required_state(model).mesh._get_root_mesh().get_group("dp")
    inner = {"around": Around, "compiled": lambda m: torch.compile(m, backend="eager")}[how](model)
    ddp = DistributedDataParallel(inner, process_group=group, find_unused_parameters=True)
    ids = batches()[0].input_ids
    output = ddp(ids)
    return output if how == "around" else output.logits


@pytest.fixture
def fresh2() -> Iterator[RankPool]:
    """Two processes that nobody has used, nor will: DDP's hooks stay."""
    with RankPool(2, start_method="forkserver") as pool:
        yield pool


def test_ddp_around_a_compiled_model(fresh2, checkpoint):
    """Guards: names of dealt experts that DDP does not know, so that it makes them all the first replica's."""
    expected = loaded(checkpoint("mixtral"), None)(batches()[0].input_ids).logits
    for logits in fresh2.run(wrapped, checkpoint("mixtral"), "compiled"):
        assert (logits - expected).abs().max() < LOGITS


def test_ddp_around_another_module_is_refused(fresh2, checkpoint):
    """Guards: the same, where the module that DDP is given cannot tell it: silently other experts."""
    with pytest.raises(RankError) as caught:
        fresh2.run(wrapped, checkpoint("mixtral"), "around")
    assert isinstance(caught.value.__cause__, ShardwiseError)
    assert "those of the first one" in str(caught.value.__cause__)


def few(path: Path) -> Tensor:
    """On four ranks: tokens at batch 1, so that some ranks of the tp axis have no row to send."""
    model = loaded(path, None, tp_plan="auto", tp_size=2, ep_size=4).eval()
    return model.generate(batches()[0].input_ids[:1], max_new_tokens=5, do_sample=False)


def test_fewer_tokens_than_ranks(pool4, checkpoint):
    """Guards: a rank whose slice of the tokens is empty."""
    path = checkpoint("mixtral")
    expected = loaded(path, None).eval().generate(batches()[0].input_ids[:1], max_new_tokens=5, do_sample=False)
    assert all(torch.equal(tokens, expected) for tokens in pool4.run(few, path))


def kept_whole(path: Path, plan: dict[str, str]) -> Seen:
    """On every rank, with a plan of the user's."""
    model = loaded(path, None, tp_plan=plan)
    return observe(model, run(model, [0, 1]))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_experts_kept_whole_by_the_user(name, pool2, checkpoint):
    """Guards: experts that stay split although their module is to stay whole, as our errors advise: nobody sums their parts."""
    check(pool2.run(kept_whole, checkpoint(name), {"layers.*.mlp.experts": "replicate"}), alone(checkpoint(name)))


@pytest.mark.parametrize("style", ["ep_all_to_all_experts", "ep_dispatch_experts"])
def test_styles_of_dealt_experts_need_dealt_experts(style):
    """Guards: a style that takes split experts for dealt ones, and the other way round: wrong numbers, or none."""
    with pytest.raises(PlanError, match="ep_size"):
        shardwise.plan(build("mixtral"), 2, {"layers.*.mlp.experts": style})
    with pytest.raises(PlanError, match="split"):
        shardwise.plan(build("mixtral"), 2, {"layers.*.mlp.experts": "moe_tp_experts"}, ep_size=2)


@pytest.mark.parametrize("ep_size", [0, -4, True, "auto", 4.0])
def test_what_is_no_number_of_ranks(ep_size, checkpoint):
    """Guards: values that are taken for one, or end in an error of another place."""
    with pytest.raises(PlanError, match="integer of at least 1"):
        shardwise.plan(build("mixtral"), 2, ep_size=ep_size)
    with pytest.raises(PlanError, match="integer of at least 1"):
        shardwise.AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), ep_size=ep_size)


def test_dealing_in_a_single_process(checkpoint):
    """Guards: a request that is dropped without a word."""
    with pytest.raises(MeshError, match="ep_size=2 was asked for, and this is a single process"):
        shardwise.AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), ep_size=2)
