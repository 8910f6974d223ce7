"""Types that are called, or computed, in a way of their own: what inference finds of them, and the plans by hand."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import shardwise
from parity.stand_ins import NOT_BUILT
from shardwise import tiny
from shardwise.hf import sample_feeds
from shardwise.infer import infer
from shardwise.infer.islands import _filled
from shardwise.layers.registry import style_named
from shardwise.plan import Plan, wildcard

LARGEST = 2_000_000


def whole(plan: Plan) -> set[str]:
    """The matrices that are not cut, one name for all layers."""
    return {wildcard(row.name) for row in plan if not row.sharded and len(row.shape) > 1 and not row.buffer}


def styles(plan: Plan) -> set[str]:
    """Those that the plan's rules name."""
    return {row.rule.style for row in (*plan, *plan.modules) if row.rule is not None}


@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - NOT_BUILT.keys()))
def test_every_type_is_small(name):
    """Guards: a tower or a vocabulary of default size inside of a tiny model: seconds, and gigabytes."""
    model = tiny.on_meta(name)
    assert sum(parameter.numel() for parameter in model.parameters()) < LARGEST


def test_options_stand_by_any_name():
    """Guards: a size of the common ones that a config knows by another name stands before the one that was asked for."""
    assert tiny.config("gpt2", num_attention_heads=2).n_head == 2
    assert tiny.config("gpt2", n_head=2).num_attention_heads == 2
    assert tiny.config("bart", hidden_size=32).d_model == 32


@pytest.mark.parametrize("name", ["bart", "whisper", "trocr", "mllama"])
def test_cross_attention_is_cut(name):
    """Guards: products that no sample reaches stay whole: those of a decoder that attends to states of an encoder."""
    found = infer(tiny.build(name), 2)
    assert found.proof
    assert {family for family in whole(found.plan) if "positions" not in family} == set()


@pytest.mark.parametrize(
    ("kind", "name"),
    [("AutoModelForSeq2SeqLM", "bart"), ("AutoModelForMultipleChoice", "bert"), ("AutoModelForSequenceClassification", "gpt2")],
)
def test_other_heads_are_called_as_they_are(kind, name):
    """Guards: inputs that a model with another head refuses: no ids for a decoder, no choices, rows without an end."""
    config = tiny.config(name)
    model = getattr(transformers, kind).from_config(config, dtype=torch.float32)
    assert sample_feeds(model)
    body = {family for family in whole(shardwise.infer_plan(model, 2)) if "layer" in family or ".h." in family}
    assert body == set()


def test_numbers_that_some_layers_lack():
    """Guards: a number of one layer (a window) that is sought in another one, where it is None: inference ended in an error."""
    layers = {"layer_types": ["hybrid_sliding", "hybrid"], "num_hidden_layers": 2}
    assert infer(tiny.build("inkling_text", **layers), 2).proof


