"""A file of measurements outlives what happens to its writer."""

from pathlib import Path

import pytest

from mmq_kernels.sweep.allocation.measurements import Measurements


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "measured.jsonl"
    first = Measurements(path, {"model": "a"})
    assert first.once(lambda: 3.5, unit="x", bits=2) == 3.5
    assert first.fresh == 1
    again = Measurements(path, {"model": "a"})
    assert again.once(lambda: pytest.fail("measured twice"), unit="x", bits=2) == 3.5
    assert again.get(unit="x", bits=3) is None
    assert again.fresh == 0


def test_other_models_measurements_are_others(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    Measurements(path, {"model": "a"}).put(1.0, unit="x")
    other = Measurements(path, {"model": "b"})
    assert other.get(unit="x") is None
    other.put(2.0, unit="x")
    assert Measurements(path, {"model": "a"}).get(unit="x") == 1.0
    assert Measurements(path, {"model": "b"}).get(unit="x") == 2.0


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_that_a_killed_process_left_unfinished_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "measured.jsonl"
    kept = Measurements(path, {})
    kept.put(1.0, unit="x")
    kept.put(2.0, unit="y")
    path.write_bytes(path.read_bytes()[:-cut])
    after = Measurements(path, {})
    assert after.get(unit="x") == 1.0
    assert after.get(unit="y") is None
    after.put(3.0, unit="y")
    assert Measurements(path, {}).get(unit="y") == 3.0


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    Measurements(path, {}).put(1.0, unit="x")
    with path.open("a") as file:
        file.write('{"no": "measurement"}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"measured\.jsonl must be a measurement, got .* in line 2"):
        Measurements(path, {})
    assert path.read_bytes() == before


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Measurements(tmp_path / "measured.jsonl", {}).put(float("nan"), unit="x")
