"""Models whose code lies beside their checkpoint (`trust_remote_code`): written as repositories write, and in no release."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import dynamic_module_utils

import custom_code
import shardwise
from custom_code import CustomConfig, CustomForCausalLM
from shardwise.errors import PlanError
from shardwise.hf import sample_feeds
from shardwise.infer import cut_share
from shardwise.plan import Plan

WRONG = {
    "layers.*.attention.fused": "colwise",
    "layers.*.attention.out": "rowwise",
    "layers.*.up": "colwise",
    "layers.*.down": "rowwise",
}
"""Queries, keys and values are cut as one matrix: a rank would have queries alone."""
CASES: dict[str, tuple[dict[str, object], int, float]] = {
    "bias": ({"linear": "bias"}, 2, 0.95),
    "kernel": ({"linear": "kernel"}, 4, 0.95),
    "positions": ({"linear": "torch", "learned_positions": True, "positions": 60}, 4, 0.9),
    "loss": ({"linear": "torch", "chunked_loss": True}, 2, 0.85),
    "mixed": ({"linear": "torch", "mixed": True}, 3, 0.95),
    "wrong plan": ({"linear": "torch", "plan": WRONG}, 3, 0.95),
}
"""Options, ranks, and how much of the elements at least is cut."""


def made(options: dict[str, object]) -> CustomForCausalLM:
    """The same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CustomForCausalLM(CustomConfig(**options)).eval()


def batches() -> list[dict[str, Tensor]]:
    """Three micro-batches, longer and shorter than what plans are tried out on; the second is padded."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 101, shape, generator=generator) for shape in ((2, 29), (3, 9), (1, 14))]
    found = [{"input_ids": ids, "labels": ids} for ids in drawn]
    found[1]["attention_mask"] = (torch.arange(9) >= torch.tensor([[3], [0], [1]])).long()
    return found


def run(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor | None], Tensor]:
    """Logits and losses, the gradients of all micro-batches, and tokens."""
    model.train()
    found = [model(**batch) for batch in batches()]
    for output in found:
        output.loss.backward()
    numbers = [number.detach() for output in found for number in (output.logits, output.loss)]
    tokens = model.eval().generate(batches()[0]["input_ids"][:, :6], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return numbers, {name: parameter.grad for name, parameter in model.named_parameters()}, tokens


def on_rank(model: nn.Module, plan: Plan) -> tuple[list[Tensor], dict[str, Tensor | None], Tensor]:
    """The same of this rank's part of a copy."""
    mesh = init_device_mesh("cpu", (plan.size,), mesh_dim_names=("tp",))
    return run(shardwise.parallelize(copy.deepcopy(model), mesh, plan))


@pytest.mark.parametrize("name", CASES)
def test_exact(name, threads):
    """Guards: biases that a product adds and that stay whole; numbers of a layer that say its width; positions with an offset,
    looked up on the rank of the ones without; a loss by a part of the head; a product with a vector; a plan in the repository
    that is wrong, and was taken.
    """
    options, size, least = CASES[name]
    model = made(options)
    plan = shardwise.plan(model, size)
    assert cut_share(plan) > least
    ranks = threads(on_rank, size, model, plan)
    numbers, gradients, tokens = run(model)
    for rank, (found, local, generated) in enumerate(ranks):
        assert torch.equal(generated, tokens)
        for actual, right in zip(found, numbers, strict=True):
            torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-4)
        for key, gradient in gradients.items():
            assert gradient is not None
            torch.testing.assert_close(local[key], plan[key].layout.shard(gradient, rank, size), rtol=1e-3, atol=1e-5)


def test_positions_with_an_offset_are_refused():
    """Guards: a rule of the user's for rows that are not those of the ids: each rank would look up the offset's in its own."""
    model = made({"learned_positions": True})
    with pytest.raises(PlanError, match="LearnedPositions looks up other rows than it is given the ids of"):
        shardwise.plan(model, 2, {"model.positions": "embedding_rowwise"})


def test_labels_are_tried_out():
    """Guards: code that runs with labels alone, which no proof sees."""
    assert ["labels" in feed for feed in sample_feeds(made({})) if not callable(feed)] == [False, True]


def write(folder: Path, options: dict[str, object]) -> None:
    """A checkpoint with its code."""
    made(options).save_pretrained(folder)
    shutil.copy(custom_code.__file__, folder / "modeling.py")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling.CustomConfig", "AutoModelForCausalLM": "modeling.CustomForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path, saved: Path) -> tuple[list[Tensor], str, Tensor]:
    """On a rank: the numbers of a checkpoint whose code is imported from its folder."""
    dynamic_module_utils.HF_MODULES_CACHE = str(folder / "modules")
    model = shardwise.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", trust_remote_code=True)
    model.save_pretrained(saved)
    numbers, _, tokens = run(model)
    return numbers, type(model).__module__, tokens


def test_code_of_a_folder(tmp_path, shm2):
    """Guards: a class that ranks import from a checkpoint's folder, and that is neither inferred of nor saved as others are."""
    write(tmp_path / "a", {})
    ranks = shm2.run(load, tmp_path / "a", tmp_path / "b")
    numbers, _, tokens = run(made({}))
    for found, module, generated in ranks:
        assert module.startswith("transformers_modules.")
        assert torch.equal(generated, tokens)
        for actual, right in zip(found, numbers, strict=True):
            torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
