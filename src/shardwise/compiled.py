"""The all-reduce of compiled code on CPUs: one operator, done when it returns.

torch's functional collectives are two operators, a start and a wait, so that something may happen in between. On a CPU nothing
does, unless Inductor is asked to (`reorder_for_compute_comm_overlap`), and the pair takes 6 us where this one takes 2.5 (at no
communication, one thread); a decoder layer has four. On other devices, and for other collectives, torch's own stand in the
graph, which Inductor's passes look for.

This is the one file that touches Inductor's internals. To Inductor the operator is a collective: it keeps all of them in the
order of the graph, which is the same on every rank, whatever else it moves about.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from torch._inductor.ir import TensorBox

_LIBRARY = torch.library.Library("shardwise", "DEF")
_LIBRARY.define("all_reduce(Tensor x, str group) -> Tensor")
_LIBRARY.define("all_reduce_(Tensor(a!) x, str group) -> ()")

SYNCHRONOUS = dist.AllreduceOptions()
SYNCHRONOUS.asyncOp = False


def traced_all_reduce(x: Tensor, group: str) -> Tensor:
    """For code that is being traced: the sum of `x` over the ranks of the group of this name. Shapes: any, unchanged."""
    total: Tensor = torch.ops.shardwise.all_reduce(x, group)
    return total


def traced_all_gather(x: Tensor, dim: int, group: str, size: int) -> Tensor:
    """For code that is being traced: the ranks' equal slices put together.  (..., n, ...) -> (..., size * n, ...)

    What Inductor's async-TP pass fuses with the products that read it: no copy and no view between the wait and the `cat`.
    """
    started = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group)
    gathered: Tensor = torch.ops._c10d_functional.wait_tensor(started)
    return gathered if dim == 0 else torch.cat(gathered.chunk(size), dim)


def traced_reduce_scatter(x: Tensor, dim: int, group: str, size: int) -> Tensor:
    """For code that is being traced: this rank's slice of the sum.  (..., size * n, ...) -> (..., n, ...)

    What Inductor's async-TP pass fuses with the product that it reads, as for `traced_all_gather`.
    """
    stacked = x.contiguous() if dim == 0 else torch.cat(x.chunk(size, dim))
    started = torch.ops._c10d_functional.reduce_scatter_tensor(stacked, "sum", size, group)
    mine: Tensor = torch.ops._c10d_functional.wait_tensor(started)
    return mine


def _all_reduce_(x: Tensor, group: str) -> None:
    _resolve_process_group(group).allreduce([x], SYNCHRONOUS).wait()  # type: ignore[arg-type]


def _all_reduce(x: Tensor, group: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    _all_reduce_(total, group)
    return total


def _traced(x: Tensor, group: str) -> Tensor:
    # Whoever traces may compile with Inductor next; to import it takes a second, which those who don't trace don't pay.
    _teach_inductor()
    return x.new_empty(x.shape)


_LIBRARY.impl("all_reduce", _all_reduce, "CPU")
_LIBRARY.impl("all_reduce_", _all_reduce_, "CPU")
torch.library.register_fake("shardwise::all_reduce", _traced)
torch.library.register_fake("shardwise::all_reduce_", lambda x, group: None)


@cache
def _teach_inductor() -> None:
    """Have it write the sum into a copy of the input, which it leaves out where nobody needs the input any more."""
    from torch._inductor import config, ir
    from torch._inductor.lowering import add_layout_constraint, clone, constrain_to_fx_strides, lowerings, register_lowering

    two_step = torch.ops._c10d_functional
    operator = torch.ops.shardwise.all_reduce
    add_layout_constraint(operator, constrain_to_fx_strides)

    @register_lowering(operator)
    def lower(x: TensorBox, group: str) -> Any:
        if config.reorder_for_compute_comm_overlap:
            return lowerings[two_step.wait_tensor.default](lowerings[two_step.all_reduce.default](x, "sum", group))
        total = ir.ExternKernel.require_contiguous(clone(x))
        ir._CollectiveKernel.create(torch.ops.shardwise.all_reduce_.default, total, group)
        return total
