"""What is made of traces, on traces made by hand whose answers are known."""

from __future__ import annotations

import threading
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch.distributed as dist

from shardwise.debug import Collective
from shardwise.profiling.analyse import Analysis, analyse
from shardwise.profiling.breakdown import Breakdown, breakdown, find
from shardwise.profiling.clock import Mark, Offset, fit, host_offset
from shardwise.profiling.events import RankTrace
from shardwise.profiling.intervals import clip, length, subtract, union
from shardwise.profiling.lanes import Range, in_lanes
from shardwise.profiling.merge import merge
from traces import Tape, read_strictly

DOWN, MLP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp"
NODE = "autograd::engine::evaluate_function: MmBackward0"
SUM = asdict(Collective("all_reduce", "forward", DOWN, "", (4, 8), "float32", 128, "0", (0, 1)))


def two_ranks() -> list[RankTrace]:
    """Rank 1 comes 200 us late to an all-reduce of `DOWN`; each computes 50 us in the backward of `MLP` afterwards."""
    traces = []
    for rank, late in ((0, 100), (1, 300)):
        tape = Tape(rank, base=1e9 + 7e5 * rank, rate=1 + 1e-5 * rank, spans=[(0, ""), (5, MLP), (9, "")], collectives=[SUM])
        tape.add(f"module {DOWN}", 0, 410, "user_annotation").add("aten::mm", 0, late)
        tape.add("c10d::allreduce_", late, 400, "user_annotation").add("shm:all_reduce", late, 400, "user_annotation")
        tape.add(NODE, 440, 510, **{"Sequence number": 7}).add("aten::mm", 450, 500)
        traces.append(tape.read(600))
    return traces


def analysis_of(traces: list[RankTrace]) -> Analysis:
    """All figures."""
    return analyse(*find(traces))


def rounded(one: Breakdown) -> dict[str, int]:
    """A breakdown in whole microseconds."""
    return {name: round(value) for name, value in asdict(one).items()}


def test_wait_and_transfer_are_told_apart() -> None:
    """Guards: the others' lateness taken for a slow network; and clocks that are apart, or go apart, taken as they are."""
    first, second = analysis_of(two_ranks()).ranks
    assert rounded(first) == {
        "step": 600,
        "compute": 150,
        "communication": 300,
        "wait": 200,
        "transfer": 100,
        "host": 150,
        "calls": 1,
        "bytes": 128,
        "grown": 0,
    }
    assert rounded(second) == rounded(first) | {"compute": 350, "communication": 100, "wait": 0}


def test_who_came_last() -> None:
    """Guards: the wrong rank blamed."""
    late = analysis_of(two_ranks()).late
    assert [(one.name, one.rank) for one in late] == [(f"all_reduce {DOWN} forward", 1)]
    assert late[0].by == pytest.approx(200, abs=1)


def test_layers_share_the_time() -> None:
    """Guards: backward given to no layer, or to that which ran last in forward; time counted twice."""
    analysis = analysis_of(two_ranks())
    found = {(part.name, part.phase): part for part in analysis.layers}
    assert found.keys() == {("model.layers.0", "forward"), ("model.layers.0", "backward")}
    forward, backward = found["model.layers.0", "forward"], found["model.layers.0", "backward"]
    assert [round(v) for v in (forward.compute, forward.wait, forward.transfer, forward.host)] == [200, 100, 100, 10]
    assert [round(v) for v in (backward.compute, backward.wait, backward.transfer, backward.host)] == [50, 0, 0, 20]
    assert {(part.name, part.phase) for part in analysis.modules} == {
        ("model.layers.*.mlp.down_proj", "forward"),
        ("model.layers.*.mlp", "backward"),
    }
    assert [(part.name, round(part.compute), part.calls) for part in analysis.operators] == [("aten::mm", 250, 2)]


def test_what_runs_during_an_asynchronous_collective_hides_it() -> None:
    """Guards: all of an asynchronous collective counted as exposed, or none of it; and its wait taken for another one's."""
    tape = Tape(0)
    tape.add("_c10d_functional::all_reduce", 100, 110, **{"Input Dims": [[4, 8]]})
    tape.add("_c10d_functional::all_reduce", 110, 120, **{"Input Dims": [[2]]})
    tape.add("aten::mm", 130, 200)
    tape.add("_c10d_functional::wait_tensor", 200, 240, **{"Input Dims": [[2]]})
    tape.add("_c10d_functional::wait_tensor", 240, 260, **{"Input Dims": [[4, 8]]})
    found, _ = find([tape.read(300)])
    one = breakdown(found[0])
    assert [round(v) for v in (one.compute, one.communication, one.exposed, one.host)] == [70, 160, 80, 150]
    assert [(round(call.start), round(call.end)) for call in found[0].calls] == [(100, 260), (110, 240)]


