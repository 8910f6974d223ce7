"""What the ranks must agree on, and what happens to a parallel model that is wrapped or altered."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardwise
from llamas import IDS, llama
from shardwise.errors import MeshError, MismatchError, PlanError, ShardwiseError
from shardwise.testing import RankError, RankPool


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


def _load_differing(folders, options):
    rank = dist.get_rank()
    with pytest.raises(MismatchError) as caught:
        shardwise.AutoModelForCausalLM.from_pretrained(folders[rank], **{"tp_plan": "auto", **(options if rank else {})})
    return str(caught.value)


@pytest.mark.parametrize(
    ("seeds", "options", "said"),
    [
        ((0, 1), {}, "checkpoint"),
        ((0, 0), {"tp_plan": {"layers.*.mlp": "replicate"}}, "plan"),
        ((0, 0), {"dtype": torch.bfloat16}, "dtypes"),
        ((0, 0), {"rms_norm_eps": 0.1}, "config"),
        ((0, 0), {"overlap": True}, "overlap"),
        ((0, 0), {"tp_size": 1}, "tp_size"),
    ],
    ids=["checkpoint", "plan", "dtype", "config", "overlap", "size"],
)
def test_ranks_that_load_different_things(seeds, options, said, pool2, tmp_path: Path):
    """Guards: a model of which half is another checkpoint's, or computes with another epsilon; collectives of different sizes,
    that is a hang or an abort; a rank that waits five minutes for one that took tp_size=1.
    """
    for seed in set(seeds):
        torch.manual_seed(seed)
        llama().save_pretrained(tmp_path / str(seed))
    for text in pool2.run(_load_differing, [str(tmp_path / str(seed)) for seed in seeds], options, timeout=30.0):
        assert re.search(f"{said}.* rank 1|rank 1.*{said}", text), text


def _parallelize_differing(plans):
    torch.manual_seed(0)
    with pytest.raises(ShardwiseError) as caught:
        shardwise.parallelize(llama(), plan=plans[dist.get_rank()])
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"layers.*.mlp": "replicate"}, "the plan.* on rank 1"),
        ("infer", "on rank 1"),
        ({"nothing": "colwise"}, "failed on rank 1"),
    ],
    ids=["merged", "inferred", "wrong"],
)
def test_ranks_that_parallelize_by_different_plans(plan, said, pool2):
    """Guards: layers cut on one rank and whole on the other; a rank that waits five minutes for one whose plan is refused."""
    first, second = pool2.run(_parallelize_differing, ["auto", plan], timeout=30.0)
    assert (first[0], re.search(said, first[1]) is not None) == ("MismatchError", True), first
    assert second[0] == ("PlanError" if "failed" in said else "MismatchError")


def _config_failing():
    with pytest.raises((MismatchError, TypeError)) as caught:
        shardwise.AutoModelForCausalLM.from_config(
            llama().config, tp_plan="auto", **({"no_such": 1} if dist.get_rank() else {})
        )
    return type(caught.value).__name__


def test_a_rank_that_cannot_make_the_model(pool2):
    """Guards: ranks that wait for the weights of one whose class would not be made."""
    assert pool2.run(_config_failing, timeout=30.0) == ["MismatchError", "TypeError"]


def _after_the_group():
    model = shardwise.AutoModelForCausalLM.from_config(llama().config, tp_plan="auto")
    dist.destroy_process_group()
    verbs = (model.save_pretrained, shardwise.full_state_dict, shardwise.full_gradients, shardwise.unparallelize)
    for verb, argument in zip(verbs, ("nowhere", model, model, model), strict=True):
        with pytest.raises(MeshError, match=f"(?s){verb.__name__}.*before destroy_process_group"):
            verb(argument)


def test_verbs_after_the_process_group(tmp_path, monkeypatch):
    """Guards: "Could not resolve the process group registered under the name 0"."""
    monkeypatch.chdir(tmp_path)
    with RankPool(2, backend="cpu:shm", start_method="forkserver") as pool:
        pool.run(_after_the_group)
    assert not list(tmp_path.iterdir())


def _wrong_kinds():
    for options in ({"tp_size": "2"}, {"tp_size": 2.0}, {"tp_size": True}, {"device_mesh": (2,)}, {"device_mesh": "cpu"}):
        with pytest.raises(MeshError, match=next(iter(options))):
            shardwise.AutoModelForCausalLM.from_config(llama().config, tp_plan="auto", **options)
    everyone = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    first = DeviceMesh("cpu", [0], mesh_dim_names=("tp",))
    if dist.get_rank() == 1:
        with pytest.raises(MeshError, match="Rank 1 is not in device_mesh"):
            shardwise.parallelize(llama(), first)
    return everyone.size()


def test_sizes_and_meshes_that_are_none(pool2):
    """Guards: a size of another type that fails deep inside of torch; a rank outside of the mesh that gets a whole model."""
    assert pool2.run(_wrong_kinds) == [2, 2]


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
