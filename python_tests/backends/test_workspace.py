"""Who gets which counters: launches on one stream share them, captured launches never share any."""

from __future__ import annotations

import pytest
import torch

from mmq_kernels.backends import workspace
from mmq_kernels.backends.workspace import Counters


@pytest.fixture
def counters(monkeypatch):
    """Counters in CPU memory, a reserve of 100, and nothing to wait for."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(workspace, "RESERVE", 100)
    made = Counters()
    device = torch.device("cpu", 0)
    return lambda count, stream=1, capturing=False: made.take(count, device, stream, capturing)


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + 4 * b.numel() and b.data_ptr() < a.data_ptr() + 4 * a.numel()


def test_one_stream_shares_and_two_do_not(counters) -> None:
    first, again, other = counters(10), counters(20), counters(10, stream=2)
    assert overlap(first, again) and not overlap(first, other)
    assert len(first) >= 10 and not first.any() and not other.any()


def test_more_than_are_held_are_made_anew(counters) -> None:
    few, many = counters(5), counters(10**5)
    assert len(many) >= 10**5 and not overlap(few, many)


def test_captured_launches_keep_theirs(counters) -> None:
    eager = counters(5)
    captured = [counters(30, capturing=True) for _ in range(3)]
    for i, one in enumerate(captured):
        assert len(one) == 30 and not overlap(one, eager)
        assert not any(overlap(one, other) for other in captured[i + 1 :])


def test_a_spent_reserve_is_no_error(counters) -> None:
    counters(1)
    taken = [counters(60, capturing=True) for _ in range(4)]
    assert all(len(one) == 60 and not one.any() for one in taken)
    assert not any(overlap(a, b) for i, a in enumerate(taken) for b in taken[i + 1 :])


def test_capture_before_anything_ran(counters) -> None:
    assert not counters(7, capturing=True).any()
