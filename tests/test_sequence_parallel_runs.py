"""`sequence_parallel=True` in other ways to run a model: generation, dealt experts, hidden states, compiled code, async TP."""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed import _symmetric_memory as symmetric_memory

import shardwise
from blocks import tp_axis
from figures import gradient_error, gradients
from sequenced import build, of_length, split, train
from shardwise.errors import ShardwiseError
from shardwise.testing.fake import fake_rank


def in_training_mode() -> tuple[Tensor, str]:
    """On a rank: tokens generated in training mode; and what compiled code says of hidden states that are asked for."""
    model, ids = split("llama"), of_length(8).input_ids
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.eval()(input_ids=ids, output_hidden_states=True)  # transformers' hooks, which cannot be compiled the first time
    model.train()
    torch._dynamo.reset()
    with pytest.raises(ShardwiseError) as error:
        torch.compile(model, backend="eager")(input_ids=ids, output_hidden_states=True)
    return tokens, str(error.value)


def test_generating_and_compiling_in_training_mode(pool2):
    """Guards: a cache that has the slices of a prompt in it; slices handed out as the hidden states by compiled code."""
    expected = build("llama").generate(of_length(8).input_ids, max_new_tokens=6, do_sample=False)
    for tokens, said in pool2.run(in_training_mode):
        assert torch.equal(tokens, expected)
        assert "output_hidden_states" in said


def dealt() -> dict[str, Tensor] | None:
    """On a rank: the gradients of a model whose experts are dealt."""
    model = shardwise.parallelize(build("mixtral"), tp_axis(), ep_size=2, sequence_parallel=True)
    return train(model, of_length(7), of_length(8))


def test_dealt_experts(pool2):
    """Guards: experts that are given one rank's positions, each token of which travels again."""
    assert gradient_error(pool2.run(dealt)[0], train(build("mixtral"), of_length(7), of_length(8))) < 1e-3


def collected() -> tuple[str, list[int]]:
    """On a rank: what is said of hidden states that are asked for in training, and their lengths in evaluation mode."""
    model, ids = split("llama"), of_length(8).input_ids
    with pytest.raises(ShardwiseError) as error:
        model(input_ids=ids, output_hidden_states=True)
    hidden = model.eval()(input_ids=ids, output_hidden_states=True).hidden_states
    return str(error.value), [part.shape[1] for part in hidden]


def test_hidden_states_that_are_asked_for(pool2):
    """Guards: slices handed out as the hidden states."""
    for said, found in pool2.run(collected):
        assert "output_hidden_states" in said
        assert found == [8, 8, 8]


# --- compiled ---


def compiled(backend: str | None, length: int) -> tuple[dict[str, Tensor] | None, int]:
    """On a rank: gradients of two steps, and how many graphs there are; a recompilation is an error."""
    model, batch = split("qwen3"), of_length(length)
    torch._dynamo.reset()
    counters.clear()
    called = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            called(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
    return gradients(model), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("backend", "length"), [("aot_eager", 8), ("aot_eager", 7), ("inductor", 8)])
def test_compiled_model(backend, length, pool2):
    """Guards: a graph break, a graph for every layer or step; an input's gradient that is summed by an all-reduce and again by
    the reduce-scatter, since traced layers have a code path of their own.
    """
    expected = train(build("qwen3"), of_length(length), of_length(length))
    found, graphs = pool2.run(compiled, backend, length, timeout=240.0)[0]
    assert graphs == 1
    assert gradient_error(found, expected) < 1e-3


def fused(model: nn.Module) -> list[Counter[str]]:
    """What Inductor's async-TP pass makes of the forward and the backward graph of `model`: the products of each gather that it
    fused, and the products fused with a reduce-scatter; and the collectives that are left.
    """
    found: list[Counter[str]] = []

    def count(graph: torch.fx.Graph) -> None:
        graph = copy.deepcopy(graph)  # what it makes runs on GPUs only
        own_pass(graph)
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        names = Counter(node.target.__name__ for node in nodes if "all_gather_into" in str(node.target))
        names += Counter(node.target.__name__ for node in nodes if "reduce_scatter_tensor" in str(node.target))
        gathers = [node for node in nodes if node.target is torch.ops.symm_mem.fused_all_gather_matmul.default]
        names += Counter(f"gather and {len(node.args[1])} products" for node in gathers)
        scatters = [node for node in nodes if node.target is torch.ops.symm_mem.fused_matmul_reduce_scatter.default]
        found.append(names + Counter({"product and reduce-scatter": len(scatters)}))

    own_pass = importlib.import_module("torch._inductor.fx_passes.micro_pipeline_tp").micro_pipeline_tp_pass
    torch._dynamo.reset()
    with (
        patch("torch._inductor.fx_passes.post_grad.micro_pipeline_tp_pass", count),
        patch.object(torch.distributed, "is_nccl_available", lambda: True),
        symmetric_memory._test_mode(),
        torch._inductor.config.patch(_micro_pipeline_tp=True, fx_graph_cache=False),
    ):
        called = torch.compile(model, fullgraph=True)
        called(input_ids=of_length(8).input_ids, use_cache=False).logits.sum().backward()
    return found


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
def test_async_tp():
    """Guards: a copy, a view or a pad between a collective and the products around it, past which Inductor's pass finds nothing
    to overlap. Forward, all of a layer is fused: q, k and v read one gather, gate and up another. Backward, the gathers are
    fused with the products behind them; in front of a reduce-scatter stands a sum of several products, which the pass leaves.
    """
    with fake_rank(2):
        (forward, backward), (forward_of_two, backward_of_two) = (fused(split("llama", num_hidden_layers=n)) for n in (1, 2))
    assert forward_of_two - forward == {"gather and 3 products": 1, "gather and 2 products": 1, "product and reduce-scatter": 2}
    assert backward_of_two - backward == {"gather and 1 products": 2, "reduce_scatter_tensor.default": 2}
