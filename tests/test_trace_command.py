"""`shardwise trace`: the collectives of a step, the ranks beside each other, and beside an earlier run."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwise import CollectiveTrace
from shardwise.errors import PlanError, ShardwiseError
from shardwise.tracing.run import start
from shardwise.tracing.settings import Settings


def test_a_step_and_another(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Guards: another step than was asked for, files that miss, and a difference that ends with exit code 0."""
    file, page = tmp_path / "trace.json", tmp_path / "trace.html"
    asked = Settings("qwen3", random=True, check=True, json=str(file), html=str(page))
    assert start(asked) == 0
    shown = capfd.readouterr().out
    assert "backward  all_reduce  self_attn.q_norm  weight" in shown
    assert "All 2 ranks do the same." in shown
    phases = {(one.phase, one.op, one.module) for one in CollectiveTrace.load(file)}
    assert ("backward", "all_reduce", "model.layers.1.self_attn.q_proj") in phases
    assert "self_attn.q_norm" in page.read_text(encoding="utf-8")

    assert start(Settings("qwen3", random=True, mode="decode", against=str(file))) == 1
    shown = capfd.readouterr().out
    assert (
        "The first difference is at collective 0: forward all_reduce of float32 (1, 16, 64), model.embed_tokens here" in shown
    )
    assert "+ forward all_reduce of float32 (1, 1, 64), model.layers.1.mlp.down_proj" in shown


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"mode": "dreaming"}, ShardwiseError, "--mode dreaming"),
        ({"tp": 3}, PlanError, "tp=3"),
        ({"against": "nowhere.json"}, ShardwiseError, "no trace of collectives"),
        ({"random": False}, ShardwiseError, "--random"),
    ],
)
def test_what_cannot_be(settings: dict[str, object], error: type, words: str) -> None:
    """Guards: ranks that are started to fail, one traceback each."""
    with pytest.raises(error, match=words):
        start(Settings(**{"model": "llama", "random": True, **settings}))
