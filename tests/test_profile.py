"""`shardwise profile` from end to end, on a tiny model: what it measures, writes and shows."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardwise
from shardwise import tiny
from shardwise.errors import ShardwiseError
from shardwise.mesh import tp_mesh
from shardwise.profiling import contenders
from shardwise.profiling.settings import Settings
from shardwise.subject import find
from shardwise.testing import RankPool
from traces import Seen, read_strictly

LAYERS, RANKS = 2, 2
CELLS = ["shardwise-eager", "dtensor-eager", "transformers-eager"]
OURS = {
    "all_reduce model.embed_tokens forward": 1,
    "all_reduce model.layers.*.self_attn.o_proj forward": LAYERS,
    "all_reduce model.layers.*.mlp.down_proj forward": LAYERS,
    "all_gather lm_head forward": 1,
    "all_reduce lm_head backward": 1,
    "all_reduce model.layers.*.mlp.gate_proj backward": LAYERS,
    "all_reduce model.layers.*.self_attn.q_proj backward": LAYERS,
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One run beside the peers, as a user starts it, and its folder."""
    output = tmp_path_factory.mktemp("profile") / "out"
    command = [sys.executable, "-m", "shardwise.cli", "profile", "llama", "--random", "--against", "dtensor,transformers"]
    command += ["--batch", "2", "--sequence", "32", "--steps", "3", "--output", str(output)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["COLUMNS"] = "128"
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment), output


def merged(output: Path, cell: str) -> Seen:
    """The trace of all ranks of a cell, read strictly."""
    with gzip.open(output / f"{cell}.trace.json.gz", "rt") as file:
        return read_strictly(json.load(file))


def test_it_runs_and_shows(done) -> None:
    """Guards: the command broken anywhere between its options and its tables; warnings on its screen."""
    run, output = done
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    assert all(f"{cell.replace('-', ' ')} " in run.stdout for cell in CELLS)
    assert max(map(len, run.stdout.splitlines())) <= 128
    assert re.search(r"model\.layers\.\*\s+\(each of 2\)\s+backward", run.stdout)
    written = {path.name for path in output.iterdir()}
    assert written == {"report.html", "report.json", "ranks", *(f"{cell}.trace.json.gz" for cell in CELLS)}


def test_the_parts_are_the_step(done) -> None:
    """Guards: a cell that did not run, time lost or counted twice, clocks that were not brought together."""
    found = json.loads((done[1] / "report.json").read_text())
    assert [one["cell"].replace(" ", "-") for one in found["cells"]] == CELLS
    for one in found["cells"]:
        assert len(one["seconds"]) == 3
        assert one["profiled"]["clock_error"] < 1e3
        for rank in one["profiled"]["ranks"]:
            parts = [rank[name] for name in ("compute", "wait", "transfer", "host")]
            assert min(parts) >= 0
            assert sum(parts) == pytest.approx(rank["step"], abs=1e-3)
            assert rank["compute"] > 0
            assert rank["transfer"] > 0
            assert rank["grown"] > 0
        assert len(one["profiled"]["ranks"]) == RANKS
    calls = [one["profiled"]["ranks"][0]["calls"] for one in found["cells"]]
    assert calls[0] == sum(OURS.values())
    assert min(calls[1:]) > calls[0]  # the peers sum once for each column-wise layer


@pytest.mark.parametrize("cell", CELLS)
def test_traces_are_sound(done, cell: str) -> None:
    """Guards: a trace that Perfetto shows wrongly or not at all, without one of the ranks, or without arrows."""
    _assert_sound(merged(done[1], cell))


def _assert_sound(seen: Seen) -> None:
    assert seen.processes == {0: "rank 0", 1: "rank 1"}
    collectives = [event for event in seen.ranges if event["cat"] == "collective" and "number" in event["args"]]
    by_rank = [[event["name"] for event in collectives if event["pid"] == rank] for rank in range(RANKS)]
    assert by_rank[0] == by_rank[1] != []
    arrows = [(s, f) for s, f in seen.arrows if s["cat"] == "collective"]
    assert len(arrows) > len(by_rank[0]) // 2  # but for those in which nobody waited
    assert {(s["pid"], f["pid"]) for s, f in arrows} <= {(0, 1), (1, 0)}


def test_ranges_carry_modules(done) -> None:
    """Guards: collectives at the wrong module or phase, and modules without ranges, forward or backward."""
    seen = merged(done[1], "shardwise-eager")
    own = [event for event in seen.ranges if event["pid"] == 0]
    names = [event["name"] for event in own if event["cat"] == "collective" and "number" in event["args"]]
    assert Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names) == OURS
    modules = {event["name"] for event in own}
    assert {"module model.layers.1.mlp.down_proj", "module model.layers.1.mlp.down_proj backward"} <= modules


