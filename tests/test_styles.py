"""Every style, by name and through the public `parallelize`, on small ordinary modules: outputs and every gradient."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import shardwise
from blocks import (
    ATTENTION_PLAN,
    Attention,
    GatedMlp,
    Mlp,
    TwoHalves,
    check_parity,
    dense_layer,
    randomize,
    tp_axis,
    under,
    x,
)
from shardwise.errors import PlanError
from shardwise.layers import STYLES, ColwiseParallel
from shardwise.layout import Sharded
from shardwise.testing import RankError

SIZES = (2, 3, 4)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def one(layer: nn.Module) -> nn.Module:
    """A module with a single child, `0`."""
    return randomize(nn.Sequential(layer))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
class TestLinear:
    def test_colwise(self, kind, bias, size, threads):
        """Guards: rows of the weight or the bias cut at other places than the output; an input gradient that is not summed."""
        check_parity(threads, size, one(dense_layer(kind, 6, 7, bias)), {"0": "colwise"}, (x(2, 3, 6),), cut=Sharded(-1))

    @pytest.mark.parametrize("style", ["colwise_gather_output", "colwise_rep"])
    def test_colwise_gather_output(self, kind, bias, size, style, threads):
        """Guards: uneven parts gathered with their padding, gradients of the gathered output summed `size` times."""
        check_parity(threads, size, one(dense_layer(kind, 6, 7, bias)), {"0": style}, (x(2, 3, 6),))

    @pytest.mark.parametrize("style", ["rowwise_split_input", "rowwise_rep"])
    def test_rowwise_split_input(self, kind, bias, size, style, threads):
        """Guards: a bias added by every rank; input and weight cut at different places."""
        check_parity(threads, size, one(dense_layer(kind, 7, 5, bias)), {"0": style}, (x(2, 3, 7),))

    def test_colwise_then_rowwise(self, kind, bias, size, threads):
        """Guards: as above, in the pair that makes up an MLP; 2-dimensional inputs; accumulated micro-batches."""
        plan = {"up": "colwise", "down": "rowwise"}
        check_parity(threads, size, randomize(Mlp(kind=kind, bias=bias)), plan, (x(2, 3, 6),), (x(2, 3, 6),))
        check_parity(threads, size, randomize(Mlp(kind=kind, bias=bias)), plan, (x(5, 6),))

    def test_rowwise_scatter_output(self, kind, bias, size, threads):
        """Guards: outputs cut at other places than the activations that they meet; a gradient of the local outputs only."""
        plan = {"up": "colwise", "inner": "rowwise_scatter_output", "down": "rowwise"}
        check_parity(threads, size, randomize(Inside(kind, bias)), plan, (x(2, 3, 6),), (x(2, 3, 6),))

    def test_packed_colwise(self, kind, bias, size, threads):
        """Guards: gate | up cut straight through, so that the first ranks get only gates."""
        plan = {"gate_up": "packed_colwise", "down": "rowwise"}
        check_parity(threads, size, randomize(GatedMlp(kind=kind, bias=bias)), plan, (x(2, 3, 6),))

    def test_packed_rowwise(self, kind, bias, size, threads):
        """Guards: the columns of two fused halves cut straight through."""
        plan = {"a": "colwise", "b": "colwise", "down": "packed_rowwise"}
        check_parity(threads, size, randomize(TwoHalves(kind=kind, bias=bias)), plan, (x(2, 3, 6),))


class Inside(nn.Module):
    """A product of all activations inside a parallel region, whose outputs meet the local ones."""

    def __init__(self, kind: str, bias: bool) -> None:
        super().__init__()
        self.up, self.inner, self.down = (dense_layer(kind, *widths, bias) for widths in ((6, 7), (7, 7), (7, 5)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(hidden * self.inner(hidden).tanh())


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: the rows are scaled."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


IDS = torch.tensor([[0, 3, 10, 3], [7, 7, 5, 1], [10, 0, 2, 9]])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding", [None, 0, 5, 10])
@pytest.mark.parametrize("style", ["embedding_rowwise", "embedding_colwise"])
def test_embeddings(style, padding, size, threads):
    """Guards: ids of other ranks looked up as row 0 (its gradient too large), a padding row that learns, or a padding index
    that names another row on the ranks that do not hold it.
    """
    for kind in (nn.Embedding, ScaledEmbedding):
        check_parity(threads, size, one(kind(11, 7, padding_idx=padding)), {"0": style}, (IDS,), (IDS.flip(0),))


def _padding_gradient(model: nn.Module) -> tuple[float, int | None]:
    model = shardwise.parallelize(copy.deepcopy(model), tp_axis(), plan={"0": "embedding_rowwise"})
    model(torch.tensor([6, 6, 1])).sum().backward()
    rows = model[0].weight.grad
    return rows[1].abs().sum().item(), model[0].padding_idx


def test_padding_row_on_another_rank(threads):
    """Guards: the full padding index used on local rows, which freezes another row. Row 6 of 10 is row 1 of rank 1."""
    first, second = threads(_padding_gradient, 2, one(nn.Embedding(10, 3, padding_idx=6)))
    assert first == (3.0, None)
    assert second == (0.0, 1)


def _of_nobody(model: nn.Module, strange: int) -> str:
    model = shardwise.parallelize(copy.deepcopy(model), tp_axis(), plan={"0": "embedding_rowwise"})
    with pytest.raises(IndexError) as caught:
        model(torch.tensor([[1, 9, strange]]))
    return str(caught.value)


@pytest.mark.parametrize("strange", [10, 12, 99, -1])
def test_ids_that_no_rank_holds(strange, threads):
    """Guards: an id beyond the vocabulary that becomes a row of zeros without a word; a rank that raises alone, and the others
    wait. (Plain torch raises this.)
    """
    model = one(nn.Embedding(10, 4))
    with pytest.raises(IndexError) as caught:
        model(torch.tensor([[1, 9, strange]]))
    assert threads(_of_nobody, 3, model, strange) == [str(caught.value)] * 3


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_that_need_all_rows_are_refused(options):
    """Guards: a norm or a frequency taken of the ids of one rank, in silence."""
    with pytest.raises(PlanError, match=f"(?s)0: .*{next(iter(options))}.*embedding_rowwise"):
        shardwise.plan(one(nn.Embedding(10, 3, **options)), 2, {"0": "embedding_rowwise"})


class Normed(nn.Module):
    """A norm, and a head so that there is something to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [5, 8, 3, 1])