def test_what_a_subclass_of_tensors_does_in_python_is_no_compute() -> None:
    """Guards: DTensor's dispatch counted as compute, because it runs inside of an operator."""
    tape = Tape(0)
    tape.add("aten::linear", 0, 200).add("aten::mm", 10, 190).add("PythonSubclass", 20, 180).add("aten::mm", 100, 150)
    one = analysis_of([tape.read(200)]).ranks[0]
    assert (round(one.compute), round(one.host)) == (50, 150)


def on_gpu() -> list[RankTrace]:
    """An all-reduce on a stream of its own, in part behind compute; rank 1's kernel begins 40 us later."""
    traces = []
    for rank, late in ((0, 80), (1, 120)):
        tape = Tape(rank, device="cuda", collectives=[SUM])
        tape.add("aten::mm", 1, 9).kernel("gemm", 0 + 10, 100 + rank * 20, 7, 2, 1)
        tape.add(f"module {DOWN}", 20, 60, "user_annotation").add("c10d::allreduce_", 22, 40)
        tape.kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", late, 200, 20, 25, 2)
        tape.add("aten::mm", 61, 69).kernel("gemm", 150, 300, 7, 62, 3)
        traces.append(tape.read(400))
    return traces


def test_kernels_of_nccl_are_communication() -> None:
    """Guards: nccl's kernels counted as compute, what compute hides of them counted as exposed, and host time taken for
    theirs on a device that the host runs ahead of.
    """
    analysis = analysis_of(on_gpu())
    first, second = analysis.ranks
    assert rounded(first) == {
        "step": 400,
        "compute": 240,
        "communication": 120,
        "wait": 20,
        "transfer": 30,
        "host": 110,
        "calls": 1,
        "bytes": 128,
        "grown": 0,
    }
    assert [round(v) for v in (second.compute, second.wait, second.transfer, second.host)] == [260, 0, 30, 110]
    assert [(part.name, part.phase, round(part.host)) for part in analysis.collectives] == [
        ("all_reduce model.layers.*.mlp.down_proj", "forward", 0)
    ]
    assert [(part.name, part.calls) for part in analysis.operators] == [("gemm", 2)]