def test_images_and_sounds_are_inputs():
    """Guards: a model of neither text nor ids that is refused; one whose parametrized modules have classes of their own."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    images = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
    front = {"conv_dim": (8, 8), "conv_kernel": (20, 20), "conv_stride": (20, 20), "num_feat_extract_layers": 2}
    front |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "vocab_size": 31}
    sounds = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**sizes, **front))
    for model in (images, sounds):
        assert {"colwise", "rowwise"} <= styles(shardwise.plan(model, 2))


def test_position_bias_is_cut_with_its_heads():
    """Guards: attention that stays whole as an embedding of distances, a column a head, is added to its scores."""
    config = transformers.T5Config(vocab_size=127, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    plan = shardwise.infer_plan(transformers.T5ForConditionalGeneration(config), 2)
    assert {name for name in whole(plan) if "block" in name} == set()
    bias = plan["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert bias.local_shape(0, 2) == (32, 2)


def test_stacked_products_of_several_modules_are_cut():
    """Guards: experts whose matrices lie in a module each, which nothing copies the input to and nothing sums the output of."""
    plan = infer(tiny.build("jetmoe"), 2).plan
    assert {name for name in whole(plan) if "router" not in name} == set()
    assert {"stacked_colwise", "stacked_rowwise"} <= styles(plan)


def test_attention_that_is_exchanged_keeps_its_heads(threads):
    """Guards: heads that are all again on each rank once the model's own code puts full attention in place of sparse, for a
    short text; blocks that are read at random drawn for local heads alone.
    """
    options = {"block_size": 4, "num_random_blocks": 1}
    plan = shardwise.infer_plan(tiny.build("big_bird", **options), 2)
    assert {"switched_attention", "block_heads"} <= styles(plan)
    made = [tiny.build("big_bird", **options).eval() for _ in range(3)]
    texts = [torch.arange(3, 83).view(2, 40), torch.arange(3, 27).view(2, 12)]  # sparse, then full
    expected = [made[2](input_ids=ids).logits for ids in texts]

    def on_rank() -> list[Tensor]:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        model = shardwise.parallelize(made[mesh.get_local_rank()], mesh, plan=plan)
        return [model(input_ids=ids).logits for ids in texts]

    for logits in threads(on_rank, 2):
        for ours, theirs in zip(logits, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert "BigBirdSelfAttention" in type(made[0].bert.encoder.layer[0].attention.self).__name__


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["reformer", "xlnet", "prophetnet"])
def test_plan_by_hand_is_right(name, size):
    """Guards: rotations drawn for local heads alone, masks of all heads, products by einsum that nothing sums."""
    model = tiny.build(name)
    plan = shardwise.plan(model, size)
    assert any(row.sharded for row in plan if "attn" in row.name or "attention" in row.name)
    assert shardwise.prove(plan, model)


def test_einsum_is_a_name_of_products():
    """Guards: plans in files that name the style as it was called."""
    assert style_named("einsum", "") is style_named("products", "")


def test_einsum_that_is_whole_beside_parts_is_refused():
    """Guards: a proof that passes whatever einsum multiplies: an output that is whole reads heads that are parts."""
    model = tiny.build("xlnet")
    plan = shardwise.plan(model, 2, plan={"transformer.layer.*.rel_attn.o": "replicate"})
    with pytest.raises(shardwise.PlanError, match="The plan is wrong"):
        shardwise.prove(plan, model)


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        ("0 0 1 - ", "0 0 1 1"),  # a head after the other
        ("0 1 0 1 - - ", "0 1 0 1 0 1"),  # a bucket after the other, of distances that the sample has
        ("0 - - -", "0 - - -"),  # no telling
    ],
)
def test_outputs_that_nothing_read_are_filled_in(owners, expected):
    """Guards: columns that only longer texts read, kept whole among others that are cut."""
    as_tensor = [torch.tensor([-1 if one == "-" else int(one) for one in text.split()]) for text in (owners, expected)]
    assert torch.equal(_filled(as_tensor[0], as_tensor[0] >= 0, 2), as_tensor[1])


class Positions(nn.Embedding):
    """Learned positions, which make their ids themselves."""

    def forward(self, input: Tensor, offset: int = 0) -> Tensor:
        """(batch, sequence) -> (sequence, features)."""
        return super().forward(torch.arange(input.shape[1]) + offset)


class Text(nn.Module):
    """Tokens and positions, and a layer of an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(40, 16), Positions(40, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, sequence) -> (batch, sequence, 16)."""
        x = self.tokens(ids) + self.positions(ids, offset=2)
        return x + self.down(self.up(x).relu())


def test_positions_with_arguments_of_their_own_are_whole():
    """Guards: a trial of what can't be: an embedding that is called with more than ids, cut along its rows."""
    found = infer(Text(), 2, {"ids": torch.randint(40, (2, 8))})
    assert whole(found.plan) == {"positions.weight"}
    assert not any("forward() got" in why for why in found.left.values())


@pytest.mark.parametrize("size", [3, 4])
def test_stacked_experts_are_cut_in_aligned_rows(size):
    """Guards: experts of uneven width left whole, as grouped products refuse rows that are no multiple of 16 bytes."""
    plan = infer(tiny.build("mixtral", intermediate_size=120), size).plan
    widths = {plan["model.layers.0.mlp.experts.down_proj"].local_shape(rank, size)[-1] for rank in range(size)}
    assert all(width % 8 == 0 for width in widths)
    assert sum(plan["model.layers.0.mlp.experts.down_proj"].local_shape(rank, size)[-1] for rank in range(size)) == 120