def test_sequence_parallel(length, size, threads):
    """Guards: a norm's gradient that saw only this rank's positions, or counts them twice; sequences that do not divide, or are
    shorter than the number of ranks."""
    plan = {"norm": "sequence_parallel", "head": "colwise_gather_output"}
    check_parity(threads, size, randomize(Normed()), plan, (x(2, length, 6),), (x(2, length, 6),), (x(2, length, 6),))


def _sequence_parallel_without_a_sequence(model: nn.Module) -> Tensor:
    model = shardwise.parallelize(copy.deepcopy(model), tp_axis(), plan={"norm": "sequence_parallel", "head": "colwise_rep"})
    return model(torch.ones(4, 6, dtype=torch.float64))


def test_sequence_parallel_needs_a_sequence(threads):
    """Guards: (tokens, features) cut along the features, over which the norm then takes its mean, in silence."""
    with pytest.raises(RankError, match=r"sequence_parallel: LayerNorm was given \(4, 6\)"):
        threads(_sequence_parallel_without_a_sequence, 2, randomize(Normed()))


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize(("size", "kv_heads"), [(2, 4), (3, 4), (4, 4), (2, 2), (4, 2), (4, 1), (2, 1)])
def test_norms_over_local_heads(size, kv_heads, micro_batches, threads):
    """Guards: `replicated_with_grad_allreduce` that sums the accumulated gradient (1.5 times the right one after two
    micro-batches), with heads that do not divide and with KV heads that ranks share; a bare parameter (sinks) of the root.
    """
    batches = [(x(2, 3, 12),) for _ in range(micro_batches)]
    check_parity(threads, size, randomize(Attention(kv_heads=kv_heads)), ATTENTION_PLAN, *batches)


