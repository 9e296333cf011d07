"""Rows of the gemm benchmark: bytes and limits counted by hand, ratios that follow from their times."""

import pytest
import torch

from mmq_kernels import _native
from mmq_kernels.bench.alternating import bench_alternating
from mmq_kernels.bench.gemm import bench_gemm, bench_overhead, moved_bytes, operations
from mmq_kernels.bench.layers import random_layer, twin
from mmq_kernels.bench.lines import line
from mmq_kernels.bench.packing import bench_packing
from mmq_kernels.bench.peers import peers, why_no_ort
from mmq_kernels.bench.setting import Setting
from mmq_kernels.bench.shapes import SHAPES, TOKENS, named
from mmq_kernels.ops import use_backend
from mmq_kernels.spec import QuantSpec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting.standard(CPU, seconds=0.001, quick=True)


def test_bytes_counted_by_hand() -> None:
    with use_backend("reference"):
        layer = random_layer(40, 64, QuantSpec(4, 32), CPU, torch.float32)
    words, scales, zeros = 40 * 64 // 2, 40 * 2 * 2, 40 * 2 // 2
    assert layer.packed_bytes == words + scales + zeros
    assert moved_bytes(layer, 3, torch.float16) == words + scales + zeros + 3 * (64 + 40) * 2
    with use_backend("reference"):
        fused = random_layer(40, 64, QuantSpec(4, 32), CPU, torch.float32, bias=True, activation="gelu")
    assert moved_bytes(fused, 3, torch.float32) == words + scales + zeros + 40 * 4 + 3 * (64 + 40) * 4
    assert operations(3, 40, 64) == 2 * 3 * 40 * 64


@pytest.mark.parametrize("spec", [QuantSpec(3, 32), QuantSpec(4, -1, symmetric=True)], ids=str)
def test_a_twin_computes_the_same_in_memory_of_its_own(spec: QuantSpec) -> None:
    layer = random_layer(24, 72, spec, CPU, torch.float32, bias=True, activation="gelu")
    other = twin(layer)
    x = torch.randn(5, 72)
    assert torch.equal(other(x), layer(x))
    assert other.weight_runtime.data_ptr() != layer.weight_runtime.data_ptr()
    layer.scale_runtime.zero_()
    assert other(x).abs().max() > 1


def test_rows_follow_from_their_times(setting: Setting) -> None:
    rows = list(bench_gemm(setting, named(["64x136", "24x64"]), (2, 7), (-1, 32), (1, 5)))
    assert [(r["shape"], r["group"], r["bits"], r["m"]) for r in rows[:4]] == [
        ("64x136", -1, 2, 1),
        ("64x136", -1, 7, 1),
        ("64x136", -1, 2, 5),
        ("64x136", -1, 7, 5),
    ]
    assert len(rows) == 16
    for row in rows:
        assert row["us_min"] <= row["us_q1"] <= row["us"] <= row["us_q3"]
        assert row["x_torch_fp32"] == row["torch_fp32_us"] / row["us"]
        assert row["x_torch_bf16"] == row["torch_bf16_us"] / row["us"]
        assert row["tflops"] == pytest.approx(2 * row["m"] * row["n"] * row["k"] / row["us"] / 1e6)
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        moving = row["bytes"] / row["read_in_turns_gb_per_s"] / 1e3
        assert row["bandwidth_share"] == pytest.approx(moving / row["us"])
        multiplying = 2 * row["m"] * row["n"] * row["k"] / row["matmul_tflops"] / 1e6
        assert row["limit_us"] == pytest.approx(max(moving, multiplying))
        assert row["share_of_limit"] == pytest.approx(row["limit_us"] / row["us"])
        assert row["rotated_bytes"] >= setting.rotated_bytes
        assert row["kernel"].startswith(row["backend"])


