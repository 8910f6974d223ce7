"""Lazy tensors: what is recorded equals what torch does at once, and no more is read than a box needs."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from lazy_sources import Memory
from shardwise.errors import CheckpointError
from shardwise.lazy import Box, LazyTensor, lazy, read, read_into, sources


def _full(tensor: Tensor) -> Box:
    return tuple((0, length) for length in tensor.shape)


def _boxes(shape: torch.Size, rng: random.Random) -> Iterator[Box]:
    yield tuple((0, length) for length in shape)
    for _ in range(6):
        starts = [rng.randint(0, length) for length in shape]
        yield tuple((start, rng.randint(start, length)) for start, length in zip(starts, shape, strict=True))


def assert_same(function: Callable[..., object], *tensors: Tensor, seed: int = 0) -> None:
    """Every box of every result of `function` is the same for lazy tensors as for plain ones."""
    rng = random.Random(seed)
    expected, found = function(*(t.clone() for t in tensors)), function(*(lazy(Memory(t.clone())) for t in tensors))
    if isinstance(expected, Tensor):
        expected, found = [expected], [found]
    for plain, recorded in zip(expected, found, strict=True):
        assert (plain.shape, plain.dtype) == (recorded.shape, recorded.dtype)
        for box in _boxes(plain.shape, rng):
            wanted = plain[tuple(slice(*bounds) for bounds in box)]
            assert torch.equal(read(recorded, box), wanted), box
            out = torch.empty(wanted.shape, dtype=torch.bfloat16)
            read_into(out, recorded, box)
            assert torch.equal(out, wanted.to(torch.bfloat16)), box


ONE = {
    "alias": lambda x: x[...],
    "casts": lambda x: x.to(torch.bfloat16).to(torch.float64),
    "to integers": lambda x: x.to(torch.int32),
    "chunk": lambda x: x.chunk(3, 1),
    "split": lambda x: x.split([1, 2, 3], 1),
    "unbind": lambda x: x.unbind(-1),
    "slice": lambda x: x[1:3, 2, -3:],
    "step": lambda x: x[:, 1::2],
    "narrow": lambda x: x.narrow(1, 2, 3),
    "transpose": lambda x: x.transpose(0, 2).contiguous(),
    "t": lambda x: x[0].t(),
    "permute": lambda x: x.permute(2, 0, 1),
    "merge": lambda x: x.reshape(24, 8),
    "across": lambda x: x.reshape(8, 24),
    "flatten": lambda x: x.flatten(),
    "rope": lambda x: x.view(4, 3, 2, 8).transpose(1, 2).reshape(4, 6, 8),
    "ones": lambda x: x.reshape(1, 4, 1, 6, 8, 1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:1, :, :1].squeeze(),
    "squeeze one": lambda x: x[:1].squeeze(0),
    "expand": lambda x: x[:, :1].expand(3, 4, 5, 8),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "flip": lambda x: x.flip(0),
    "arithmetic": lambda x: x * 2 + 1,
    "sort": lambda x: x.sort(-1),
    "index": lambda x: x[torch.tensor([2, 0, 1])],
    "sum": lambda x: x.sum(1),
    "bits": lambda x: x.view(torch.int32),
    "strided": lambda x: x[1].as_strided((2, 3), (1, 2)),
}
TWO = {
    "cat": lambda x, y: torch.cat([x, y], 1),
    "cat of dtypes": lambda x, y: torch.cat([x, y.to(torch.bfloat16)]).to(torch.float16),
    "cat with plain": lambda x, y: torch.cat([x, torch.ones(4, 6, 8), y], -1),
    "stack": lambda x, y: torch.stack([x, y], -1),
    "experts": lambda x, y: torch.cat([torch.stack([x, y]), torch.stack([y, x])], 1)[:, 1:5].transpose(1, 2),
    "matmul": lambda x, y: x @ y.mT,
}


@pytest.mark.parametrize("name", ONE)
def test_boxes_of_one_tensor(name: str) -> None:
    """Guards: a box pushed through an operation at the wrong offset, order or dim, or a fallback that takes another box."""
    assert_same(ONE[name], torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", TWO)
def test_boxes_of_two_tensors(name: str) -> None:
    """Guards: parts of a cat or stack that land in the wrong place, or lose their dtype on the way."""
    generator = torch.Generator().manual_seed(0)
    assert_same(TWO[name], torch.randn(4, 6, 8, generator=generator), torch.randn(4, 6, 8, generator=generator))


@pytest.mark.parametrize("seed", range(40))
def test_chains_of_views(seed: int) -> None:
    """Guards: views whose index arithmetic is right alone and wrong after another view."""
    steps: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(0, -1),
        lambda x: x.reshape(-1, 2),
        lambda x: x.reshape(3, -1, 2),
        lambda x: x.reshape(2, -1),
        lambda x: x[1:],
        lambda x: x[..., :2],
        lambda x: x.unsqueeze(0),
        lambda x: torch.cat([x, x]),
    ]
    rng = random.Random(seed)
    start = torch.arange(96.0).reshape(12, 8)
    chain: list[Callable[[Tensor], Tensor]] = []
    while len(chain) < 6:
        step = rng.choice(steps)
        try:
            reached = step(_apply(chain, start))
        except RuntimeError:  # does not divide
            continue
        if 0 < reached.numel() < 5000:
            chain.append(step)
    assert_same(lambda x: _apply(chain, x), start, seed=seed)


def _apply(chain: list[Callable[[Tensor], Tensor]], tensor: Tensor) -> Tensor:
    for step in chain:
        tensor = step(tensor)
    return tensor


@pytest.mark.parametrize(
    ("build", "box", "elements"),
    [
        (lambda w: w[...].to(device="cpu", dtype=torch.bfloat16), ((3, 5), (0, 6)), 12),
        (lambda w: torch.stack([w, w * 2]), ((0, 1), (2, 4), (0, 6)), 12),
        (lambda w: torch.cat([w, w])[4:12].t(), ((1, 2), (3, 5)), 2),
        (lambda w: w.view(2, 4, 6).transpose(1, 2), ((1, 2), (0, 6), (0, 4)), 24),
        (lambda w: w.view(4, 2, 6).reshape(8, 6), ((2, 4), (0, 3)), 6),
        (lambda w: w.view(48).view(8, 6), ((3, 4), (2, 4)), 2),
        (lambda w: w.view(48), ((13, 17),), 4),
        (lambda w: nn.Parameter(w.chunk(4)[2]), ((0, 1), (0, 6)), 6),
    ],
)
def test_reads_no_more_than_the_box(build: Callable[[Tensor], Tensor], box: Box, elements: int) -> None:
    """Guards: an operation that reads at once or whole (a cast with a device argument once did), unseen because it is right."""
    source = Memory(torch.randn(8, 6))
    tensor = build(lazy(source))
    assert isinstance(tensor, LazyTensor)
    assert source.asked == []
    read(tensor, box)
    assert source.elements == elements


def test_a_cast_on_the_way_rounds() -> None:
    """Guards: float32 -> bfloat16 -> float32 shortened to a copy, which would keep digits that the model doesn't have."""
    tensor = torch.tensor([1.0 + 2**-12])
    out = torch.empty(1)
    read_into(out, lazy(Memory(tensor)).to(torch.bfloat16), ((0, 1),))
    assert out.item() == 1.0
    assert tensor.item() != 1.0  # what the shortcut would give


