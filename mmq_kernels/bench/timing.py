"""How a time is taken: calls in turns, medians with their spread, CUDA graphs on a GPU; and what a machine can do.

On CUDA a call is captured into a graph, once for every weight of its rotation, and the graph is replayed between two
events: no launch from the host is in the figure, which `host_overhead` measures by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mmq_kernels import _native

Call = Callable[[int], object]
"""A call gets the number of its repetition, and picks its weight by that."""

Clock = Callable[[], float]

_CALLS_PER_GRAPH = 20
"""At least so many, that the microsecond between an event and a graph is spread over many calls."""

_CALLS_PER_BATCH = 32
"""Host calls between two synchronizations: far fewer than the launches that a stream holds before it blocks."""


@dataclass(frozen=True)
class Rotation:
    """One call on each of several copies of a weight in turn, so that none is found in a cache.

    Attributes:
        pause: seconds to wait behind a turn: threads of a pool that has nothing to do go in circles for a while.
    """

    each: Sequence[Callable[[], object]]
    pause: float = 0.0

    def __call__(self, repetition: int) -> object:
        return self.each[repetition % len(self.each)]()

    def __len__(self) -> int:
        return len(self.each)


def timed(
    calls: Mapping[str, Call],
    seconds: float,
    device: torch.device,
    *,
    least: int = 5,
    graph: bool = True,
    clock: Clock = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Microseconds of each call: median, quartiles, minimum, and how many calls were made.

    The calls take turns, so what slows the machine down for a while slows all of them. A turn of a `Rotation` goes
    around twice and counts the second time: as in a model, a layer is met by caches that its like have filled, and not
    by what another call has left.

    Args:
        calls: by name; on CUDA a `Rotation` is captured whole, any other call by itself.
        seconds: how long to go on, all calls together, warm-up not counted.
        least: rounds to make even where that takes longer; at least 2.
        graph: False: call eagerly on CUDA too, by the host's clock. For calls that cannot be captured.
        clock: where the host's times are read.

    Returns:
        by name ``us``, ``us_q1``, ``us_q3``, ``us_min`` (microseconds a call) and ``calls``.
    """
    with torch.no_grad():
        if device.type == "cuda" and graph:
            return _timed_graphs(calls, seconds, device, least)
        return _timed_eagerly(calls, seconds, device, least, clock)


def _timed_eagerly(
    calls: Mapping[str, Call], seconds: float, device: torch.device, least: int, clock: Clock
) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    start, rounds = clock(), 0
    while rounds < least or clock() - start < seconds:
        rounds += 1
        for name, call in calls.items():
            if isinstance(call, Rotation):
                for repetition in range(len(call)):
                    call(repetition)
            for repetition in range(len(call)) if isinstance(call, Rotation) else (rounds,):
                synchronize(device)
                begin = clock()
                call(repetition)
                synchronize(device)
                times[name].append((clock() - begin) * 1e6)
            if isinstance(call, Rotation) and call.pause:
                time.sleep(call.pause)
    return {name: _summary(values, len(values)) for name, values in times.items()}


def _timed_graphs(
    calls: Mapping[str, Call], seconds: float, device: torch.device, least: int
) -> dict[str, dict[str, float]]:
    with torch.cuda.device(device):
        counts = {name: _calls_in_graph(call) for name, call in calls.items()}
        graphs = {name: captured(call, counts[name], device) for name, call in calls.items()}
        marks = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in calls}
        times: dict[str, list[float]] = {name: [] for name in calls}
        start, rounds = time.perf_counter(), 0
        while rounds < least or time.perf_counter() - start < seconds:
            rounds += 1
            next(iter(graphs.values())).replay()  # untimed: the GPU is busy while the host queues what is timed
            for name, one in graphs.items():
                marks[name][0].record()
                one.replay()
                marks[name][1].record()
            synchronize(device)
            for name, (begin, end) in marks.items():
                times[name].append(begin.elapsed_time(end) * 1e3 / counts[name])
    return {name: _summary(values, len(values) * counts[name]) for name, values in times.items()}


def _calls_in_graph(call: Call) -> int:
    """Whole rounds through a rotation."""
    rotation = len(call) if isinstance(call, Rotation) else 1
    return rotation * -(-_CALLS_PER_GRAPH // rotation)


def captured(call: Call, count: int, device: torch.device) -> torch.cuda.CUDAGraph:
    """`count` calls as one graph. Each is made once before, on the stream that captures: compilers, autotuners and
    workspaces get what they need outside the graph.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for i in range(count):
            call(i)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            call(i)
    return graph


def _summary(values: list[float], calls: int) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"us": middle, "us_q1": low, "us_q3": high, "us_min": min(values), "calls": calls}


def host_overhead(call: Callable[[], object], device: torch.device, *, batches: int = 50) -> float:
    """Microseconds of host time that one eager call takes: median over batches between synchronizations.

    On a GPU that is what a call costs before its kernels run; on a CPU the work itself is in it.
    """
    times = []
    with torch.no_grad():
        call()
        for _ in range(batches):
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(_CALLS_PER_BATCH):
                call()
            times.append((time.perf_counter() - begin) * 1e6 / _CALLS_PER_BATCH)
        synchronize(device)
    return statistics.median(times)


def reading(device: torch.device) -> tuple[int, Call]:
    """A call that goes through memory far beyond any cache, and the bytes that it moves: a copy of 2 GiB on CUDA, bytes
    read and bytes written both counted; the sum of 256 MiB with torch's threads on a CPU.
    """
    if device.type == "cuda":
        source = torch.ones(2**31, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * source.nbytes, lambda _: target.copy_(source)
    numbers = torch.ones(2**26)
    return numbers.nbytes, lambda _: numbers.sum()


def read_bandwidth(device: torch.device, seconds: float = 1.0, *, clock: Clock = time.perf_counter) -> float:
    """GB/s of memory, see `reading`."""
    moved, call = reading(device)
    return moved / timed({"": call}, seconds, device, clock=clock)[""]["us"] / 1e3


def matmul_rate(
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = 1.0,
    *,
    sizes: Sequence[int] | None = None,
    clock: Clock = time.perf_counter,
) -> float:
    """TFLOP/s of torch's matmul of two square matrices of random numbers (zeros would draw less power).

    Args:
        sizes: of the matrices; the one with the highest rate counts. Default 4096 and 8192 on CUDA, 512 to 2048
            elsewhere.
    """
    rates = []
    for size in sizes or ((4096, 8192) if device.type == "cuda" else (512, 1024, 2048)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        took = timed({"": lambda _, a=a, b=b: a @ b}, seconds, device, clock=clock)[""]  # type: ignore[misc]
        rates.append(2 * size**3 / took["us"] / 1e6)
    return max(rates)


PEAKS = ("fp32", "bf16", "int8")
"""In the order of csrc/cpu/peaks.h."""


def peak_rate(kind: str, *, rounds: int = 7, clock: Clock = time.perf_counter) -> float:
    """TFLOP/s (of "int8" TOP/s) of nothing but multiply-adds between registers, by the best instruction that this CPU
    has for the kind, on torch's threads; 0 where it has none or the extension is missing.
    """
    if not _native.available():
        return 0.0
    threads, best = torch.get_num_threads(), 0.0
    for _ in range(rounds):
        begin = clock()
        done = _native.module().multiply_adds(PEAKS.index(kind), 100_000, threads)
        best = max(best, 2 * done / (clock() - begin) / 1e12)
    return best


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been given to do; nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
