"""`ShmGroup`: a `dist.ProcessGroup` whose collectives on CPU tensors go through shared memory.

What it does not do itself (tensors on other devices) an inner group does, with the backends that were asked for beside "shm".
"""

from __future__ import annotations

# torch's stub gives each method the overloads of a caller; c10d itself only makes the calls that are defined here.
# mypy: disable-error-code="override, assignment"
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceCoalescedOptions,
    AllreduceOptions,
    AllToAllOptions,
    Backend,
    BarrierOptions,
    BroadcastOptions,
    GatherOptions,
    ReduceOptions,
    ReduceScatterOptions,
    ScatterOptions,
    Work,
)
from torch.profiler import record_function

from shardwise.shm import prepare
from shardwise.shm.calls import OPS
from shardwise.shm.channel import Channel
from shardwise.shm.flat import as_bytes
from shardwise.shm.mail import Message
from shardwise.shm.prepare import Prepared
from shardwise.shm.watched import shown
from shardwise.shm.work import Operation, Queue

_CPU = torch.device("cpu")
_OPERATORS = {
    "all_reduce": "allreduce_",
    "all_gather": "allgather_",
    "reduce_scatter": "reduce_scatter_",
    "broadcast": "broadcast_",
    "reduce": "reduce_",
    "gather": "gather_",
    "scatter": "scatter_",
    "all_to_all": "alltoall_",
    "barrier": "barrier",
}
_NAMES = {getattr(dist.ReduceOp.RedOpType, name): name for name in OPS if name}


