"""`torch.compile(model, fullgraph=True)`: the numbers of eager mode, one graph for training, and no second compilation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import shardwise
from figures import gradient_error, gradients
from models import Batch, batches, checkpoint

STEPS = 5
# The hooks by which transformers collects router logits cannot be compiled, in one process either.
OVERRIDES = {"mixtral": {"output_router_logits": False}}


@dataclass(frozen=True)
class Run:
    """Losses of some training steps, the gradients of the first two (accumulated), and the logits after the last."""

    losses: list[Tensor]
    gradients: dict[str, Tensor] | None
    logits: Tensor
    graphs: tuple[int, int]


def run(path: Path, backend: str | None, **overrides: object) -> Run:
    """On a rank: train for some steps on one shape, then evaluate; compiled, unless `backend` is None.

    From the third step on a compilation is an error. `graphs` are the numbers of them after training and after evaluation.
    """
    auto = shardwise.AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=torch.float32, tp_plan="auto", **overrides).train()
    torch._dynamo.reset()
    counters.clear()
    called = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first, *_ = batches(model.device)
    losses = [_step(called, first) for _ in range(2)]
    found = gradients(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for turn in range(STEPS):
            optimizer.zero_grad()
            losses.append(_step(called, Batch(first.input_ids.roll(turn, 1), first.attention_mask, first.labels.roll(turn, 1))))
            optimizer.step()
    graphs = counters["stats"]["unique_graphs"]
    called.eval()
    with torch.no_grad():
        logits = [called(input_ids=ids).logits for ids in (first.input_ids, first.input_ids.flip(1))]
    return Run(losses, found, torch.stack(logits), (graphs, counters["stats"]["unique_graphs"]))


def _step(model: nn.Module, batch: Batch) -> Tensor:
    loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(
    ("name", "backend"),
    [("llama", "aot_eager"), ("qwen3", "aot_eager"), ("mixtral", "aot_eager"), ("qwen3", "inductor")],
)
def test_compiled_model_trains_and_evaluates_as_in_eager_mode(name, backend, pool2, tmp_path_factory):
    """Guards: a collective that the compiler drops, reorders into another group or puts no backward behind; a graph break;
    a graph for every layer or every step (a class made anew for each layer, a guard on the memo of the input).
    """
    path, overrides = checkpoint(tmp_path_factory, name), OVERRIDES.get(name, {})
    eager = pool2.run(run, path, None, **overrides)
    compiled = pool2.run(run, path, backend, timeout=240.0, **overrides)
    for expected, actual in zip(eager, compiled, strict=True):
        torch.testing.assert_close(actual.losses, expected.losses, atol=1e-5, rtol=0)
        torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=0)
        assert expected.graphs == (0, 0)
        assert actual.graphs == (1, 2)
    assert gradient_error(compiled[0].gradients, eager[0].gradients) < 1e-3
