"""What Triton makes of the kernels for GPUs that are not here: tensor cores, wide loads, no spills."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmq_kernels.backends.triton.configs import Config, default_config
from mmq_kernels.spec import BITS, QuantSpec

MISSING = None
if importlib.util.find_spec("triton") is None:
    MISSING = "triton is not installed"
elif os.environ.get("TRITON_INTERPRET") == "1":
    MISSING = "TRITON_INTERPRET=1: nothing is compiled"
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

if MISSING is None:
    from ahead import compiled_dequantize, compiled_gemm, compiled_gptq, compiled_rtn

TARGETS = ("sm_80", "sm_90", "gfx942")


@pytest.fixture(autouse=True, scope="module")
def _fresh(tmp_path_factory) -> Iterator[None]:
    """Triton keeps what it compiled; here it compiles."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def assert_no_spills(kernel: Any, tmp_path: Path) -> None:
    """No stack and no local memory: on NVIDIA as cuobjdump says, on AMD as the code's own notes do."""
    if "amdgcn" in kernel.asm:
        assert re.findall(r"\.private_segment_fixed_size: (\d+)", kernel.asm["amdgcn"]) == ["0"]
        assert count(r"\.(sgpr|vgpr)_spill_count: 0\b", kernel.asm["amdgcn"]) == 2
        return
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said) == [("0", "0")], said


def assert_dot_and_wide_loads(kernel: Any, target: str) -> None:
    """Tensor-core products, and words of W that come 16 bytes at a time."""
    if target.startswith("gfx"):
        assert count(r"\bv_mfma_f32_\d+x\d+x\d+", kernel.asm["amdgcn"]) >= 4
        assert count(r"\b(global|buffer)_load_dwordx4\b", kernel.asm["amdgcn"]) >= 2
        return
    dot = r"\bwgmma\.mma_async\.sync\.aligned\.m64" if target == "sm_90" else r"\bmma\.sync\.aligned\.m16n8k16"
    assert count(dot, kernel.asm["ptx"]) >= 2
    assert count(r"\bcp\.async\.cg\.shared\.global[^;]*, 0x10, ", kernel.asm["ptx"]) >= 4


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", BITS)
def test_products_use_tensor_cores_and_wide_loads_and_do_not_spill(bits, target, tmp_path) -> None:
    specs = QuantSpec(bits, 128), QuantSpec(bits), QuantSpec(bits, 128, True)
    for m, dtype, spec in zip((1, 64, 257), ("fp16", "bf16", "fp16"), specs, strict=True):
        kernel = compiled_gemm(target, spec, default_config(target, m), dtype, dtype, split=m == 1)
        assert_dot_and_wide_loads(kernel, target)
        assert_no_spills(kernel, tmp_path)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("bits", BITS)
def test_few_tokens_decode_in_the_threads_that_multiply(bits, target) -> None:
    """No decoded weight goes through shared memory: a store of 16 bits there would be one."""
    kernel = compiled_gemm(target, QuantSpec(bits, 128), default_config(target, 1))
    assert count(r"\bst\.shared\S*\.b16\b", kernel.asm["ptx"]) <= 8  # scales may take that way
    stored = compiled_gemm(target, QuantSpec(bits, 128), Config(16, 128, 64, 4, 4, 1))
    assert count(r"\bst\.shared\S*\.b16\b", stored.asm["ptx"]) >= 64, "or the test sees nothing"


@pytest.mark.parametrize("target", [*TARGETS, "sm_100", "sm_120"])
def test_every_kind_of_product_compiles(target) -> None:
    """Groups that end inside of words and steps, fp32, column order and input scale, each epilogue."""
    odd = Config(16, 64, 64, 4, 2, 1)
    for spec, config, options in (
        (QuantSpec(3, 8), odd, {"activation": "relu"}),
        (QuantSpec(7, 24), odd, {"activation": "gelu", "gathered": True}),
        (QuantSpec(5, 32, True), odd, {"activation": "gelu_tanh", "scale": "fp32"}),
        (QuantSpec(4, 128), default_config(target, 1), {"activation": "quick_gelu", "dtype": "fp32"}),
        (QuantSpec(8, 64), default_config(target, 257), {"activation": "silu", "dtype": "bf16", "scale": "bf16"}),
    ):
        assert compiled_gemm(target, spec, config, **options).metadata.shared < 100 * 1024


@pytest.mark.parametrize("target", TARGETS)
def test_other_kernels_load_wide_and_do_not_spill(target, tmp_path) -> None:
    amd = target.startswith("gfx")
    load = r"\b(global|buffer)_load_dwordx4" if amd else r"\bld\.global\S*\.v4\.b32"
    store = r"\b(global|buffer)_store_dwordx4" if amd else r"\bst\.global\S*\.v4\.b32"
    for bits in BITS:
        spec = QuantSpec(bits, 128, bits % 2 == 0)
        kernels = [compiled_dequantize(target, spec), compiled_rtn(target, spec), compiled_gptq(target, spec)]
        for kernel in kernels:
            assert_no_spills(kernel, tmp_path)
        dequantize, rtn = (kernel.asm["amdgcn" if amd else "ptx"] for kernel in kernels[:2])
        assert count(load, dequantize) >= 1 and count(store, dequantize) >= 1
        assert count(load, rtn) >= 1


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_quantizers_round_twice_where_the_reference_does(target) -> None:
    """A fused multiply-add would round ``w - e * h`` once, and give other codes than the reference."""
    for kernel in (compiled_gptq(target, QuantSpec(4, 32)), compiled_rtn(target, QuantSpec(4, 32))):
        assert count(r"\bfma\.rn\.f32\b", kernel.asm["ptx"]) == 0
        assert count(r"\bdiv\.rn\.f32\b", kernel.asm["ptx"]) > 0