@pytest.mark.parametrize("size", SIZES)
def test_local_params(size, threads):
    """Guards: a bare parameter (attention sinks) kept whole beside local heads, or its owner's other parameters cut with it."""
    parent = one(Attention())
    check_parity(threads, size, parent, {**under("0", ATTENTION_PLAN), "0": "local_params"}, (x(2, 3, 12),))


class Mixed(nn.Module):
    """A depthwise convolution over time between two products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12)
        self.taps = nn.Parameter(torch.zeros(10, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, 12) -> the same."""
        return self.down(nn.functional.conv1d(self.up(x).mT, self.taps, padding=1, groups=self.taps.shape[0]).mT)


@pytest.mark.parametrize("size", SIZES)
def test_local_rows(size, threads):
    """Guards: a depthwise convolution cut along another dim than its channels, or not cut with them."""
    plan = {"0.up": "colwise", "0.taps": "local_rows", "0.down": "rowwise"}
    check_parity(threads, size, one(randomize(Mixed())), plan, (x(2, 5, 12),))


class Partial(nn.Module):
    """A module whose output is a part on each rank, as its last product is over a local dim and it has no layer to say so."""

    def __init__(self, many: bool) -> None:
        super().__init__()
        self.up, self.mix, self.many = nn.Linear(6, 7), nn.Parameter(torch.zeros(6, 7)), many

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, str]:
        output = self.up(x).tanh() @ self.mix.t()
        return (output, "kept") if self.many else output


class Around(nn.Module):
    """Takes the first of several outputs."""

    def __init__(self, many: bool) -> None:
        super().__init__()
        self.inner = Partial(many)

    def forward(self, x: Tensor) -> Tensor:
        output = self.inner(x)
        if isinstance(output, Tensor):
            return output
        assert output[1] == "kept"
        return output[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("many", [True, False])
def test_all_reduce(many, size, threads):
    """Guards: a partial output that is not summed, or whose gradient is summed too."""
    plan = {"inner.up": "colwise", "inner.mix": "rowwise", "inner": "all_reduce"}
    check_parity(threads, size, randomize(Around(many)), plan, (x(2, 3, 6),), (x(2, 3, 6),))


class LatentAttention(nn.Module):
    """The part of DeepSeek's attention that has a latent and a rotary part in one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qk_rope_head_dim = 4, 2
        self.kv_a, self.kv_b = nn.Linear(12, 5 + 2), nn.Linear(5, 4 * 3)
        self.q_proj, self.o_proj = nn.Linear(12, 4 * 5), nn.Linear(4 * 3, 12)

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.kv_a(x).split([5, 2], -1)
        k = self.kv_b(latent).unflatten(-1, (-1, 3)).transpose(1, 2)
        q = self.q_proj(x).unflatten(-1, (-1, 5)).transpose(1, 2)
        key = torch.cat([k, rotary.sin().unsqueeze(1).expand(-1, k.shape[1], -1, -1)], -1)
        return self.o_proj(((q @ key.mT).softmax(-1) @ k).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("style", ["mla_kv_a_proj", "mla_kv_a_proj_gather_output"])
def test_mla_kv_a_proj(style, size, threads):
    """Guards: the rotary part's gradient, which only this rank's heads gave, left unsummed; or the latent's summed twice."""
    plan = {"kv_a": style, "kv_b": "colwise", "q_proj": "colwise", "o_proj": "rowwise"}
    check_parity(threads, size, randomize(LatentAttention()), plan, (x(2, 3, 12),), (x(2, 3, 12),))


class BiasedAttention(nn.Module):
    """Attention that is handed a bias of all heads, as ALiBi's, and a mask that may have one in it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 3
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 12) for _ in range(3))
        self.o_proj = nn.Linear(12, 12)

    def forward(self, x: Tensor, position_bias: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        bias = position_bias if position_bias.dim() == 4 else position_bias.unflatten(0, (-1, q.shape[1]))
        return self.o_proj(((q @ k.mT + bias + attention_mask).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Handing(nn.Module):
    """Hands on a bias and a mask, by name or by place."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.attn, self.by_name = BiasedAttention(), by_name

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return self.attn(x, attention_mask=mask, position_bias=bias) if self.by_name else self.attn(x, bias, mask)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("bias", "mask", "by_name"),
    [((4, 1, 5), (2, 1, 5, 5), True), ((8, 1, 5), (2, 4, 5, 5), False), ((2, 4, 1, 5), (5, 5), True)],
)
def test_local_head_bias(bias, mask, by_name, size, threads):
    """Guards: other heads' biases, all heads' (a shape error), a mask of one head that is cut, a bias whose gradient is a
    part.
    """
    styles = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
    plan = {"attn": "local_head_bias"} | under("attn", styles)
    check_parity(threads, size, randomize(Handing(by_name)), plan, (x(2, 5, 12), x(*bias), x(*mask)))


