"""`torch.compile(model, fullgraph=True)`: the numbers of eager mode, one graph for training, and no second compilation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

import shardwise
from figures import gradient_error, gradients
from models import Batch, batches, build, checkpoint
from shardwise.testing.fake import fake_rank

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


def checks(model: nn.Module) -> int:
    """What Dynamo checks in the second decoder layer at every call of the compiled `model`."""
    names: list[str] = []

    def keep(guards: list[Any]) -> list[bool]:
        names.extend(guard.name for guard in guards)
        return [True] * len(guards)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", options={"guard_filter_fn": keep})
    compiled(input_ids=batches()[0].input_ids, use_cache=False).logits.sum().backward()
    return sum("['layers']._modules['1']" in name for name in names)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
def test_a_compiled_layer_checks_little_more_than_its_own():
    """Guards: attributes of ours that traced code reads, each of which Dynamo checks at every call: with those of a
    `ShardState`, a mesh and a `Region` in seven linear layers, that took longer than all else that we add to a step.
    """
    own = checks(build("llama"))
    with fake_rank(2):
        model = shardwise.parallelize(build("llama"), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
        layer = checks(model)
        linears = [module for module in model.get_decoder().layers[1].modules() if isinstance(module, nn.Linear)]
        assert len(linears) == 7
        assert layer <= own + 4 * len(linears)
        for module in linears:
            module._facts["plain"] = False  # then a layer is traced as eager code runs it
        assert checks(model) > own + 5 * len(linears)