def test_all_that_is_compared_takes_turns(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    timed = Setting.timed

    def noted(self, calls):
        asked.append(list(calls))
        return timed(self, calls)

    monkeypatch.setattr(Setting, "timed", noted)
    rows = list(bench_gemm(setting, named(["64x128"]), (3, 4), (32,), (1, 5), rounded=True, against=True))
    assert len(rows) == 4 and len(asked) == 2
    ours = {"packed 3", "a8 3", "packed 4", "a8 4", "torch_int4pack 4"}
    for turn in asked:
        assert {"fp32", "bf16", "reading"} | ours <= set(turn)
    assert rows[0]["torch_bf16_us"] == rows[1]["torch_bf16_us"]
    assert "torch_int4pack_us" not in rows[0] and rows[1]["torch_int4pack_us"] > 0


def test_fused_row_has_bias_and_activation(setting: Setting) -> None:
    (row,) = bench_gemm(setting, named(["64x136"]), (4,), (32,), (3,), activation="gelu")
    (plain,) = bench_gemm(setting, named(["64x136"]), (4,), (32,), (3,))
    assert row["activation"] == "gelu"
    assert row["bytes"] == plain["bytes"] + 64 * 4


def test_overhead_has_both_sides(setting: Setting) -> None:
    (row,) = bench_overhead(setting, (4,), size=64)
    assert row["host_us"] > 0
    assert row["torch_host_us"] > 0


def test_shapes_by_name_family_and_size() -> None:
    assert [shape.name for shape in named(["vit.fc1", "siglip"])] == ["vit.fc1", "siglip.fc1", "siglip.fc2"]
    assert named(["12x34"])[0][1:] == (12, 34)
    assert SHAPES["qwen.down"].k % 8 == 4
    assert list(TOKENS) == sorted(TOKENS)
    with pytest.raises(ValueError, match=r"a shape must be NxK, one of vit, .*, or one of their layers .*, got 'vat'"):
        named(["vat"])


def test_other_backends_are_timed_beside(setting: Setting) -> None:
    rows = list(bench_gemm(setting, named(["64x136"]), (4,), (32,), (1, 5), beside=("reference",)))
    for row in rows:
        assert row["reference_us"] > 0 and not row["kernel"].startswith("reference")
        assert row["reference_x_torch_fp32"] == row["torch_fp32_us"] / row["reference_us"]
    with pytest.raises(RuntimeError, match="'cuda' was asked for but cannot serve"):
        list(bench_gemm(setting, named(["24x64"]), (4,), (32,), (1,), beside=("cuda",)))


def test_rounded_activations_and_the_limits_of_the_same_run(setting: Setting) -> None:
    (row,) = bench_gemm(setting, named(["64x128"]), (4,), (32,), (5,), rounded=True, against=True)
    assert row["x_a8"] == row["us"] / row["a8_us"]
    assert row["peak_int8_tops"] == setting.limits.int8_tops
    assert row["torch_int4pack_us"] > 0
    assert ("ort_a8_us" in row) == (why_no_ort() is None)


def test_others_are_compared_only_where_they_can_be(setting: Setting) -> None:
    assert peers(setting, 64, 136, 4, 128) == {}
    assert peers(setting, 64, 128, 3, 32) == {}
    assert "torch_int4pack" not in peers(setting, 64, 128, 8, 32)


def test_alternating_and_packing_rows(setting: Setting) -> None:
    (row,) = bench_alternating(setting, size=128)
    assert row["overhead"] == pytest.approx(row["us"] / (row["torch_us"] + row["packed_us"]) - 1)
    (row,) = bench_packing(setting, (3,), 16384, rounds=2)
    assert (row["n"], row["k"]) == (2, 8192)
    assert row["pack_seconds_per_1e9"] == pytest.approx(row["us"] * 1e3 / 16384)
    assert "s per 1e9" in line(row)


@pytest.mark.skipif(not _native.available(), reason="no compiled extension")
def test_peaks_count_what_they_do() -> None:
    for kind, each in ((0, (8, 16)), (1, (8, 16, 32)), (2, (32, 64))):
        done = _native.module().multiply_adds(kind, 10, 2)
        assert done in (0, *(10 * 2 * 12 * width for width in each))
    with pytest.raises(ValueError, match="kind must be 0"):
        _native.module().multiply_adds(3, 10, 1)
