"""What the compiler made of the CUDA kernels, for each GPU of the wheel: wide loads, tensor cores, no spills."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from mmq_kernels import _native
from mmq_kernels.spec import BITS

ARCHS = tuple((_native.build_info()["cuda_archs"] or "").split(";")) if _native.available() else ()
ARCHS = tuple(arch for arch in ARCHS if arch)


def tool(name: str) -> str | None:
    """A disassembler: of the package nvidia-cuda-NAME, or of the PATH."""
    for folder in sys.path:
        found = sorted(Path(folder).glob(f"nvidia/cu*/bin/{name}")) if folder else []
        if found:
            return str(found[-1])
    return shutil.which(name)


CUOBJDUMP, NVDISASM = tool("cuobjdump"), tool("nvdisasm")
MISSING = None
if not ARCHS:
    MISSING = "the extension was built without CUDA"
elif not CUOBJDUMP or not NVDISASM:
    MISSING = "no cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)"
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def dump(*options: str) -> str:
    assert CUOBJDUMP and NVDISASM
    path = {"PATH": f"{Path(NVDISASM).parent}:/usr/bin:/bin"}
    command = [CUOBJDUMP, *options, _native.module().__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=path).stdout


@cache
def resources(arch: str) -> dict[str, dict[str, int]]:
    """Registers and bytes of stack of each kernel, by its mangled name."""
    pattern = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
    found = pattern.findall(dump("-res-usage", "-arch", f"sm_{arch}"))
    return {name: {"registers": int(r), "stack": int(s), "local": int(loc)} for name, r, s, loc in found}


def kernel(arch: str, dtype: str, bits: int, token_tiles: int) -> str:
    """Mangled name of a product kernel."""
    names = [n for n in resources(arch) if f"gemm_kernelINS_{len(dtype)}{dtype}ELi{bits}ELi{token_tiles}EE" in n]
    assert len(names) == 1, names
    return names[0]


def instructions(arch: str, *names: str) -> list[str]:
    """Mnemonics of kernels with their modifiers."""
    listing = dump("-sass", "-arch", f"sm_{arch}", "-fun", ",".join(names))
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_there_and_none_spills(arch) -> None:
    for dtype in ("Half", "BFloat"):
        for bits in BITS:
            for token_tiles in (1, 2, 4, 11):
                used = resources(arch)[kernel(arch, dtype, bits, token_tiles)]
                assert used["stack"] == used["local"] == 0, (dtype, bits, token_tiles)
                # As gemm_plan.h counts on it: two blocks of 256 threads share 65,536 registers, or one has them all.
                assert used["registers"] <= (128 if token_tiles == 1 else 255)
    others = [name for name in resources(arch) if "gemm_kernel" not in name]
    words = (
        "gptq_",
        "rtn_",
        "search_",
        "descend_",
        "dequantize_",
        "14prepack_",
        "16unprepack_",
        "11pack_",
        "13unpack_",
    )
    for word in (*words, "probe_"):
        assert any(word in name for name in others), word
    assert all(resources(arch)[name]["stack"] == 0 for name in others)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "bits", "token_tiles"), [("Half", 4, 1), ("BFloat", 3, 11), ("Half", 8, 4)])
def test_products_use_tensor_cores_and_wide_copies(arch, dtype, bits, token_tiles) -> None:
    found = instructions(arch, kernel(arch, dtype, bits, token_tiles))

    def count(*words: str) -> int:
        return sum(all(word in instruction.split(".") for word in words) for instruction in found)

    variants, steps, row_tiles = 2, 4, 2  # with one group in a tile, and with several
    assert count("HMMA", "16816", "F32") == variants * steps * row_tiles * token_tiles
    assert count("LDSM", "4") == variants * 2 * token_tiles
    assert count("LDGSTS", "128") >= 2, "weights and tokens are copied by 16 bytes"
    assert count("STG", "128") >= 1, "rows of y are stored by 16 bytes"
    assert count("LDL") == count("STL") == 0
    assert bits != 3 or count("LDGSTS", "64") >= 1, "half a vector of the plane of width 1"


@pytest.mark.parametrize("arch", ARCHS)
def test_quantizers_keep_their_rows_in_registers(arch) -> None:
    names = [name for name in resources(arch) if re.search("(gptq|rtn|search|descend)_kernel", name)]
    found = instructions(arch, *names)
    assert not any(instruction.startswith(("LDL", "STL")) for instruction in found)


def test_ptx_of_the_oldest_architecture_is_in_the_wheel() -> None:
    """Drivers compile it for GPUs that no machine code fits, older than some of them and newer than all."""
    oldest = min(int(arch.rstrip("af")) for arch in ARCHS)
    assert f"sm_{oldest}." in dump("--list-ptx")
