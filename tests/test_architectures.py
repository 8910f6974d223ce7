"""Every causal-LM type: exact on 2 and 4 ranks, with a plan evenly cut at its real size, and documented as it is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parity.calls import CALLS, UNSOLVED
from parity.job import Measured, compare
from parity.sizes import RANKS, RealSize, real_size
from parity.suite import Suite
from parity.table import RANK_COUNTS, origin, written
from parity.types import every, planned
from shardwise.errors import PlanError
from shardwise.plan import Plan
from shardwise.testing import RankError, RankPool

EVEN = 1.15
"""On eight ranks the fullest holds at most this much times an eighth of the model's bytes, but for `UNEVEN`."""
UNEVEN = {
    "gpt_neo": "a mask of 2048 x 2048 in every layer, which is a buffer",
    "opt": "12 heads, and embedded positions in a small model",
    "recurrent_gemma": "10 heads, and recurrent units of as many blocks",
    "zamba": "mixers of two heads",
}
DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Suite:
    """Checkpoints and plain models' figures, once a type."""
    return Suite(tmp_path_factory.mktemp("types"), found_once=lambda name: name not in planned())


@pytest.fixture(scope="module")
def document() -> dict[str, tuple[str, ...]]:
    """The rows of docs/architectures.md."""
    return written(DOCUMENT.read_text())


def case(name: str, size: int) -> object:
    """A type on so many ranks; what is not solved has to fail."""
    why = UNSOLVED.get((name, size))
    return pytest.param(name, size, id=f"tp{size}-{name}", marks=[pytest.mark.xfail(reason=why)] if why else [])


@pytest.mark.parametrize(("name", "size"), [case(name, size) for size in RANK_COUNTS for name in every()])
def test_exact(name, size, suite, shm2, shm4):
    """Guards: a type whose logits, loss, gradients (one or two micro-batches), tokens or saved bytes are not one process's; one
    that is solved and still said not to be.
    """
    outcome = suite.outcome(name, {2: shm2, 4: shm4}[size])
    assert not isinstance(outcome, PlanError), outcome
    assert outcome.wrong == ()


def test_types():
    """Guards: a release whose types or plans are others, which nobody would notice; a check that goes through no type."""
    assert len(every()) == 189
    assert len(planned()) == 132
    assert "aria_text" in planned()
    assert {name for name, _ in UNSOLVED} | CALLS.keys() <= set(every())


@pytest.mark.parametrize("name", planned())
def test_even_at_real_size(name):
    """Guards: a part of a model that every rank keeps whole, and no rule says why; a plan that cuts less than it did."""
    size = real_size(name)
    assert size.unexplained == []
    assert size.share is None or size.share <= EVEN or name in UNEVEN


@pytest.mark.parametrize("name", every())
def test_document(name, document):
    """Guards: docs/architectures.md out of date; `make parity` writes it."""
    assert name in document, "run `make parity`"
    words = tuple("open" if (name, size) in UNSOLVED else "exact" for size in RANK_COUNTS)
    assert document[name][1:4] == (origin(name), *words), "run `make parity`"
    assert name not in planned() or document[name][-2:] == real_size(name).cells(), "run `make parity`"


def test_document_has_no_other_types(document):
    """Guards: a type that is gone, or twice there."""
    assert list(document) == list(every())


def test_real_size_names_what_is_whole():
    """Guards: shares that leave out replicas, and a check that no plan fails."""
    assert real_size("llama").share == pytest.approx(1.0, abs=0.001)
    assert real_size("llama").kept == ()
    zamba = real_size("zamba")
    assert zamba.share == pytest.approx(1 + sum(kept.excess for kept in zamba.kept), abs=0.01)
    assert "state-space" in zamba.cells()[1]
    assert f"tp={RANKS}" in real_size("nanochat").cells()[1]
    silent = RealSize(zamba.share, tuple(replace(kept, reason="") for kept in zamba.kept))
    assert silent.unexplained[0] == "model.layers.*.mamba.x_proj_weight"
    # Less than 1% each, and 8.7% together.
    assert real_size("hrm_text").kept[0].excess > 0.08


@pytest.fixture(scope="module")
def plain(suite) -> Measured:
    """What one process finds of one type; for `compare` to be tried on."""
    return suite.plain("llama")


def as_rank(plain: Measured) -> Measured:
    """What a rank of an exact model finds."""
    return replace(plain, plan=Plan(2, (), ()), common=[{"norm": torch.ones(2)}])


def outcome(suite: Suite, first: Measured, second: Measured, saved: str = "llama") -> tuple[str, ...]:
    """What `compare` says is wrong."""
    return compare([first, second], suite.plain("llama"), suite.directory / "llama", suite.directory / saved).wrong


def test_the_check_passes_what_is_equal(plain, suite):
    """Guards: the tests below passing for another reason than theirs."""
    assert outcome(suite, as_rank(plain), as_rank(plain)) == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: {"logits": [m.logits[0], m.logits[1] + 2e-4]}, "logits"),
        (lambda m: {"losses": [m.losses[0] * 2, m.losses[1]]}, "loss"),
        (lambda m: {"tokens": m.tokens.flip(1)}, "tokens"),
        (lambda m: {"common": [{"norm": torch.ones(2).nextafter(torch.zeros(2))}]}, "differ between ranks"),
    ],
    ids=["logits", "loss", "tokens", "common"],
)
def test_the_check_sees_the_last_rank(change, said, plain, suite):
    """Guards: checks that look at one rank or one micro-batch only, or with too wide a tolerance."""
    wrong = outcome(suite, as_rank(plain), replace(as_rank(plain), **change(plain)))
    assert len(wrong) == 1
    assert said in wrong[0]


@pytest.mark.parametrize("number", [0, 1])
def test_the_check_sees_gradients(number, plain, suite):
    """Guards: a gradient that is counted twice in the first or in the second micro-batch, and one that is missing."""
    name = "model.norm.weight"

    def with_gradients(gradients: dict[str, torch.Tensor]) -> Measured:
        return replace(as_rank(plain), gradients=[gradients if n == number else g for n, g in enumerate(plain.gradients)])

    own = plain.gradients[number]
    assert f"{number + 1} micro-batches" in outcome(suite, with_gradients(own | {name: own[name] * 2}), as_rank(plain))[0]
    fewer = {key: gradient for key, gradient in own.items() if key != name}
    assert name in outcome(suite, with_gradients(fewer), as_rank(plain))[0]


def test_the_check_sees_other_files(plain, suite):
    """Guards: a checkpoint that lacks a file, or has other bytes in one."""
    changed = suite.directory / "changed"
    changed.mkdir()
    for path in (suite.directory / "llama").iterdir():
        (changed / path.name).write_bytes(path.read_bytes()[:-1] if path.suffix == ".safetensors" else path.read_bytes())
    (changed / "config.json").unlink()
    assert outcome(suite, as_rank(plain), as_rank(plain), "changed") == (
        "saved config.json, model.safetensors other than loaded",
    )


def broken(name: str) -> None:
    """On every rank: end without a word."""
    os._exit(len(name))


def test_a_crash_costs_one_type(suite, shm2: RankPool):
    """Guards: workers that are out of step after a failure, for all types that come after it."""
    with pytest.raises(RankError):
        shm2.run(broken, "llama")
    assert suite.outcome("llama", shm2).wrong == ()