def test_kernels_of_a_graph() -> None:
    """Guards: communication that a CUDA graph launches, of which the host says nothing, lost."""
    tape = Tape(0, device="cuda").add("cudaGraphLaunch", 1, 3, "cuda_runtime", correlation=5)
    tape.add("gemm", 10, 50, "kernel", 7, correlation=5)
    tape.add("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 50, 90, "kernel", 7, correlation=5)
    found, _ = find([tape.read(100)])
    assert [(call.kind, round(call.transfer)) for call in found[0].calls] == [("reduce_scatter", 40)]
    assert round(breakdown(found[0]).host) == 20


@pytest.mark.parametrize("make", [two_ranks, on_gpu])
def test_the_merged_trace_is_sound(make) -> None:
    """Guards: ranks that fall into one process, tracks without names, ranges that overlap, arrows that lead nowhere."""
    traces = make()
    found, matches = find(traces)
    seen = read_strictly(merge(found, matches, "by hand"))
    assert seen.processes == {0: "rank 0", 1: "rank 1"}
    assert all({"collectives", "main"} <= set(tracks.values()) for tracks in seen.tracks.values())
    calls = {event["pid"]: event for event in seen.ranges if event["name"] == f"all_reduce {DOWN} forward"}
    assert calls[0]["args"]["last rank"] == 1
    assert calls[0]["args"]["bytes"] == 128
    late = calls[1]["ts"]
    assert late == pytest.approx(calls[0]["ts"] + calls[0]["args"]["wait us"], abs=0.01)
    waits = [event for event in seen.ranges if event["name"].startswith("wait for")]
    assert [(event["pid"], event["name"]) for event in waits] == [(0, "wait for rank 1")]
    assert [(s["pid"], f["pid"], s["ts"]) for s, f in seen.arrows if s["cat"] == "collective"] == [(1, 0, late)]
    assert {"stream 7", "stream 20"} <= set(seen.tracks[0].values()) or make is two_ranks


def test_backward_has_ranges() -> None:
    """Guards: a backward of which the trace says no module."""
    seen = read_strictly(merge(*find(two_ranks()), "by hand"))
    assert sum(event["name"] == f"module {MLP} backward" for event in seen.ranges) == 2


def test_calls_that_differ_are_not_matched() -> None:
    """Guards: an arrow from an all-reduce to an all-gather, and the times of unrelated calls compared."""
    first, second = Tape(0).add("c10d::allreduce_", 10, 20), Tape(1).add("c10d::_allgather_base_", 30, 40)
    found, matches = find([first.read(100), second.read(100)])
    assert matches == []
    assert [call.wait for one in found for call in one.calls] == [0, 0]


def test_groups_are_matched_apart() -> None:
    """Guards: the calls of one group taken for those of another."""
    one, pair = SUM | {"ranks": [0]}, SUM
    first = Tape(0, collectives=[one, pair]).add("c10d::allreduce_", 10, 20).add("c10d::allreduce_", 30, 50)
    second = Tape(1, collectives=[pair]).add("c10d::allreduce_", 40, 50)
    _, matches = find([first.read(100), second.read(100)])
    assert [[(call.rank, round(call.start)) for call in calls] for calls in matches] == [[(0, 30), (1, 40)]]


def test_a_clock_that_is_wrong_is_noticed() -> None:
    """Guards: nonsense believed: a rank that leaves an all-reduce before another has come."""
    first, second = Tape(0).add("c10d::allreduce_", 10, 20), Tape(1).add("c10d::allreduce_", 50, 60)
    found, matches = find([first.read(100), second.read(100)])
    assert analyse(found, matches).clock_violation == pytest.approx(30, abs=1)
    assert all(call.wait >= 0 and call.transfer >= 0 for one in found for call in one.calls)
    read_strictly(merge(found, matches, "by hand"))


def test_the_clock_of_a_trace() -> None:
    """Guards: the worst of the marks taken, and drift ignored."""
    marks = [Mark(1_000_000, 9_000_000), Mark(10_000_000, 10_002_000), Mark(20_000_000, 20_004_000), Mark(3, 90_000_000)]
    clock = fit([0.0, 500.0, 10_501.5, 12_000.0], marks, Offset(2e6, 3e3))
    assert clock.common(500.0) == pytest.approx(12_001.0)
    assert clock.common(10_501.5) == pytest.approx(22_002.0)
    assert clock.error == pytest.approx(5.0)


def test_the_clock_of_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the difference of two hosts' clocks with the wrong sign, or taken where there is one clock."""
    store, ahead, found = dist.HashStore(), 7_000_000_000, {}
    store.set_timeout(timedelta(seconds=20))
    real = __import__("time").monotonic_ns

    def run(rank: int, host: str) -> None:
        found[rank] = host_offset(store, rank, 3, host)

    threads = [threading.Thread(target=run, args=(rank, host)) for rank, host in ((0, "a"), (1, "a"), (2, "b"))]
    monkeypatch.setattr(
        "shardwise.profiling.clock.time.monotonic_ns",
        lambda: real() + ahead * (threading.current_thread() is threads[2]),
    )
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == Offset()
    assert abs(found[2].ns + ahead) <= found[2].error < 1e8


def test_intervals() -> None:
    """Guards: time counted twice where pieces overlap, or lost where one lies inside of another."""
    assert union([(5, 6), (1, 3), (2, 4), (2, 2.5)]) == [(1, 4), (5, 6)]
    assert subtract([(0, 10), (12, 14)], [(2, 3), (2.5, 4), (9, 13)]) == [(0, 2), (4, 9), (13, 14)]
    assert subtract([(0, 1)], []) == [(0, 1)]
    assert clip([(0, 5), (6, 9), (20, 30)], 4, 8) == [(4, 5), (6, 8)]
    assert length([(1, 4), (5, 6)]) == 4


def test_lanes() -> None:
    """Guards: ranges that overlap drawn in each other; and rounding that makes a lane of its own."""
    made = [Range(start, end, "", "", {}) for start, end in ((0, 100), (50, 150), (100, 120), (10, 104), (160, 170))]
    lanes = in_lanes(made)
    assert [[(one.start, one.end) for one in lane] for lane in lanes] == [
        [(0, 100), (10, 100), (100, 120), (160, 170)],
        [(50, 150)],
    ]
