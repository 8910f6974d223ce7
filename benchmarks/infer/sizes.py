"""`python -m benchmarks.infer.sizes`: infer a plan for models of some seven billion parameters, and write sizes.json and
sizes.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.utils import logging

from benchmarks.infer.__main__ import ROOT
from shardwise.hf import build_on_meta, elements
from shardwise.infer import cut_share, infer, prove

MODELS: Mapping[str, tuple[str, Mapping[str, object]]] = MappingProxyType(
    {
        "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_head": 25, "n_layer": 48}),
        "gpt-neox-20b": ("gpt_neox", {}),
        "llama-3-8b": (
            "llama",
            {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192},
        ),
        "llama-3-70b": (
            "llama",
            {
                "hidden_size": 8192,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "intermediate_size": 28672,
                "vocab_size": 128256,
            },
        ),
        "falcon-7b": ("falcon", {}),
        "mpt-7b": ("mpt", {"d_model": 4096, "n_heads": 32, "n_layers": 32}),
        "bloom-7b1": ("bloom", {"hidden_size": 4096, "n_head": 32, "n_layer": 30}),
        "gpt-j-6b": ("gptj", {}),
        "opt-6.7b": (
            "opt",
            {
                "hidden_size": 4096,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "ffn_dim": 16384,
                "word_embed_proj_dim": 4096,
            },
        ),
        "mixtral-8x7b": ("mixtral", {}),
        "mamba-2.8b": ("mamba", {"hidden_size": 2560, "num_hidden_layers": 64}),
        "mamba2-2.7b": (
            "mamba2",
            {"hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80, "n_groups": 1, "vocab_size": 50288},
        ),
        "falcon-mamba-7b": ("falcon_mamba", {"hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 65024}),
        "rwkv-7b": ("rwkv", {}),
        "recurrentgemma-2b": ("recurrent_gemma", {}),
        "recurrentgemma-9b": (
            "recurrent_gemma",
            {
                "hidden_size": 4096,
                "lru_width": 4096,
                "intermediate_size": 24576,
                "num_attention_heads": 16,
                "num_hidden_layers": 38,
            },
        ),
        "qwen3-next-80b": ("qwen3_next", {}),
        "deepseek-v3-671b": ("deepseek_v3", {}),
        "bert-large": (
            "bert",
            {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        ),
    }
)
"""Names of models, their types, and what their configs say beside the type's defaults."""


@dataclass(frozen=True)
class Found:
    """What was found of a model.

    Args:
        elements: of all its parameters.
        seconds: that inference took, proof included, on one thread.
        cpu: seconds that the process computed in it; the others are those in which it waited for a core.
        prove_cpu: the same of `shardwise.prove` of the plan, as of one that came from elsewhere.
        peak: MiB of memory that the process held at most.
        before: MiB that it held before.
        share: of the elements, those that are cut; None without a plan.
        outputs: the largest error of the proof.
        gradients: the largest of gradients.
        tried: on what it was proven.
        note: what stays whole, and why; or why there is no plan.
    """

    elements: int
    seconds: float
    cpu: float
    prove_cpu: float
    peak: int
    before: int
    share: float | None
    outputs: float
    gradients: float
    tried: str
    note: str


def main() -> None:
    """Measure one model after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.infer.sizes", description=__doc__)
    parser.add_argument("models", nargs="*", help="some of the models; all by default")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results" / "infer")
    parser.add_argument("--tp", type=int, default=2, help="ranks")
    arguments = parser.parse_args()
    path = arguments.folder / "sizes.json"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text())["models"] if arguments.models and path.exists() else {}
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "tp": arguments.tp}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.models or MODELS:
        results[name] = asdict(found := run(name, arguments.tp))
        print(f"{name}: {found}", flush=True)
        results = {name: results[name] for name in MODELS if name in results}
        path.write_text(json.dumps({**facts, "models": results}, indent=1) + "\n")
        (arguments.folder / "sizes.md").write_text(page(results, facts))


def run(name: str, size: int) -> Found:
    """What is found of a model, by a process of its own."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_send, args=(theirs, name, size))
    process.start()
    theirs.close()
    try:
        found: Found = ours.recv()
    except EOFError:
        found = Found(0, 0.0, 0.0, 0.0, 0, 0, None, 0.0, 0.0, "", "its process ended")
    process.join()
    return found


def _send(connection: Connection, name: str, size: int) -> None:
    torch.set_num_threads(1)
    connection.send(measure(name, size))


def measure(name: str, size: int) -> Found:
    """Of a model on `size` ranks."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    kind, fields = MODELS[name]
    model = build_on_meta(AutoConfig.for_model(kind, **fields))
    before, started, computed = _held(), time.perf_counter(), time.process_time()
    note = ""
    try:
        found = infer(model, size)
    except Exception as error:
        found, note = None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    seconds, cpu = time.perf_counter() - started, time.process_time() - computed
    peak, computed = _held(), time.process_time()
    if found is None:
        return Found(elements(model), seconds, cpu, 0.0, peak, before, None, 0.0, 0.0, "", note)
    proof = prove(found.plan, model)
    left = "; ".join(f"{name}: {why}" for name, why in found.left.items())
    return Found(
        elements(model),
        seconds,
        cpu,
        time.process_time() - computed,
        peak,
        before,
        cut_share(found.plan),
        proof.outputs,
        proof.gradients,
        proof.tried,
        left,
    )


def _held() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def page(results: Mapping[str, Mapping[str, Any]], facts: Mapping[str, object]) -> str:
    """The results as Markdown."""
    return "\n".join(
        [
            "# Plans inferred at real sizes",
            "",
            str(dict(facts)),
            "",
            "From the config, without weights, on one thread; one layer of each kind is tried out, at its full width. CPU:",
            "seconds computed by the process, imports left out. Wall: seconds that passed, on two cores that others used, too.",
            "Prove: `shardwise.prove` of the plan. Peak: memory of the process, some 400 MiB of it torch and transformers.",
            "",
            "| model | billions | cut | CPU s | wall s | prove, CPU s | peak MiB | outputs | gradients | tried | stays whole |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---|",
            *(_row(name, found) for name, found in results.items()),
            "",
        ]
    )


def _row(name: str, one: Mapping[str, Any]) -> str:
    cells = [name, f"{one['elements'] / 1e9:.1f}", _share(one)]
    cells += [f"{one[key]:.1f}" for key in ("cpu", "seconds", "prove_cpu")]
    cells += [f"{one['peak']:,}", f"{one['outputs']:.0e}", f"{one['gradients']:.0e}"]
    return f"| {' | '.join([*cells, one['tried'].split(' at ')[0], one['note'][:120]])} |"


def _share(one: Mapping[str, Any]) -> str:
    return "-" if one["share"] is None else f"{one['share']:.0%}"


if __name__ == "__main__":
    main()