class ShmGroup(dist.ProcessGroup):
    """One rank's process group. Every method is c10d's of that name; tensors of the CPU, contiguous or not.

    Args:
        channel: to the other ranks.
        name: as c10d knows the group.
        inner: a group for the other `devices`; None where there are none.
    """

    # What c10d asks of the backend of a device, which for the CPU is the group itself.
    supports_splitting = supports_coalescing = supports_shrinking = supports_time_estimate = False

    def __init__(
        self, channel: Channel, name: str, inner: dist.ProcessGroup | None = None, devices: Sequence[torch.device] = ()
    ) -> None:
        super().__init__(channel.rank, channel.size)  # type: ignore[call-arg]  # a subclass in Python has no store
        self._channel = channel
        self._name = name
        self._inner = inner
        self._devices = [_CPU, *devices]
        self._queue = Queue(channel)
        self._done = Operation.finished()
        self._end = weakref.finalize(self, self._queue.close)

    @property
    def group_name(self) -> str:
        """As c10d knows the group."""
        return self._name

    @property
    def calls(self) -> int | None:
        """How many collectives this rank has called on tensors of the CPU; None once the group is broken."""
        return None if self._channel.failure is not None else self._queue.calls

    @property
    def _device_types(self) -> list[torch.device]:
        return self._devices

    def getBackendName(self) -> str:
        """`"shm"`."""
        return "shm"

    def _get_backend(self, device: torch.device) -> ShmGroup | Backend:
        return self if device.type == "cpu" else self._beside(device)._get_backend(device)

    def shutdown(self) -> None:
        """Leave the group: the others are told, the memory and the thread go."""
        self._end()
        if self._inner is not None:
            self._inner.shutdown()

    def abort(self) -> None:
        """As `shutdown`."""
        self._end()
        if self._inner is not None:
            self._inner.abort()

    def allreduce(self, tensors: list[Tensor], opts: AllreduceOptions | None = None) -> Work:
        """In place; several tensors are reduced one by one."""
        opts = opts or AllreduceOptions()
        if not tensors[0].is_cpu:
            return self._beside(tensors[0].device).allreduce(tensors, opts)
        op = _name(opts.reduceOp)
        if len(tensors) == 1:
            return self._submit(prepare.all_reduce(self._channel, tensors[0], op), tensors, tensors, opts.asyncOp)
        each = [prepare.all_reduce(self._channel, tensor, op) for tensor in tensors]
        return self._several(each, tensors, tensors, opts.asyncOp)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: AllreduceCoalescedOptions | None = None) -> Work:
        """In place."""
        if not tensors[0].is_cpu:
            return self._beside(tensors[0].device).allreduce_coalesced(tensors, opts or AllreduceCoalescedOptions())
        return self.allreduce(tensors, opts)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: AllgatherOptions | None = None) -> Work:
        """`inputs[i]` of every rank into `outputs[i]`, by rank."""
        opts = opts or AllgatherOptions()
        if not inputs[0].is_cpu:
            return self._beside(inputs[0].device).allgather(outputs, inputs, opts)
        pairs = zip(outputs, inputs, strict=True)
        written = [tensor for each in outputs for tensor in each]
        return self._several([prepare.all_gather(self._channel, *pair) for pair in pairs], inputs, written, opts.asyncOp)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: AllgatherOptions | None = None
    ) -> Work:
        """`inputs[i]` of rank r into `outputs[r][i]`."""
        return self.allgather([list(each) for each in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single(self, output: Tensor, source: Tensor, opts: AllgatherOptions | None = None) -> Work:
        """`source` of every rank, one behind the other, into `output`."""
        opts = opts or AllgatherOptions()
        if not source.is_cpu:
            return self._beside(source.device)._allgather_base(output, source, opts)
        prepared = prepare.all_gather_single(self._channel, output, source)
        return self._submit(prepared, [source], [output], opts.asyncOp, "_allgather_base_")

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: AllgatherOptions | None = None
    ) -> Work:
        """As `all_gather_single` for several."""
        opts = opts or AllgatherOptions()
        if not inputs[0].is_cpu:
            return self._beside(inputs[0].device).allgather_into_tensor_coalesced(outputs, inputs, opts)
        pairs = zip(outputs, inputs, strict=True)
        each = [prepare.all_gather_single(self._channel, *pair) for pair in pairs]
        return self._several(each, inputs, outputs, opts.asyncOp)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: ReduceScatterOptions | None = None
    ) -> Work:
        """The reduction of `inputs[i][r]` over the ranks into `outputs[i]` of rank r."""
        opts = opts or ReduceScatterOptions()
        if not outputs[0].is_cpu:
            return self._beside(outputs[0].device).reduce_scatter(outputs, inputs, opts)
        op, pairs = _name(opts.reduceOp), zip(outputs, inputs, strict=True)
        each = [prepare.reduce_scatter(self._channel, *pair, op) for pair in pairs]
        return self._several(each, [tensor for some in inputs for tensor in some], outputs, opts.asyncOp)

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: ReduceScatterOptions | None = None) -> Work:
        """As `reduce_scatter`, the inputs one behind the other in `source`."""
        opts = opts or ReduceScatterOptions()
        if not source.is_cpu:
            return self._beside(source.device)._reduce_scatter_base(output, source, opts)
        prepared = prepare.reduce_scatter_single(self._channel, output, source, _name(opts.reduceOp))
        return self._submit(prepared, [source], [output], opts.asyncOp, "_reduce_scatter_base_")

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: ReduceScatterOptions | None = None
    ) -> Work:
        """As `reduce_scatter_single` for several."""
        opts = opts or ReduceScatterOptions()
        if not inputs[0].is_cpu:
            return self._beside(inputs[0].device).reduce_scatter_tensor_coalesced(outputs, inputs, opts)
        op, pairs = _name(opts.reduceOp), zip(outputs, inputs, strict=True)
        each = [prepare.reduce_scatter_single(self._channel, *pair, op) for pair in pairs]
        return self._several(each, inputs, outputs, opts.asyncOp)

    def broadcast(self, tensors: list[Tensor], opts: BroadcastOptions | None = None) -> Work:
        """In place, from the root."""
        opts = opts or BroadcastOptions()
        if not tensors[0].is_cpu:
            return self._beside(tensors[0].device).broadcast(tensors, opts)
        each = [prepare.broadcast(self._channel, tensor, opts.rootRank) for tensor in tensors]
        return self._several(each, tensors, tensors, opts.asyncOp)

    def reduce(self, tensors: list[Tensor], opts: ReduceOptions | None = None) -> Work:
        """In place, on the root."""
        opts = opts or ReduceOptions()
        if not tensors[0].is_cpu:
            return self._beside(tensors[0].device).reduce(tensors, opts)
        op = _name(opts.reduceOp)
        each = [prepare.reduce(self._channel, tensor, op, opts.rootRank) for tensor in tensors]
        return self._several(each, tensors, tensors, opts.asyncOp)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: GatherOptions | None = None) -> Work:
        """`inputs` of every rank into `outputs` of the root, by rank."""
        opts = opts or GatherOptions()
        if not inputs[0].is_cpu:
            return self._beside(inputs[0].device).gather(outputs, inputs, opts)
        written = outputs[0] if outputs else []
        prepared = prepare.gather(self._channel, written, inputs[0], opts.rootRank)
        return self._submit(prepared, inputs, written, opts.asyncOp)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: ScatterOptions | None = None) -> Work:
        """`inputs` of the root, by rank, into `outputs`."""
        opts = opts or ScatterOptions()
        if not outputs[0].is_cpu:
            return self._beside(outputs[0].device).scatter(outputs, inputs, opts)
        prepared = prepare.scatter(self._channel, outputs[0], inputs[0] if inputs else [], opts.rootRank)
        return self._submit(prepared, inputs[0] if inputs else outputs, outputs, opts.asyncOp)

    def all_to_all_single(
        self,
        output: Tensor,
        source: Tensor,
        output_splits: list[int] | None = None,
        input_splits: list[int] | None = None,
        opts: AllToAllOptions | None = None,
    ) -> Work:
        """Rows of `source` to every rank; without splits as many to each."""
        opts = opts or AllToAllOptions()
        if not source.is_cpu:
            return self._beside(source.device).alltoall_base(output, source, output_splits or [], input_splits or [], opts)
        prepared = prepare.all_to_all_single(self._channel, output, source, output_splits or [], input_splits or [])
        return self._submit(prepared, [source], [output], opts.asyncOp, "alltoall_base_")

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: AllToAllOptions | None = None) -> Work:
        """`inputs[r]` to rank r, into `outputs` by sender."""
        opts = opts or AllToAllOptions()
        if not inputs[0].is_cpu:
            return self._beside(inputs[0].device).alltoall(outputs, inputs, opts)
        return self._submit(prepare.all_to_all(self._channel, outputs, inputs), inputs, outputs, opts.asyncOp)

    def barrier(self, opts: BarrierOptions | None = None) -> Work:
        """Returns when every rank has come."""
        opts = opts or BarrierOptions()
        return self._submit(prepare.barrier(self._channel), [], [], opts.asyncOp)

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> Work:
        """To rank `peer` of the group."""
        (tensor,) = tensors
        if not tensor.is_cpu:
            return self._beside(tensor.device).send(tensors, peer, tag)
        return self._mailed("send", tensor, lambda: self._queue.mail.send(tensor, as_bytes(tensor), peer, tag))

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> Work:
        """From rank `peer` of the group."""
        (tensor,) = tensors
        if not tensor.is_cpu:
            return self._beside(tensor.device).recv(tensors, peer, tag)
        return self._mailed("recv", tensor, lambda: self._queue.mail.receive(tensor, as_bytes(tensor), peer, tag))

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Work:
        """From whichever rank sends first."""
        (tensor,) = tensors
        if not tensor.is_cpu:
            return self._beside(tensor.device).recv_anysource(tensors, tag)
        return self._mailed("recv", tensor, lambda: self._queue.mail.receive(tensor, as_bytes(tensor), -1, tag))

    def _mailed(self, kind: str, tensor: Tensor, post: Callable[[], Message]) -> Message:
        message: Message = shown(kind, [tensor], [tensor], self, post) if _len_torch_dispatch_stack() else post()
        if not message.done:
            self._queue.call_thread()
        return message

    # What torch before 2.13 calls them, and its C++ code.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def _beside(self, device: torch.device) -> dist.ProcessGroup:
        """The group for tensors that are not on the CPU."""
        if self._inner is None or device.type not in {other.type for other in self._devices}:
            raise RuntimeError(
                f"the process group {self._name!r} has no backend for {device.type}: start it with one, as in "
                f'init_process_group("cpu:shm,{device.type}:nccl").'
            )
        return self._inner

    def _several(self, each: list[Prepared], inputs: list[Tensor], outputs: list[Tensor], asynchronous: bool) -> Work:
        return self._submit(each[0] if len(each) == 1 else prepare.several(each), inputs, outputs, asynchronous)

    def _submit(
        self, prepared: Prepared, inputs: list[Tensor], outputs: list[Tensor], asynchronous: bool, operator: str = ""
    ) -> Work:
        kind = prepared[0].kind
        if _len_torch_dispatch_stack():
            work: Work = shown(
                kind,
                inputs,
                outputs,
                self,
                lambda: self._profiled(prepared, outputs, asynchronous, operator or _OPERATORS[kind]),
            )
            return work
        if _profiler_enabled():
            return self._profiled(prepared, outputs, asynchronous, operator or _OPERATORS[kind])
        return self._start(prepared, outputs, asynchronous)

    def _profiled(self, prepared: Prepared, outputs: list[Tensor], asynchronous: bool, operator: str) -> Work:
        # Under the name, too, that a trace of any other backend has, which people and their tools look for.
        with record_function(f"c10d::{operator}"), record_function(f"shm:{prepared[0].kind}"):
            return self._start(prepared, outputs, asynchronous)

    def _start(self, prepared: Prepared, outputs: list[Tensor], asynchronous: bool) -> Work:
        call, steps = prepared
        if asynchronous:
            return self._queue.begin(call, steps, outputs)
        if outputs and outputs[0].is_inference() and not torch.is_inference_mode_enabled():
            self._queue.begin(call, steps, outputs).wait()  # which may write it
        else:
            self._queue.run(call, steps)
        return self._done


def _name(op: dist.ReduceOp) -> str:
    kind = getattr(op, "op", op)
    if kind not in _NAMES:
        raise TypeError(f"the shm backend reduces by {', '.join(_NAMES.values())}, not by {kind}.")
    return _NAMES[kind]
