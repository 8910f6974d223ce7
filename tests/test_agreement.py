"""What the ranks must agree on, and what happens to a parallel model that is wrapped or altered."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardwise
from llamas import IDS, llama
from shardwise.errors import MismatchError, PlanError, ShardwiseError
from shardwise.testing import RankError


class Reward(nn.Module):
    """A model with a head of the user's."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.score = nn.Linear(32, 1)

    def forward(self, ids):
        return self.score(self.backbone.model(ids).last_hidden_state)


def _reward_norm(size):
    torch.manual_seed(0)
    model = llama()
    if size > 1:
        shardwise.parallelize(model, init_device_mesh("cpu", (size,), mesh_dim_names=("tp",)))
    torch.manual_seed(1)
    whole = Reward(model)
    whole(IDS).sum().backward()
    return shardwise.clip_grad_norm_(whole, 0.1)


def test_a_parallel_model_inside_another_is_clipped_by_the_whole_norm(pool2):
    """Guards: a wrapped model that counts as an ordinary one: each rank would clip by its own shards' norm, and drift."""
    expected = _reward_norm(1)
    for norm in pool2.run(_reward_norm, 2):
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)


def _inside(verb):
    torch.manual_seed(0)
    model = shardwise.parallelize(llama(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    getattr(shardwise, verb)(Reward(model))


@pytest.mark.parametrize("verb", ["full_state_dict", "full_gradients", "unparallelize"])
def test_verbs_name_the_parallel_model_inside(verb, pool2):
    """Guards: local shards handed out as the full tensors of an ordinary model."""
    with pytest.raises(RankError, match="backbone"):
        pool2.run(_inside, verb)


def _altered(folder, change):
    torch.manual_seed(0)
    model = shardwise.parallelize(llama(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    if change == "replaced":
        model.lm_head = nn.Linear(32, 64, bias=False)
    else:
        model.extra = nn.Linear(4, 4)
    for act in (lambda: model.save_pretrained(folder), lambda: shardwise.full_state_dict(model)):
        with pytest.raises(ShardwiseError, match=f"{change} after"):
            act()


@pytest.mark.parametrize("change", ["replaced", "added"])
def test_a_layer_altered_afterwards_is_named(change, pool2, tmp_path):
    """Guards: a full weight cut as if it were a shard, so that the saved file is scrambled; a bare KeyError."""
    pool2.run(_altered, str(tmp_path), change)


def _load_differing(folders, plans, dtypes):
    rank = dist.get_rank()
    shardwise.AutoModelForCausalLM.from_pretrained(folders[rank], tp_plan=plans[rank], dtype=dtypes[rank])


WHOLE_MLP = {f"layers.*.mlp.{name}": "replicate" for name in ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize(
    ("seeds", "plans", "dtypes", "said"),
    [
        ((0, 1), ("auto", "auto"), (torch.float32,) * 2, "checkpoint"),
        ((0, 0), ("auto", WHOLE_MLP), (torch.float32,) * 2, "plan"),
        ((0, 0), ("auto", "auto"), (torch.float32, torch.bfloat16), "dtypes"),
    ],
)
def test_ranks_that_load_different_things(seeds, plans, dtypes, said, pool2, tmp_path: Path):
    """Guards: a model of which half is another checkpoint's; collectives of different sizes, that is a hang or an abort."""
    for seed in set(seeds):
        torch.manual_seed(seed)
        llama().save_pretrained(tmp_path / str(seed))
    with pytest.raises(RankError, match=said) as caught:
        pool2.run(_load_differing, [str(tmp_path / str(seed)) for seed in seeds], plans, dtypes)
    assert isinstance(caught.value.__cause__, MismatchError)


def _save_differing(folder):
    torch.manual_seed(0)
    model = shardwise.parallelize(llama(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    model.save_pretrained(folder, max_shard_size=["10KB", "5GB"][dist.get_rank()])


def test_ranks_that_save_differently(pool2, tmp_path):
    """Guards: ranks that send tensors in different orders, and wait for ever."""
    with pytest.raises(RankError, match="other arguments"):
        pool2.run(_save_differing, str(tmp_path))


def _save_replicas(folder):
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = shardwise.parallelize(llama(), mesh["tp"])
    model.save_pretrained(folder)
    return (Path(folder) / "model.safetensors").exists()


def test_no_replica_returns_before_the_files_are_there(pool4, tmp_path):
    """Guards: a data-parallel replica that goes on to load what is not yet written."""
    assert pool4.run(_save_replicas, str(tmp_path / "saved")) == [True] * 4


def test_logits_in_slices_are_refused():
    """Guards: a head whose outputs are not gathered: each rank would generate from its slice of the vocabulary."""
    with pytest.raises(PlanError, match=re.escape("colwise_gather_output")):
        shardwise.plan(llama().config, 2, {"lm_head": "colwise"})
