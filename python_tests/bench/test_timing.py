"""How times are taken: which calls are made in which order, and what is reported. No time is asserted."""

import contextlib
import itertools
import time
import types
from functools import partial

import pytest
import torch

from mmq_kernels.bench import setting
from mmq_kernels.bench.setting import Limits, Setting, rotated_bytes
from mmq_kernels.bench.timing import Rotation, host_overhead, matmul_rate, read_bandwidth, timed

CPU = torch.device("cpu")


def ticking(*steps: float):
    """A clock that goes on by each of `steps` in turn, in microseconds."""
    moments = itertools.accumulate(itertools.chain([0.0], itertools.cycle(steps)))
    return lambda: next(moments) / 1e6


def test_calls_take_turns_and_get_the_number_of_their_repetition() -> None:
    made: list[tuple[str, int]] = []
    calls = {"a": lambda i: made.append(("a", i)), "b": lambda i: made.append(("b", i))}
    took = timed(calls, 0, CPU, least=3)
    assert made == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3)]
    assert {name: found["calls"] for name, found in took.items()} == {"a": 3, "b": 3}


def test_figures_are_microseconds_by_the_clock_given() -> None:
    # Read once at the start, then before and after each call: calls take 10, 30, 20, 50 and 40 microseconds.
    clock = ticking(*(step for took in (10, 30, 20, 50, 40) for step in (0, took)))
    found = timed({"call": lambda _: None}, 0, CPU, least=5, clock=clock)["call"]
    assert found == pytest.approx({"us": 30, "us_q1": 15, "us_q3": 45, "us_min": 10, "calls": 5})


def test_goes_on_until_the_seconds_are_over() -> None:
    # A round reads the clock three times, the first two but twice: the eleventh ends at 7.75 seconds.
    clock = ticking(0.25e6)
    assert timed({"call": lambda _: None}, 7.5, CPU, least=2, clock=clock)["call"]["calls"] == 11


def test_nothing_is_recorded_for_autograd() -> None:
    weight = torch.ones(3, requires_grad=True)
    seen: list[bool] = []
    timed({"call": lambda _: seen.append((weight * 2).requires_grad)}, 0, CPU, least=2)
    host_overhead(lambda: seen.append((weight * 2).requires_grad), CPU, batches=1)
    assert not any(seen)


def test_a_rotation_goes_round() -> None:
    rotation = Rotation([lambda i=i: i for i in range(3)])  # type: ignore[misc]
    assert len(rotation) == 3
    assert [rotation(i) for i in range(5)] == [0, 1, 2, 0, 1]


def test_limit_is_the_longer_of_moving_and_multiplying() -> None:
    limits = Limits(gb_per_s=100.0, tflops=2.0)
    assert limits.us(moved_bytes=1e6, operations=1e6) == pytest.approx(10)  # 1 MB at 100 GB/s
    assert limits.us(moved_bytes=1e6, operations=1e8) == pytest.approx(50)  # 1e8 operations at 2e12 a second


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("bf16", [0.0, 8.0])
def test_a_cpu_without_an_instruction_for_bf16_is_held_against_fp32(dtype, bf16, monkeypatch) -> None:
    rates = {"bf16": bf16, "fp32": 3.0, "int8": 12.0}
    monkeypatch.setattr(setting, "peak_rate", lambda kind, clock: rates[kind])
    monkeypatch.setattr(setting, "matmul_rate", lambda *_, **__: 1.0)  # torch's, slower than it could be
    limits = Setting(CPU, dtype, 0.001, 2**20, quick=True).limits
    assert (limits.tflops, limits.int8_tops) == (bf16 if dtype == "bf16" and bf16 else 3.0, 12.0)


def test_machine_rates_are_positive() -> None:
    assert read_bandwidth(CPU, 0.01) > 0
    assert matmul_rate(CPU, torch.float32, 0.01, sizes=(32, 64)) > 0
    assert host_overhead(lambda: None, CPU, batches=2) >= 0


