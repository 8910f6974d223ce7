"""One rank's step on fake tensors: what it would hold, and what it would send, without memory and without other ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedConfig

from shardwise.api import parallelize
from shardwise.debug.operators import Call
from shardwise.debug.record import Collective
from shardwise.debug.watch import Watch
from shardwise.errors import MeshError, SimulationError, describe
from shardwise.estimate.attention import attention_of
from shardwise.estimate.fakes import fakes
from shardwise.estimate.flow import Flow, Node
from shardwise.estimate.live import Live, Moment, bytes_of
from shardwise.estimate.step import Step
from shardwise.hf import build_on_meta, checkpoint_activations
from shardwise.planning import PlanLike
from shardwise.testing.fake import fake_rank


@dataclass(frozen=True)
class Setting:
    """Which model on how many ranks; as the arguments of `shardwise.parallelize`."""

    config: PreTrainedConfig
    tp_size: int
    plan: PlanLike = "auto"
    ep_size: int | None = None
    sequence_parallel: bool = False


@dataclass(frozen=True)
class Simulation:
    """What a step took on the first rank, which holds as much as any.

    Attributes:
        model: the class of the model.
        held: bytes of this rank's parameters, by name, each tied one once.
        buffers: bytes of its buffers.
        gradients: bytes of all gradients after backward.
        cache: bytes of the KV cache, or of another state that generation carries on.
        peaks: the moment of the most bytes besides parameters and buffers, of "forward" and of "backward".
        kernels: the fused attention kernels that ran.
        collectives: in order.
        flows: of a layer of each kind, what happens in its forward.
    """

    model: str
    held: Mapping[str, int]
    buffers: int
    gradients: int
    cache: int
    peaks: Mapping[str, Moment]
    kernels: tuple[str, ...]
    collectives: tuple[Collective, ...]
    flows: Mapping[str, tuple[Node, ...]]


def simulate(setting: Setting, step: Step, layers: Sequence[str] = ()) -> Simulation:
    """Run `step` as the first of the ranks of `setting`, on a process group of its own that is gone afterwards.

    Args:
        layers: paths of those whose flow is recorded.

    Raises:
        PlanError: the plan can't be carried out.
        MeshError: this process has a default process group already.
        SimulationError: the model's code asks for what fake tensors can't say.
    """
    _refuse_process_group()
    with torch.random.fork_rng(devices=[]), fake_rank(max(setting.tp_size, setting.ep_size or 1)):
        model = build_on_meta(setting.config).train(step.training)
        mesh = _mesh(setting)
        parallelize(
            model, mesh, setting.plan, ep_size=setting.ep_size, sequence_parallel=setting.sequence_parallel and mesh.size() > 1
        )
        try:
            with fakes(), attention_of(step.device):
                return _run(model, step, layers)
        except Exception as error:  # whatever a model's own code may raise when it gets no values
            raise SimulationError(
                describe(
                    f"{type(model).__name__}: a step can't be simulated: the model's code stops on tensors without values.",
                    where=_where(error),
                    why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}",
                )
            ) from error


def _refuse_process_group() -> None:
    if dist.is_initialized():
        raise MeshError(
            describe(
                "A step can't be simulated here: this process is one of several already, and the simulation would need "
                "its default process group.",
                either=["call it before the process group is started, or", "run `shardwise plan` in a process of its own"],
            )
        )


def _mesh(setting: Setting) -> DeviceMesh:
    tp, ep = setting.tp_size, max(setting.tp_size, setting.ep_size or 1)
    if ep > tp:
        return init_device_mesh("cpu", (ep // tp, tp), mesh_dim_names=("dp", "tp"))["tp"]
    group = dist.group.WORLD
    assert group is not None
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))


def _run(model: nn.Module, step: Step, layers: Sequence[str]) -> Simulation:
    _leave_meta(model)
    if step.checkpointing:
        checkpoint_activations(model)
    ids = torch.zeros(step.batch, step.sequence, dtype=torch.long)
    parameters = dict(model.named_parameters())
    live = Live([*parameters.values(), *model.buffers(), ids])
    found: list[Collective] = []

    def seen(collective: Collective, _: Call, run: Callable[[], Any]) -> Any:
        found.append(collective)
        return run()

    flow = Flow(model, layers)
    with live, Watch(seen), flow, _gradients_seen(model, live):
        cache = _train(model, ids, live) if step.training else _prefill(model, ids, live)
        return Simulation(
            model=type(model).__name__,
            held={name: tensor.nbytes for name, tensor in parameters.items()},
            buffers=bytes_of(model.buffers()),
            gradients=bytes_of(p.grad for p in parameters.values() if p.grad is not None),
            cache=cache,
            peaks=dict(live.peaks),
            kernels=tuple(sorted(live.kernels)),
            collectives=tuple(found),
            flows=flow.graphs,
        )


def _leave_meta(model: nn.Module) -> None:
    """Put every parameter and buffer where the fake tensors are; tied ones stay tied, which `to_empty` doesn't do."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        groups: list[dict[str, Any]] = [module._parameters, module._buffers]
        for group in groups:
            for name, tensor in group.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty_like(tensor, device="cpu")
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
                if tensor is not None:
                    group[name] = made[id(tensor)]


def _train(model: nn.Module, ids: Tensor, live: Live) -> int:
    live.phase = "forward"
    loss = _loss(model, ids)
    live.phase = "backward"
    loss.backward()
    return 0


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's own, or a sum where it has none. What else it gives, the logits among it, is let go of."""
    output = model(**_accepted(model, input_ids=ids, labels=ids, use_cache=False))
    loss: Tensor | None = getattr(output, "loss", None)
    return output[0].float().sum() if loss is None else loss


def _prefill(model: nn.Module, ids: Tensor, live: Live) -> int:
    live.phase = "forward"
    with torch.no_grad():
        output = model(**_accepted(model, input_ids=ids, use_cache=True, logits_to_keep=1))
    caches = [getattr(output, name, None) for name in ("past_key_values", "cache_params")]
    return bytes_of(tensor for cache in caches for tensor in _tensors_in(cache, set()))


def _accepted(model: nn.Module, **wanted: Any) -> dict[str, Any]:
    """Of `wanted`, what the model's forward has a name for; the cache also where it takes any keyword."""
    kinds = {name: parameter.kind for name, parameter in inspect.signature(model.forward).parameters.items()}
    if inspect.Parameter.VAR_KEYWORD in kinds.values():
        kinds["use_cache"] = inspect.Parameter.KEYWORD_ONLY
    return {name: value for name, value in wanted.items() if name in kinds}


def _tensors_in(value: object, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in a cache, whichever class it has: those in its attributes, lists and tuples."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(one, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module, PreTrainedConfig)):
        for one in vars(value).values():
            yield from _tensors_in(one, seen)


@contextmanager
def _gradients_seen(model: nn.Module, live: Live) -> Iterator[None]:
    handles = [p.register_post_accumulate_grad_hook(live.is_gradient) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _where(error: BaseException) -> str:
    """The last line of the model's own code that `error` came through."""
    found, trace = "", error.__traceback__
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", ""))
        if name.startswith("transformers.models."):
            found = f"{name.rpartition('.')[2]}.py, line {trace.tb_lineno}, in {trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return found or "outside of the model's own code"