def _writes(x: Tensor, y: Tensor) -> list[Tensor]:
    before, view = x.clone(), x[1]
    x[2].zero_()
    view.fill_(3)
    x[0, 0] = 7.0
    y.copy_(x)
    x.mul_(2)
    torch._foreach_add_([x, y], 1.0)
    y[:, 0] /= 4
    after = x + y
    y.zero_()
    return [x, y, before, view, after, x[1]]


def test_writes_are_seen_by_views_and_not_by_earlier_copies() -> None:
    """Guards: `_init_weights` writing into a lazy weight in vain, or changing what was computed from it before."""
    assert_same(_writes, torch.randn(4, 6, 8), torch.randn(4, 6, 8))


def test_plain_operands_are_taken_as_they_are_now() -> None:
    """Guards: a recorded operation that sees what is written to its plain operand later."""
    mask = torch.ones(2)
    product = lazy(Memory(torch.ones(2))) * mask
    mask.zero_()
    assert read(product, ((0, 2),)).tolist() == [1, 1]


def test_values_are_read_where_they_decide() -> None:
    """Guards: ties compared without values, so that different weights are tied or equal ones are not."""
    source = Memory(torch.arange(4.0))
    tensor = lazy(source)
    assert torch.equal(tensor, lazy(Memory(torch.arange(4.0))))
    assert not torch.equal(tensor, lazy(Memory(torch.ones(4))))
    assert bool((tensor == tensor).all())
    assert tensor[2].item() == 2
    assert tensor.nonzero().flatten().tolist() == [1, 2, 3]


