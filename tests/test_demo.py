"""The demo from end to end, small; that it bites; and the processes that it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from shardwise.demo import train
from shardwise.demo.checks import Curve, Generated, Loaded, Measured, Saved, Trained, make_checks
from shardwise.demo.compare import drift, gradient_difference, series_difference
from shardwise.demo.plot import Axis, draw
from shardwise.demo.plot import Curve as Drawn
from shardwise.demo.run import run
from shardwise.demo.settings import Settings
from shardwise.demo.text import read_text
from shardwise.errors import ShardwiseError
from shardwise.launch import UNMET, WorkerError, run_as_ranks

CURVE = Curve([5.0, 4.0, 3.0], [1.0, 1.0, 1.0], [0.1, 0.1, 0.1], 3.0)
FOUND = Measured(
    Loaded(unlike=0, whole_bytes=8, rank_bytes=[4, 4], planned_bytes=[4, 4]),
    Trained(CURVE, CURVE, gradients=1e-6, drift=1e-4, replicas=0, tokens=8),
    Generated("a", [98], unlike=0),
    Saved(unlike=0, plain_logits=1e-6, plain_tokens=0, tp=4, logits=1e-6, files=0),
)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One run of `shardwise demo --fast`, as a user starts it, and its folder."""
    output = tmp_path_factory.mktemp("demo") / "out"
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "shardwise.cli", "demo", "--fast", "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False), output


