"""Every collective written down, and breakpoints at them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.modules.module as hooks
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

import shardwise
from llamas import IDS, TINY
from on_ranks import world
from shardwise.debug import CollectiveTrace

LAYERS = 2
FORWARD = [("all_reduce", "self_attn.o_proj", ""), ("all_reduce", "mlp.down_proj", "")]
BACKWARD = [
    ("all_reduce", "mlp.gate_proj", ""),
    ("all_reduce", "self_attn.k_norm", "weight"),
    ("all_reduce", "self_attn.q_norm", "weight"),
    ("all_reduce", "self_attn.q_proj", ""),
]


def qwen3() -> PreTrainedModel:
    """Parallel, on a rank; with norms of q and k, whose gradients are summed by parameter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**TINY, head_dim=8))
    shardwise.parallelize(model, world("tp"))
    return model.train()


def step(model: nn.Module) -> Tensor:
    """Forward and backward, twice: the second must be told from the first."""
    for _ in range(2):
        loss: Tensor = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    return loss.detach()


def expected() -> list[tuple[str, str, str, str]]:
    """Phase, collective, module and parameter, in order."""
    layers = [f"model.layers.{index}" for index in range(LAYERS)]
    forward = [("forward", op, f"{layer}.{name}", p) for layer in layers for op, name, p in FORWARD]
    backward = [("backward", op, f"{layer}.{name}", p) for layer in reversed(layers) for op, name, p in BACKWARD]
    one = [
        ("forward", "all_reduce", "model.embed_tokens", ""),
        *forward,
        ("forward", "all_gather", "lm_head", ""),
        ("backward", "all_reduce", "lm_head", ""),
        *backward,
    ]
    return one * 2


def _trace_step(recompute: bool = False) -> tuple[CollectiveTrace, bool]:
    model = qwen3()
    plain = step(model)
    model.zero_grad()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with shardwise.trace_collectives() as trace:
        traced = step(model)
    length = len(trace)
    step(model)
    return trace, bool(torch.equal(plain, traced)) and len(trace) == length


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_a_training_step(backend, pool2, shm2):
    """Guards: a collective left out, seen twice, or given to another module or phase; another result than without.

    torch shows dispatch modes the collectives of gloo's groups, and not those of a group that is written in Python.
    """
    first, second = {"gloo": pool2, "shm": shm2}[backend].run(_trace_step)
    for trace, same in (first, second):
        assert same
        found = [(one.phase, one.op, one.module, one.parameter) for one in trace]
        # q_norm and k_norm are independent of each other in backward.
        assert Counter(found) == Counter(expected())
        assert [one for one in found if not one[3]] == [one for one in expected() if not one[3]]
        layer = next(one for one in trace if one.module.endswith("o_proj"))
        assert (layer.shape, layer.dtype, layer.bytes, layer.ranks) == ((2, 12, 32), "float32", 2 * 12 * 32 * 4, (0, 1))
        norm = next(one for one in trace if one.parameter)
        assert (norm.shape, norm.bytes, norm.tensor) == ((8,), 32, "weight")
        assert all(0 < one.seconds < 30 for one in trace)
    assert not first[0].diff(second[0])


def test_activation_checkpointing(pool2):
    """Guards: what is computed again taken for backward, or for another forward."""
    trace, same = pool2.run(_trace_step, True)[0]
    assert same
    again = [one.module for one in trace if one.phase == "recompute"]
    assert again == [f"model.layers.{layer}.self_attn.o_proj" for layer in (1, 0)] * 2
    others = [(one.phase, one.op, one.module, one.parameter) for one in trace if one.phase != "recompute"]
    assert Counter(others) == Counter(expected())


def _compiled() -> tuple[CollectiveTrace, CollectiveTrace]:
    model = qwen3()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with shardwise.trace_collectives() as eager:
        step(model)
    step(compiled)
    with shardwise.trace_collectives() as traced:
        step(compiled)
    return eager, traced


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_compiled_code(backend, pool2, shm2):
    """Guards: collectives of compiled code that nobody sees, or that are seen twice, or a graph that breaks because of it."""
    eager, traced = {"gloo": pool2, "shm": shm2}[backend].run(_compiled)[0]
    kinds = [Counter((one.phase, one.op, one.shape) for one in trace) for trace in (eager, traced)]
    assert kinds[0] == kinds[1]


def _modes_and_hooks() -> int:
    return len(_get_current_dispatch_mode_stack()) + sum(
        len(table)
        for table in (hooks._global_forward_hooks, hooks._global_forward_pre_hooks, hooks._global_forward_hooks_always_called)
    )


def _failing() -> tuple[int, int, list[str]]:
    model = qwen3()
    before = _modes_and_hooks()
    with pytest.raises(ZeroDivisionError), shardwise.trace_collectives():
        raise ZeroDivisionError
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: 1 // 0)
    with shardwise.trace_collectives() as trace:
        with pytest.raises(ZeroDivisionError):
            step(model)
        handle.remove()
        step(model)
    return before, _modes_and_hooks(), [one.module for one in trace]


def test_failures(pool2):
    """Guards: something left on behind a block that failed; modules that failed taken for those that run."""
    before, after, modules = pool2.run(_failing)[0]
    assert before == after == 0
    tail = [module for _, _, module, _ in expected()]
    assert Counter(modules[-len(tail) :]) == Counter(tail)


