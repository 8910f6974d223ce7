"""No DTensor: whatever a parallel model holds, computes and saves is a plain `torch.Tensor`, and our sources do not know
the class.
"""

from __future__ import annotations

import ast
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor  # noqa: TID251 (to see that nobody makes one)
from torch.utils._pytree import tree_leaves

import shardwise
from models import batches, checkpoint

SOURCES = Path(shardwise.__file__).parent
FORBIDDEN = ("torch.distributed.tensor", "torch.distributed._tensor")


def whole_life(path: Path, saved: Path, mistake: bool = False) -> None:
    """On a rank: load, train, clip, step, generate, save, with a DTensor's constructor that raises. `mistake` makes one."""
    seen: list[object] = []

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a DTensor was made")

    def look(module: nn.Module, inputs: object, keywords: object, output: object) -> None:
        seen.extend(tree_leaves((inputs, keywords, dict(output) if hasattr(output, "items") else output)))

    with patch.object(DTensor, "__new__", refuse):
        model = shardwise.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, tp_plan="auto").train()
        if mistake:
            DTensor.from_local(torch.ones(2), model._shardwise.mesh)
        for module in model.modules():
            module.register_forward_hook(look, with_kwargs=True)
        optimizer = torch.optim.AdamW(model.parameters())
        batches()[0].loss(model).backward()
        seen += [p.grad for p in model.parameters()]
        shardwise.clip_grad_norm_(model, 1.0)
        optimizer.step()
        seen += [tensor for state in optimizer.state.values() for tensor in state.values()]
        model.eval().generate(batches()[0].input_ids, max_new_tokens=2, do_sample=False)
        model.save_pretrained(saved)
        seen += [shardwise.full_state_dict(model), shardwise.full_gradients(model)]
    tensors = [value for value in tree_leaves(seen) if isinstance(value, Tensor)]
    assert len(tensors) > 100
    assert {type(tensor) for tensor in tensors} <= {Tensor, nn.Parameter}
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}
    assert {type(tensor.data) for tensor in (*model.parameters(), *model.buffers())} == {Tensor}


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_every_tensor_is_plain(name, pool2, tmp_path_factory):
    """Guards: a DTensor, or another subclass (a lazy tensor left over from loading), in a parameter, gradient, activation
    or state.
    """
    pool2.run(whole_life, checkpoint(tmp_path_factory, name), tmp_path_factory.mktemp("plain"))


def test_a_dtensor_would_be_seen(pool2, tmp_path_factory):
    """Guards the test above: a constructor that torch does not call."""
    with pytest.raises(RuntimeError, match="a DTensor was made"):
        pool2.run(whole_life, checkpoint(tmp_path_factory, "llama"), tmp_path_factory.mktemp("plain"), mistake=True)


def imports(source: str) -> set[str]:
    """Every module that a source imports, or may: `from a import b` names both a and a.b. Dotted uses count too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return found


def uses_dtensor(source: str) -> bool:
    """Whether a source imports DTensor's package, or names something in it."""
    return any(f"{name}.".startswith(f"{forbidden}.") for name in imports(source) for forbidden in FORBIDDEN)


PEER = SOURCES / "profiling" / "dtensor.py"
"""It builds what a profile compares with: torch's own tensor parallelism, which is of DTensors."""


@pytest.mark.parametrize("file", sorted({*SOURCES.rglob("*.py")} - {PEER}), ids=lambda file: str(file.relative_to(SOURCES)))
def test_no_source_imports_dtensor(file):
    """Guards: a helper borrowed from `torch.distributed.tensor`, by which DTensor would come back."""
    assert not uses_dtensor(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed.tensor",
        "import torch.distributed.tensor.parallel as tp",
        "from torch.distributed import tensor",
        "from torch.distributed.tensor import Shard",
        "def f():\n    from torch.distributed._tensor import DTensor",
        "import torch\ntorch.distributed.tensor.zeros(2)",
    ],
)
def test_every_spelling_of_the_import_is_found(source):
    """Guards the scan of the sources."""
    assert uses_dtensor(source)
    assert not uses_dtensor("from torch.distributed.device_mesh import DeviceMesh\nfrom torch import Tensor")


def test_the_peer_is_nobody_elses():
    """Guards: the one file that may name DTensor, used by more than the list of who is profiled."""
    users = [file.name for file in SOURCES.rglob("*.py") if "shardwise.profiling.dtensor" in imports(file.read_text())]
    assert uses_dtensor(PEER.read_text(encoding="utf-8"))
    assert users == ["contenders.py"]