def test_other_tools_read_the_traces(done) -> None:
    """Guards: the ranks' own traces without what Holistic Trace Analysis looks for, or with files that are none beside them."""
    folder = done[1] / "ranks" / "shardwise-eager" / "traces"
    assert sorted(path.name for path in folder.iterdir()) == ["rank0.json.gz", "rank1.json.gz"]
    for rank in range(RANKS):
        with gzip.open(folder / f"rank{rank}.json.gz", "rt") as file:
            trace = json.load(file)
        assert trace["distributedInfo"]["rank"] == rank
        assert sum(event["name"].startswith("ProfilerStep#") for event in trace["traceEvents"]) == 1


def test_the_page(done) -> None:
    """Guards: a page that needs the network, or leaves a cell or the pictures out."""
    page = (done[1] / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']?https?:", page)
    assert page.count("<svg") >= 3
    assert all(f"{cell.replace('-', ' ')}: the ranks" in page for cell in CELLS)
    assert "—" not in page


def _profiled(output: str, **options: Any) -> list[list[int]] | None:
    small = {"random": True, "sequence": 16, "batch": 2, "steps": 1, "warmup": 1}
    found = shardwise.profile("llama", output=output, **small | options)
    return None if found is None else [[rank.calls for rank in one.analysis.ranks] for one in found.profiles]


@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_modes(mode: str, tmp_path: Path, pool2) -> None:
    """Guards: a backward, or a prompt, in what is to be without; ranks of torchrun's that start ranks of their own."""
    assert pool2.run(_profiled, str(tmp_path), mode=mode) == [[[6, 6]], None]
    assert not (tmp_path / "work").exists()
    cell = json.loads((tmp_path / "report.json").read_text())["cells"][0]
    assert "gloo" in cell["backend"]
    tokens, hidden, logits = 2 * (1 if mode == "decode" else 16), 64, 64
    assert [rank["bytes"] for rank in cell["profiled"]["ranks"]] == [4 * tokens * (5 * hidden + logits)] * RANKS
    assert {part["phase"] for part in cell["profiled"]["layers"]} == {"forward"}
    assert {part["name"] for part in cell["profiled"]["layers"]} == {"", "model.layers.0", "model.layers.1"}


def test_compiled(tmp_path: Path, pool2) -> None:
    """Guards: compiled code whose kernels do not show, which is compiled anew in the profiled step, or has no backward."""
    found = pool2.run(_profiled, str(tmp_path), compile=True, layers=1, timeout=280)
    assert found == [[[7, 7], [7, 7]], None]
    _assert_sound(merged(tmp_path, "shardwise-compiled"))
    eager, compiled = json.loads((tmp_path / "report.json").read_text())["cells"]
    assert [rank["bytes"] for rank in compiled["profiled"]["ranks"]] == [rank["bytes"] for rank in eager["profiled"]["ranks"]]
    assert any("cpp_fused" in part["name"] for part in compiled["profiled"]["operators"])
    assert {(part["name"], part["phase"]) for part in compiled["profiled"]["layers"]} == {("", "forward"), ("", "backward")}
    page = (tmp_path / "report.html").read_text()
    assert "Compiled code calls no modules" in page


def _own_loop(output: str) -> tuple[list[int], str]:
    model, ids = shardwise.parallelize(tiny.build("llama"), tp_mesh()), torch.arange(24).view(2, 12)
    with shardwise.profiler(output) as profiling:
        time.sleep(0.05 * dist.get_rank())
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    if profiling.result is None:
        return [], ""
    return [rank.calls for rank in profiling.result.analysis.ranks], str(profiling.result)


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    """Guards: a late rank that is not named, in the traces of whoever has a loop already."""
    with RankPool(
        2, backend=None, start_method="forkserver"
    ) as pool:  # with one process group: the shared ones may have more by now
        (calls, shown), (_, nothing) = pool.run(_own_loop, str(tmp_path))
    assert calls == [sum(OURS.values())] * 2
    assert nothing == ""
    assert re.search(r"all_reduce model\.embed_tokens forward +rank 1 +[4-9]\d\.\d", shown)
    _assert_sound(merged(tmp_path, "shardwise-eager"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": ("megatron",)}, r"--against megatron: there is none(.|\n)*dtensor, transformers"),
        ({"mode": "train"}, r"--mode train: there is none(.|\n)*training, forward, decode"),
        ({"dtype": "float23"}, "dtype float23"),
        ({"tp": 3}, "tp=3"),
        ({"model": "mixtral", "against": ("dtensor",)}, "experts: torch's parallelize_module has no style"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Guards: a misspelt word, an impossible size, or a peer that can't, told by a worker's traceback, or not at all."""
    with pytest.raises(ShardwiseError, match=message):
        shardwise.profile(**{"model": "llama", "random": True, "output": tmp_path} | options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards: transformers' own message, from a worker, after everything else has run."""
    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    plan = shardwise.plan(find("llama", random=True).config, 2)
    with pytest.raises(ShardwiseError, match=r"package accelerate(.|\n)*pip install accelerate"):
        contenders.check_peers(Settings("llama", "llama", tmp_path, against=("transformers",)), plan)
    contenders.check_peers(Settings("llama", "llama", tmp_path, against=("dtensor",)), plan)