def test_replicate(threads):
    """Guards: a module named as whole that is cut, or whose whole gradients are summed."""
    check_parity(threads, 2, randomize(Normed()), {"norm": "replicate", "head": "colwise_rep"}, (x(2, 3, 6),))


class HalfColwise(ColwiseParallel):
    """A user's style: column-wise, with outputs halved."""

    prefix = "Half"

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


def _own_style(model: nn.Module, hidden: Tensor) -> tuple[Tensor, str]:
    model = shardwise.parallelize(copy.deepcopy(model), tp_axis(), plan={"up": "half_colwise", "down": "rowwise"})
    return model(hidden).detach(), repr(model.up)


def test_a_users_own_style(threads):
    """Guards: a registered style that plans cannot name, or that is taken for a built-in one."""
    shardwise.register_style("half_colwise", HalfColwise)
    shardwise.register_style("half_colwise", HalfColwise)  # again, as a module that is imported twice does
    model, hidden = randomize(Mlp()), x(2, 6)
    expected = model.down(torch.tanh(model.up(hidden) / 2)).detach()
    for output, text in threads(_own_style, 2, model, hidden):
        assert_close(output, expected)
        assert text.startswith("HalfLinear(in_features=6, out_features=")


def test_styles_that_cannot_be_registered():
    """Guards: a built-in style replaced for everybody, and a class that fails only in the first forward."""
    with pytest.raises(PlanError, match=r"'colwise'.*belongs to ColwiseParallel"):
        shardwise.register_style("colwise", HalfColwise)
    for wrong in (nn.Linear, HalfColwise(), "colwise"):
        with pytest.raises(PlanError, match=r"'wrong'.*subclass of shardwise\.ParallelStyle"):
            shardwise.register_style("wrong", wrong)


def test_every_style_is_tested():
    """Guards: a style that is added without a test here, nor in a family's rules, which the suite of all types runs."""
    here = Path(__file__).parent
    files = [
        *here.glob("test_*styles.py"),
        here / "test_expert_parallel.py",
        here / "test_infer_types.py",
        *Path(shardwise.__path__[0], "plans").glob("*.py"),
    ]
    tests = "".join(path.read_text() for path in files) + json.dumps(ATTENTION_PLAN)
    assert [name for name in STYLES if f'"{name}"' not in tests] == []


def _own_attribute(linear):
    plan = {"0": "replicated_with_grad_allreduce", "1": "colwise_gather_output"}
    model = shardwise.parallelize(nn.Sequential(nn.LayerNorm(4), copy.deepcopy(linear)), tp_axis(), plan)
    norm = model[0]
    assert model.get_parameter("0.weight") is norm.weight
    norm.weight.pow(2).sum().backward()
    return norm.weight.grad


def test_a_summed_parameter_is_itself_outside_of_its_forward(threads):
    """Guards: a penalty on `module.weight` that counts once for each rank; a `weight` that can't be frozen or optimized."""
    for gradient in threads(_own_attribute, 2, nn.Linear(4, 4)):
        torch.testing.assert_close(gradient, torch.full((4,), 2.0))