def test_standard_setting_of_a_cpu() -> None:
    setting = Setting.standard(CPU)
    assert setting.dtype == torch.float32
    assert list(setting.baselines) == ["fp32", "bf16"]
    assert list(Setting.standard(CPU, dtype_name="bf16").baselines) == ["bf16", "fp32"]
    assert setting.rotated_bytes == rotated_bytes(CPU) == 160 * 2**20
    assert setting.copies(2**20) == 160
    assert setting.copies(2**20 + 1) == 160
    assert setting.copies(2**40) == 2


class StandInGraph:
    """Notes when it plays, under the name of the call that it captured."""

    def __init__(self, played: list[str]) -> None:
        self.name, self._played = "", played

    def replay(self) -> None:
        self._played.append(self.name)


class StandInEvent:
    """Between any two of them 42 ms go by."""

    def __init__(self, played: list[str]) -> None:
        self._played = played

    def record(self) -> None:
        self._played.append("mark")

    def elapsed_time(self, end: "StandInEvent") -> float:
        return 42.0


def test_a_turn_of_a_rotation_goes_around_twice_and_counts_once() -> None:
    seen: list[str] = []
    around = Rotation([lambda i=i: seen.append(f"around {i}") for i in range(3)])  # type: ignore[misc]
    took = timed({"around": around, "one": lambda number: seen.append(f"one {number}")}, 0, CPU, least=2)
    turn = ["around 0", "around 1", "around 2"]
    assert seen == ["around 0", "one 0", *turn, *turn, "one 1", *turn, *turn, "one 2"]
    assert took["around"]["calls"] == 6 and took["one"]["calls"] == 2


def test_others_wait_behind_a_pool_that_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(time, "sleep", seen.append)
    pool = Rotation([lambda: seen.append("pool")] * 2, pause=0.05)
    timed({"pool": pool, "ours": lambda _: seen.append("ours")}, 0, CPU, least=2)
    turn = ["pool", "pool", "pool", "pool", 0.05, "ours"]
    assert seen == ["pool", "ours", *turn, *turn]


def test_graphs_take_turns_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU with stand-ins for torch.cuda: what is captured, in which order it plays, what is divided."""
    made: list[str] = []
    played: list[str] = []

    @contextlib.contextmanager
    def capturing(graph: StandInGraph, stream: object):
        begin = len(made)
        yield
        assert len(made) - begin == 21
        graph.name = made[begin]

    stream = types.SimpleNamespace(wait_stream=lambda _: None)
    for name, stand_in in {
        "device": lambda _: contextlib.nullcontext(),
        "Stream": lambda _: stream,
        "current_stream": lambda _: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda _: played.append("wait"),
        "CUDAGraph": lambda: StandInGraph(played),
        "graph": capturing,
        "Event": lambda enable_timing: StandInEvent(played),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    calls = {name: Rotation([partial(made.append, name)] * 3) for name in "ab"}
    took = timed(calls, 0, torch.device("cuda"), least=2)
    assert took["a"] == took["b"] == {"us": 2000, "us_q1": 2000, "us_q3": 2000, "us_min": 2000, "calls": 42}
    assert made == ["a"] * 42 + ["b"] * 42  # 7 rounds of 3 to warm up, and 7 that are captured
    assert played == ["wait", "wait", *["a", "mark", "a", "mark", "mark", "b", "mark", "wait"] * 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_holds_whole_rounds_of_the_rotation() -> None:
    device = torch.device("cuda")
    made: list[int] = []
    totals = [torch.zeros(1, device=device) for _ in range(3)]

    def add(i: int) -> None:
        made.append(i)
        totals[i] += 1

    found = timed({"add": Rotation([lambda i=i: add(i) for i in range(3)])}, 0, device, least=2)["add"]  # type: ignore[misc]
    assert made == [0, 1, 2] * (2 * 7)  # 21 calls to warm up, 21 captured
    assert found["calls"] == 2 * 21
    assert [float(total) for total in totals] == [7 + 4 * 7] * 3  # warm-up, and two replays in each of two rounds
