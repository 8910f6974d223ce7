"""`shardwise.verify` from its arguments to its result: which processes run, and in which order."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from shardwise.errors import MeshError, ShardwiseError, describe
from shardwise.hf import build_on_meta
from shardwise.launch import launched, run_as_ranks
from shardwise.layers.registry import registered_style
from shardwise.mesh import tp_mesh
from shardwise.plan import Plan
from shardwise.planning import make_plan
from shardwise.quiet import quiet
from shardwise.rendezvous import meet_ranks
from shardwise.sequence import with_sequence
from shardwise.verify.judge import before_ranks, verify_on_ranks, with_proof
from shardwise.verify.load import import_styles
from shardwise.verify.one import in_own_process
from shardwise.verify.proven import prove_plan
from shardwise.verify.result import Verification
from shardwise.verify.settings import Settings

_RESULT = "result.json"
_MOST_PARAMETERS = 200_000_000


def verify(
    model: str | os.PathLike[str] | PreTrainedModel,
    tp_size: int | None = None,
    *,
    tp_plan: str | Mapping[str, str] = "auto",
    ep_size: int | None = None,
    dtype: torch.dtype | str = torch.float32,
    compile: bool = False,
    layers: int | None = None,
    random: bool = False,
    sequence_parallel: bool = False,
    overlap: bool = False,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
    batch: int = 2,
    sequence: int = 12,
    micro_batches: int = 3,
    new_tokens: int = 8,
    seed: int = 0,
    imports: Sequence[str] = (),
    timeout: float = 900.0,
    on_proof: Callable[[Verification], None] | None = None,
) -> Verification:
    """Compare a model on several ranks with the same model in one process, and find where they first differ.

        result = shardwise.verify("path/to/model", tp_size=2)
        assert result.passed, result

    First the plan is proven in one process, see `shardwise.prove`; a wrong one is a finding like others, and the ranks run all
    the same. Compared are logits and loss of each micro-batch, every gradient after each of them (they accumulate), greedy
    tokens, what `save_pretrained` writes, and what the ranks hold in common. Starts its own ranks; where torchrun has started
    this process, these are the ranks, every one must make the call, and each gets the result. The one process always is one of
    its own, so that no process holds more than its part beside the gathered gradients of the first rank.

    Args:
        model: a directory, a hub id, with `random` a model type; or an ordinary transformers model in memory.
        tp_size: ranks on the tp axis; by default those of torchrun, else 2.
        tp_plan: `"auto"`, `"infer"`, or a dict of pattern: style, merged over the model's own plan.
        ep_size: ranks to which experts are dealt.
        dtype: of weights and activations. In less than float32, bounds are multiples of one process's own rounding error.
        compile: the ranks train through `torch.compile`.
        layers: keep this many layers only, with random weights.
        random: a type's tiny model, with random weights; of a directory or hub id, its own sizes with random weights.
        sequence_parallel, overlap: as in `from_pretrained`.
        inputs: the micro-batches, each a dict of tensors that the model is called with; by default random ids.
        batch, sequence, micro_batches, seed: of these random ids.
        new_tokens: how many are generated.
        imports: modules, or files that end in .py, that register parallel styles, for the processes that are started. Modules
            in which styles were registered in this process are among them by themselves.
        timeout: seconds until ranks that still run are ended.
        on_proof: is called before ranks start, with what is known by then: the facts and the proof; under torchrun on the
            first rank.

    Raises `PlanError` for a plan that cannot be carried out, other `ShardwiseError`s for a model that is not there, and
    `WorkerError` for a rank that failed in a way that is no finding. What differs is no error: see `Verification`.
    """
    with tempfile.TemporaryDirectory(prefix="shardwise-verify-") as folder:
        given = _set_aside(model, Path(folder)) if isinstance(model, PreTrainedModel) else os.fspath(model)
        settings = Settings(
            given,
            random=random,
            layers=layers,
            tp=_size(tp_size, ep_size),
            ep=ep_size,
            plan=tp_plan if isinstance(tp_plan, str) else dict(tp_plan),
            dtype=str(dtype).removeprefix("torch."),
            compiled=compile,
            sequence_parallel=sequence_parallel,
            overlap=overlap,
            batch=batch,
            sequence=sequence,
            micro_batches=micro_batches,
            new_tokens=new_tokens,
            seed=seed,
            inputs=_inputs_file(inputs, Path(folder)),
            imports=tuple(imports),
            folder=folder,
            timeout=timeout,
        )
        with quiet():
            run = _as_rank if launched() or dist.is_initialized() else _with_own_ranks
            return run(settings, on_proof or (lambda found: None))


def check(settings: Settings) -> tuple[nn.Module, Plan]:
    """Raise what is wrong with the settings, before any process is started or any weight is read. The model on meta, and its
    plan.
    """
    import_styles(settings)
    settings.check_dtype()
    if settings.world < 2:
        raise MeshError(f"tp_size={settings.tp}: one rank would be compared with itself. Two or more are needed.")
    subject = settings.subject()
    model = build_on_meta(subject.config)
    _check_tiny(settings, model)
    table = make_plan(model, settings.tp, settings.plan, ep_size=settings.ep)
    if settings.sequence_parallel:
        with_sequence(model, table)
    return model, table


def _proven(settings: Settings, model: nn.Module, table: Plan, on_proof: Callable[[Verification], None]) -> Verification:
    """What is known before ranks start."""
    began = time.monotonic()
    proof = prove_plan(settings, model, table)
    known = before_ranks(settings, table, proof)
    on_proof(known)
    return replace(known, seconds=time.monotonic() - began)


def run_rank(settings: Settings) -> Verification:
    """One rank's part; the result is the same on all. Collective."""
    import_styles(settings)
    began = time.monotonic()
    tp_mesh(settings.tp, None, settings.ep)
    if dist.get_rank() == 0:
        in_own_process(settings, "one")
        if settings.torch_dtype not in (torch.float32, torch.float64):
            in_own_process(settings, "exact")
    meet_ranks(range(dist.get_world_size()), "verify: the numbers of one process", settings.timeout)
    result = verify_on_ranks(settings)
    shared = [replace(result, seconds=time.monotonic() - began) if result is not None else None]
    dist.broadcast_object_list(shared, 0)
    assert shared[0] is not None
    return shared[0]