def test_new_tensors_are_plain() -> None:
    """Guards: `zeros_like` of a lazy tensor being lazy, so that filling it reads a weight, or `rand_like` drawing twice."""
    source = Memory(torch.ones(3))
    tensor = lazy(source)
    for new in (torch.zeros_like(tensor), tensor.new_empty(2), torch.rand_like(tensor), tensor.to("meta")):
        assert type(new) is Tensor
    assert source.asked == []


def test_parameters_and_copies_stay_lazy() -> None:
    """Guards: a copy that reads, forgets that it is a parameter, or shares what is written with its original."""
    source = Memory(torch.randn(2, 3))
    parameter = nn.Parameter(lazy(source))
    module = nn.ParameterList([parameter, parameter])
    twin = copy.deepcopy(module)
    assert isinstance(twin[0], nn.Parameter)
    assert isinstance(twin[0], LazyTensor)
    assert twin[0] is twin[1]
    assert source.asked == []
    with torch.no_grad():
        twin[0].zero_()
    assert read(twin[1], _full(parameter)).abs().sum() == 0
    assert torch.equal(read(parameter, _full(parameter)), source.tensor)


def test_assigned_data_is_what_is_read() -> None:
    """Guards: `parameter.data = tensor` leaving the checkpoint's values behind the new ones."""
    parameter = nn.Parameter(lazy(Memory(torch.ones(2))))
    parameter.data = torch.zeros(3)
    assert read(parameter, ((0, 3),)).tolist() == [0, 0, 0]


def test_the_odd_one_out_is_named_first() -> None:
    """Guards: an expert of a wrong shape reported without its key, or behind its 127 siblings."""
    experts = [lazy(Memory(torch.zeros(2, 4 if i == 5 else 3), f"experts.{i}.w1")) for i in range(20)]
    with pytest.raises(CheckpointError, match=r"(?s)tensors +experts\.5\.w1: \[2, 4\].*experts\.0\.w1: \[2, 3\].*12 more"):
        torch.stack(experts)
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1: \[2, 3\]"):
        torch.cat([experts[0], experts[5]])


def test_recording_in_threads() -> None:
    """Guards: recording that depends on state shared by threads; transformers converts in a pool."""
    stored = [Memory(torch.full((4,), float(i)), str(i)) for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda source: torch.stack([lazy(source)[...].to(torch.float64)] * 2), stored))
    assert [sources(tensor)[0].name for tensor in made] == [source.name for source in stored]
    assert [read(tensor, ((0, 1), (0, 1))).item() for tensor in made] == list(range(64))


@pytest.mark.parametrize("box", [((0, 3),), ((0, 2), (0, 4)), ((-1, 2), (0, 3)), ((2, 1), (0, 3))])
def test_a_box_outside_is_refused(box: Box) -> None:
    """Guards: a wrong shard that is cut short instead of refused."""
    with pytest.raises(ValueError, match="does not lie within"):
        read(lazy(Memory(torch.zeros(2, 3))), box)


def test_out_of_another_shape_is_refused() -> None:
    """Guards: a shard broadcast over a larger parameter."""
    with pytest.raises(ValueError, match="does not go into"):
        read_into(torch.empty(2, 3), lazy(Memory(torch.zeros(2, 3))), ((0, 1), (0, 3)))