def test_json(pool2, tmp_path):
    """Guards: a trace that is not what it was when it is read again."""
    trace = pool2.run(_trace_step)[0][0]
    trace.save(tmp_path / "trace.json")
    assert CollectiveTrace.load(tmp_path / "trace.json").records == trace.records


def test_the_table(pool2):
    """Guards: a row for each of a hundred equal layers; a layer that differs hidden among those that don't."""
    trace = pool2.run(_trace_step)[0][0]
    text = str(trace)
    assert "model.layers.0, and 1 more that do the same\n" in text
    assert text.count("self_attn.o_proj") == 1
    assert f"{len(trace)} collectives" in text
    odd = CollectiveTrace([one for one in trace if one.module != "model.layers.1.mlp.down_proj"])
    assert str(odd).count("self_attn.o_proj") == 2


def test_differences(pool2):
    """Guards: a missing call or another shape not found, or found at another place."""
    trace = pool2.run(_trace_step)[0][0]
    fewer = CollectiveTrace([*trace.records[:3], *trace.records[4:]])
    difference = trace.diff(fewer)
    assert difference
    assert str(difference).startswith(f"The first difference is at collective 3: {trace.records[3]} here, nothing there.")
    assert str(trace.diff(trace)) == "No difference."


def _stops(module: str, **which: object) -> tuple[list[str], list[str]]:
    """Where it stopped in the block, and after a call without one had been removed."""
    model = qwen3()
    seen: list[str] = []
    before = sys.breakpointhook
    sys.breakpointhook = lambda: seen.append(sys._getframe(2).f_locals["found"].phase)
    try:
        with shardwise.break_on(module, **which):
            step(model)
        inside = list(seen)
        stop = shardwise.break_on(module, **which)
        stop.remove()
        step(model)
        return inside, seen[len(inside) :]
    finally:
        sys.breakpointhook = before


@pytest.mark.parametrize(
    ("module", "which", "phases"),
    [
        ("*.o_proj", {"op": "all_reduce"}, ["forward"] * 4),
        ("*.0.*", {"phase": "backward"}, ["backward"] * 8),
        ("*.q_proj", {"rank": None}, ["backward"] * 4),
        ("*.o_proj", {"op": "all_gather"}, []),
        ("lm_head", {}, ["forward", "backward"] * 2),
    ],
)
def test_breakpoints(module, which, phases, pool2):
    """Guards: a breakpoint that does not stop, stops elsewhere or on other ranks, or cannot be removed."""
    first, second = pool2.run(_stops, module, **which)
    assert first == (phases, [])
    assert second == (phases if "rank" in which else [], [])


@pytest.mark.parametrize("wrong", [{"op": "allreduce"}, {"phase": "back"}])
def test_a_breakpoint_that_could_never_stop(wrong):
    """Guards: a misspelt word that waits for ever."""
    with pytest.raises(shardwise.ShardwiseError, match=r"there is none of that name(.|\n)*known"):
        shardwise.break_on("*", **wrong)
    assert _modes_and_hooks() == 0


def _out_of_order() -> tuple[int, int, int, int]:
    model = qwen3()
    first, second = shardwise.break_on("nothing"), shardwise.break_on("nothing either")
    with shardwise.trace_collectives() as trace:
        first.remove()
        step(model)
        second.remove()
        one = len(trace)
    between = _modes_and_hooks()
    step(model)
    return one, len(trace), between, second.hits


def test_they_end_in_any_order(pool2):
    """Guards: a breakpoint that is removed while a trace runs, and takes the trace with it, or stays for good."""
    length = len(expected())
    assert pool2.run(_out_of_order) == [(length, length, 0, 0)] * 2


PROGRAM = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM
import shardwise
from llamas import IDS, TINY
from shardwise.testing.fake import fake_rank

with fake_rank(2):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = shardwise.parallelize(LlamaForCausalLM(LlamaConfig(**TINY)), mesh)
    shardwise.break_on("model.layers.1.mlp.gate_proj", op="all_reduce")
    model(input_ids=IDS, labels=IDS).loss.backward()
    print("went on")
"""


SHARED_MEMORY = """
import torch
import torch.distributed as dist
import shardwise
from shardwise.shm import register

register()
dist.init_process_group("cpu:shm", rank=0, world_size=1, store=dist.HashStore())

def ours(x):
    dist.all_reduce(x)

shardwise.break_on()
ours(torch.zeros(5))
print("went on")
"""


def debugged(program: str, commands: str) -> str:
    """What the program and pdb write, which is given these commands."""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        input=commands,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_debugger_in_a_group_of_ours():
    """Guards: a prompt inside of the group that exchanges through shared memory."""
    shown = debugged(SHARED_MEMORY, "p tuple(x.shape)\nc\n")
    assert "rank 0: forward all_reduce of float32 (5,), outside of any module" in shown
    assert "(Pdb) (5,)" in shown
    assert shown.rstrip().endswith("went on")


def test_the_debugger():
    """Guards: a prompt inside of our own watching, where the tensor is not to be seen."""
    shown = debugged(PROGRAM, "p tuple(x.shape)\nwhere\nc\n")
    assert "rank 0: backward all_reduce of float32 (2, 12, 32), model.layers.1.mlp.gate_proj" in shown
    assert "(Pdb) (2, 12, 32)" in shown
    assert "collectives.py" in shown
    assert "CopyToTP" in shown or "backward()" in shown
    assert shown.rstrip().endswith("went on")
