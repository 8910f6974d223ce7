"""The benchmarks, with tiny shapes: that they run, and measure what they say. Their figures mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import document, report, targets
from benchmarks.adapters.floor import cut
from benchmarks.driver import Found
from benchmarks.floor import widen_head
from benchmarks.memory import Watch
from benchmarks.results import FOLDER, Result
from benchmarks.tasks.collectives import Count
from benchmarks.workload import Target
from benchmarks.workloads import WORKLOADS
from shardwise.testing.fake import fake_rank

ROOT = Path(__file__).parents[1]


def test_every_backend_is_measured(tmp_path):
    """Guards: a benchmark that has rotted by the time that there is a GPU to run it on; a failure that looks like a figure."""
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), "--tiny", "--device", "cpu", "--seconds", "0"]
    measured = ["--dtype", "bfloat16", "--tp", "2", "--rounds", "2", "--runs", "1"]
    subprocess.run([*command, *measured], cwd=ROOT, check=True, timeout=240)
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    assert [result["case"]["label"] for result in results] == ["one", "floor", "shardwise", "transformers"]
    for result in results:
        assert result["error"] == ""
        for cell, found in result["cells"].items():
            if cell.endswith("eager"):
                assert len(found["samples"]) == 2
                assert all(sample["device"] > 0 for sample in found["samples"])
            else:
                assert found["error"].startswith("left out")
    assert (tmp_path / "shardwise-tp2-bfloat16-train-eager.json.gz").exists()


def test_a_trial_of_the_whole_program(tmp_path):
    """Guards: a program that has rotted by the time that somebody repeats the figures; ranks that answer for each other."""
    command = [sys.executable, "-m", "benchmarks", "--tiny", "--folder", str(tmp_path), "--only", "host-training"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=200)
    result = Result.read("host-training", tmp_path)
    assert result is not None
    (contenders,) = result.cases.values()
    assert list(contenders) == ["floor", "by-hand", "shardwise", "after-tracing"]
    for found in contenders.values():
        assert found.error == ""
        assert len(found.rounds["ms"]) == 2
        assert min(found.rounds["ms"]) > 0
    assert "| shardwise |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "host-training.svg").exists()


def test_the_pages_are_those_of_the_results():
    """Guards: a figure that was typed, or that the results do not bear out any more."""
    assert (FOLDER / "README.md").read_text() == report.render(), "run: python -m benchmarks report"
    assert document.PAGE.read_text() == document.render(), "run: python -m benchmarks docs"


def test_the_slowest_rank_counts():
    """Guards: the time of a step taken from a rank that did not have to wait; the mean, which one slow step would move."""
    found = Found()
    mine, others = [{"ms": 1.0}, {"ms": 9.0}, {"ms": 2.0}], [{"ms": 3.0}, {"ms": 1.0}, {"ms": 1.0}]
    found.add([{"samples": mine}, {"samples": others}])
    assert found.rounds == {"ms": [3.0]}


def test_ratios_are_those_of_a_round():
    """Guards: medians divided by each other, which a machine that slows down halfway would spoil (here 6 / 2 = 3)."""
    floor, ours = Found(rounds={"ms": [1.0, 2.0, 10.0]}), Found(rounds={"ms": [2.0, 6.0, 11.0]})
    result = Result("host-training", "tiny", cases={"case": {"floor": floor, "shardwise": ours}})
    assert result.ratio("case", "shardwise", "floor", "ms").middle == 2.0


@pytest.mark.parametrize(("limit", "said"), [(2.0, "met"), (1.9, "**not met**")])
def test_a_target_is_judged_by_its_figure(limit, said):
    """Guards: a target that is met whatever was measured, or against a peer that was not the best one."""
    found = {
        name: Found(rounds={"ms": [ms]}) for name, ms in [("shardwise", 4.0), ("torch-styles", 5.0), ("transformers-5.23", 2.0)]
    }
    result = Result("host-training", "tiny", cases={"case": found})
    verdict = targets._verdict(WORKLOADS["host-training"], Target("ms", limit, "best peer"), result, "case")
    assert (verdict.value, verdict.said) == (2.0, said)


def test_what_was_not_measured_is_not_met():
    """Guards: a failure that looks like a figure."""
    result = Result("host-training", "tiny", cases={"case": {"shardwise": Found(error="out of memory", rounds={"ms": [1.0]})}})
    verdict = targets._verdict(WORKLOADS["host-training"], Target("ms", 2.0), result, "case")
    assert (verdict.value, verdict.met, verdict.said) == (None, False, "not measured")


def test_a_collective_is_counted_once_however_it_is_called():
    """Guards: calls that the count does not see, or sees twice: once as what was called and once as what that calls."""
    with fake_rank(4):
        group, part, whole = dist.group.WORLD, torch.zeros(256), torch.zeros(1024)
        with Count() as counted:
            dist.all_reduce(whole)
            torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(part, "sum", group.group_name))
            dist.all_gather_single(whole, part)
            dist.reduce_scatter_single(part, whole)
            dist.all_to_all_single(torch.empty_like(whole), whole)
    assert counted.found == {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "KiB": 4 + 1 + 1 + 4 + 4}


def test_memory_that_is_freed_again_is_seen():
    """Guards: a peak between two looks of this process at itself; a peak that is that of the time before."""
    with Watch() as watch:
        held = bytearray(64 * 2**20)
        time.sleep(0.1)
        del held
    assert 64 * 2**20 <= watch.most["RssAnon"] - watch.before["RssAnon"] < 72 * 2**20
    assert watch.after["RssAnon"] - watch.before["RssAnon"] < 8 * 2**20


def test_the_floor_has_a_ranks_shapes_and_all_logits():
    """Guards: a bound that computes more, or less, than a rank does."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=1, vocab_size=256
    )
    model = widen_head(AutoModelForCausalLM.from_config(cut(config, 4)), 4)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (16, 64)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (64, 32)
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (64, 64)
    ids = torch.arange(8).view(1, 8)
    found = model(input_ids=ids, labels=ids)
    assert found.logits.shape == (1, 8, 256)
    found.loss.backward()