def leave_result(settings: Settings, result: Verification) -> None:
    """For the process that has started the ranks."""
    (Path(settings.folder) / _RESULT).write_text(result.to_json(), encoding="utf-8")


def _with_own_ranks(settings: Settings, on_proof: Callable[[Verification], None]) -> Verification:
    known = _proven(settings, *check(settings), on_proof)
    settings = replace(settings, styles=_styles(settings))
    command = [sys.executable, "-m", "shardwise.verify", "rank", settings.to_json()]
    run_as_ranks(command, settings.world, timeout=settings.timeout, environment=_devices(settings.world), show=False)
    result = Verification.from_json((Path(settings.folder) / _RESULT).read_text(encoding="utf-8"))
    return with_proof(settings, result, known)


def _as_rank(settings: Settings, on_proof: Callable[[Verification], None]) -> Verification:
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if world != settings.world:
        raise MeshError(
            describe(
                f"{settings.world} ranks were asked for, and {world} processes have been started.",
                either=[f"tp_size={world}, or", f"torchrun --nproc-per-node {settings.world}"],
            )
        )
    tp_mesh(settings.tp, None, settings.ep)
    shared = [settings]
    dist.broadcast_object_list(shared, 0)  # the first rank's folder, with what is in it, which all see on one host
    model, table = check(shared[0])
    known = [_proven(shared[0], model, table, on_proof) if dist.get_rank() == 0 else None]
    result = run_rank(shared[0])
    dist.broadcast_object_list(known, 0)
    dist.barrier()  # the first rank takes the folder away
    assert known[0] is not None
    return with_proof(shared[0], result, known[0])


def _size(tp_size: int | None, ep_size: int | None) -> int:
    if tp_size is not None:
        return tp_size
    return int(os.environ["WORLD_SIZE"]) if launched() and ep_size is None else 2


def _check_tiny(settings: Settings, model: nn.Module) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if settings.random and settings.model in CONFIG_MAPPING and parameters > _MOST_PARAMETERS:
        raise ShardwiseError(
            describe(
                f"{settings.model}: no tiny sizes of this type are known, and its default ones make {parameters:,} parameters.",
                either=["a directory with a config.json of your own and --random, or", "fewer layers: --layers"],
            )
        )


def _set_aside(model: PreTrainedModel, folder: Path) -> str:
    if launched() and os.environ["RANK"] != "0":
        return str(folder)
    model.save_pretrained(folder / "given")
    return str(folder / "given")


def _inputs_file(inputs: Sequence[Mapping[str, Tensor]] | None, folder: Path) -> str | None:
    if inputs is None:
        return None
    torch.save([{name: tensor.cpu() for name, tensor in feed.items()} for feed in inputs], folder / "inputs.pt")
    return str(folder / "inputs.pt")


def _styles(settings: Settings) -> tuple[tuple[str, str, str], ...]:
    """Name, module and class of each registered style that the plan names. Raises `ShardwiseError` for one of a script."""
    rules = settings.plan if isinstance(settings.plan, dict) else {}
    found = {name: style for name in rules.values() if (style := registered_style(name)) is not None}
    if lost := next((name for name, style in found.items() if style.__module__ == "__main__"), None):
        raise ShardwiseError(
            describe(
                f"The style {lost!r} is a class of the script that runs, which the ranks cannot import.",
                either=["move the class to a module, or", "start the script with torchrun"],
            )
        )
    return tuple((name, style.__module__, style.__qualname__) for name, style in found.items())


def _devices(ranks: int) -> dict[str, str]:
    """Each rank on an accelerator of its own, or all on CPUs."""
    if torch.accelerator.is_available() and torch.accelerator.device_count() >= ranks:
        return {}
    return {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