def test_fast_demo_holds(fast: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Guards: the main job broken anywhere between loading and reloading; and warnings or progress bars on its screen."""
    done, output = fast
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "All 15 checks hold" in done.stdout
    assert len(done.stdout.splitlines()) <= 60
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint", "loss.png", "report.json"]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_report_holds_every_number(fast: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Guards: a report that says "passed" whatever the numbers are, or leaves the curves out."""
    report = json.loads((fast[1] / "report.json").read_text())
    assert report["passed"]
    assert len(report["checks"]) == 15
    assert all(check["measured"] <= check["bound"] and check["passed"] for check in report["checks"])
    trained, loaded = report["measured"]["trained"], report["measured"]["loaded"]
    assert len(trained["whole"]["losses"]) == len(trained["sharded"]["losses"]) == report["size"]["steps"]
    assert trained["whole"]["losses"][-1] < trained["whole"]["losses"][0] - 1
    assert max(loaded["rank_bytes"]) < 0.51 * loaded["whole_bytes"]
    assert report["measured"]["generated"]["tokens"]


def test_checkpoint_opens_in_plain_transformers(fast: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Guards: a checkpoint that only the demo itself can open."""
    model = transformers.AutoModelForCausalLM.from_pretrained(fast[1] / "checkpoint")
    assert model(input_ids=torch.tensor([list(b"import os")])).logits.shape == (1, 9, 256)


def _clip_with_own_norm(model: torch.nn.Module, max_norm: float) -> torch.Tensor:
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def _run_with_defect(settings: Settings) -> int:
    right = train.shardwise.clip_grad_norm_
    train.shardwise.clip_grad_norm_ = _clip_with_own_norm
    try:
        return run(settings)
    finally:
        train.shardwise.clip_grad_norm_ = right


def test_demo_bites(pool2, tmp_path: Path) -> None:
    """Guards: checks that hold whatever happens. The defect put in: each rank clips by the norm of its own shards."""
    settings = Settings(output=tmp_path, steps=10, fast=True)
    assert pool2.run(_run_with_defect, settings, timeout=200) == [UNMET, UNMET]
    failed = {check["name"] for check in json.loads((tmp_path / "report.json").read_text())["checks"] if not check["passed"]}
    assert "gradient norm of the first step, relative" in failed
    assert "replicated parameters unlike rank 0's, at the end" in failed
    assert "gradients of the first step, worst parameter, relative" not in failed


def test_sound_numbers_pass() -> None:
    """Guards: checks that fail whatever happens, which the tests below would not see: these are the numbers of a sound run."""
    assert all(check.passed for check in make_checks(FOUND, loss_fall=0.5))


WRONG = {
    "loss": replace(FOUND, trained=replace(FOUND.trained, sharded=replace(CURVE, losses=[5.0, 4.0, 3.1]))),
    "loss-nan": replace(FOUND, trained=replace(FOUND.trained, sharded=replace(CURVE, losses=[5.0, 4.0, float("nan")]))),
    "no-fall": replace(
        FOUND, trained=replace(FOUND.trained, whole=replace(CURVE, losses=[5.0] * 3), sharded=replace(CURVE, losses=[5.0] * 3))
    ),
    "norm": replace(FOUND, trained=replace(FOUND.trained, sharded=replace(CURVE, norms=[1.1, 1.0, 1.0]))),
    "gradients": replace(FOUND, trained=replace(FOUND.trained, gradients=2e-3)),
    "drift": replace(FOUND, trained=replace(FOUND.trained, drift=0.5)),
    "held-out": replace(FOUND, trained=replace(FOUND.trained, sharded=replace(CURVE, held_out=3.1))),
    "replicas": replace(FOUND, trained=replace(FOUND.trained, replicas=1)),
    "loaded": replace(FOUND, loaded=replace(FOUND.loaded, unlike=1)),
    "bytes": replace(FOUND, loaded=replace(FOUND.loaded, rank_bytes=[4, 8])),
    "tokens": replace(FOUND, generated=replace(FOUND.generated, unlike=1)),
    "saved": replace(FOUND, saved=replace(FOUND.saved, unlike=1)),
    "plain-logits": replace(FOUND, saved=replace(FOUND.saved, plain_logits=1e-2)),
    "plain-tokens": replace(FOUND, saved=replace(FOUND.saved, plain_tokens=1)),
    "reload-logits": replace(FOUND, saved=replace(FOUND.saved, logits=float("inf"))),
    "reload-files": replace(FOUND, saved=replace(FOUND.saved, files=1)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_each_check_bites(wrong: str) -> None:
    """Guards: a number that is measured and shown, and judged by nothing; and NaN taken for small."""
    assert not all(check.passed for check in make_checks(WRONG[wrong], loss_fall=0.5))


def test_differences_do_not_hide_anything() -> None:
    """Guards: a parameter without a gradient, one of another shape, or NaN, counted as no difference."""
    one = {"a": torch.ones(2), "b": torch.ones(2)}
    assert gradient_difference(one, one) == 0
    assert gradient_difference({"a": one["a"]}, one) == float("inf")
    assert gradient_difference({**one, "b": torch.ones(1)}, one) == float("inf")
    assert not gradient_difference({**one, "b": torch.full((2,), float("nan"))}, one) <= 1e9
    assert not gradient_difference({**one, "a": torch.full((2,), float("nan"))}, one) <= 1e9
    assert not series_difference([1.0, float("nan"), 1.0], [1.0, 1.0, 1.0]) <= 1e9
    start = {"a": torch.zeros(2), "b": torch.zeros(2)}
    assert drift({"a": torch.ones(2), "b": torch.ones(2) * 2}, one, start) == pytest.approx(2**0.5 / 2)


def test_text(tmp_path: Path) -> None:
    """Guards: held-out text that is trained on, batches that differ between ranks, and a useless message for a short file."""
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(256)) * 100)
    text = read_text(path)
    assert len(text.training) + len(text.held_out) == 25600
    assert torch.equal(text.batch(3, 2, 16, seed=1), read_text(path).batch(3, 2, 16, seed=1))
    assert not torch.equal(text.batch(3, 2, 16, seed=1), text.batch(4, 2, 16, seed=1))
    assert text.held_out_batch(2, 16).shape == (2, 16)
    path.write_text("short")
    with pytest.raises(ShardwiseError, match="5 bytes of text are too few"):
        read_text(path)
    with pytest.raises(ShardwiseError, match="no such file"):
        read_text(tmp_path / "nowhere")


def test_plot_shows_the_curve() -> None:
    """Guards: a curve upside down, or one that leaves its frame."""
    lines = draw([Drawn([0.0, 1.0], "cyan")], Axis(0, 1, str), "title", width=20, height=4).plain.splitlines()
    assert len(lines) == 7
    assert max(map(len, lines)) <= 20
    assert lines[1].rstrip()[-1] not in " ┤"
    assert lines[4][6] not in " ┤"


def python(code: str) -> list[str]:
    """A command that runs `code`, which sees its rank as RANK."""
    return [sys.executable, "-c", "import os, sys, time; RANK = int(os.environ['RANK'])\n" + code]


def test_rank_that_dies_ends_the_others() -> None:
    """Guards: the other ranks left waiting for ever, and the dead one's last words lost."""
    began = time.monotonic()
    code = "time.sleep(100 * (RANK == 0)); print('out of luck', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    with pytest.raises(
        WorkerError, match=r"rank 1 of 2 was killed by SIGKILL\n  rank 0 did not finish\n.*\nout of luck"
    ) as error:
        run_as_ranks(python(code), 2, timeout=60)
    assert error.value.rank == 1
    assert time.monotonic() - began < 30


def test_cause_is_told_from_its_echo() -> None:
    """Guards: the message of the rank whose connection broke, instead of that of the rank that broke it."""
    code = "time.sleep(RANK); sys.exit(['Connection closed by peer', 'the cause'][RANK])"
    with pytest.raises(WorkerError, match=r"rank 1 of 2 ended with exit code 1\n  rank 0 failed too(.*\n)*the cause"):
        run_as_ranks(python(code), 2, timeout=60)


def test_ranks_that_hang_are_ended() -> None:
    """Guards: a hang without end, and no word about where."""
    code = "def stuck(): time.sleep(100)\nif RANK: stuck()"
    with pytest.raises(WorkerError, match=r"rank 1 of 2 did not end within 2 s(.*\n)*.*stuck"):
        run_as_ranks(python(code), 2, timeout=2)


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((UNMET, 0), UNMET), ((UNMET, UNMET), UNMET)])
def test_answer_of_the_ranks(codes: tuple[int, int], expected: int) -> None:
    """Guards: a "no" of the ranks taken for a crash, or for a "yes"."""
    assert run_as_ranks(python(f"sys.exit({codes}[RANK])"), 2, timeout=60) == expected


def test_ranks_do_not_outlive_their_parent(tmp_path: Path) -> None:
    """Guards: ranks that go on computing after the program that started them was killed."""
    note = tmp_path / "note"
    rank = (
        "import time, pathlib; from shardwise.launch import follow_parent; follow_parent();"
        f"p = pathlib.Path({str(note)!r}); [(p.write_text(str(n)), time.sleep(0.05)) for n in range(2000)]"
    )
    parent = (
        f"import sys; from shardwise.launch import run_as_ranks; run_as_ranks([sys.executable, '-c', {rank!r}], 1, timeout=90)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 90
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    time.sleep(1)
    last = note.read_text()
    time.sleep(1)
    assert note.read_text() == last
