"""Builds `mmq_kernels._C` from `csrc` with ninja: C++17 for every CPU, CUDA where nvcc is found, no torch headers.

Environment:
    MMQ_BUILD       "none" installs pure Python (the reference backend only); "all" (default) compiles
    MMQ_CUDA        "auto" (default) compiles csrc/cuda where nvcc is found, "on" insists, "off" leaves it out
    MMQ_CUDA_ARCHS  compute capabilities, ";" between them; the least also as PTX, for GPUs that none of them fits
    MMQ_CPU_UP_TO   the best instruction set to compile for: avx512_bf16 (default), avx512_vnni, avx512, avx2 or scalar
    MMQ_SANITIZE    sanitizers of the C++ compiler, "address,undefined"; `make sanitize` says how to run what comes out
    MMQ_EMULATE     "avx512" compiles its kernels for a CPU that has AVX2 alone, slowly, to be tested: `make emulate`
    CXX, MAX_JOBS   the C++ compiler; how many compilations at a time
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ARCHS = "80;89;90a;100;120"
ISAS = ("avx512_bf16", "avx512_vnni", "avx512", "avx2", "scalar")
"""Instruction sets of x86-64, the best first."""
CXX_FLAGS = (
    # Contraction would fuse a multiplication and a subtraction that the reference rounds one by one.
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fopenmp -Wall -Wextra"
)

NVCC_FLAGS = (
    # As for the CPU: what is rounded once stays rounded once; kernels say fmaf where they mean it.
    "-std=c++17 -O3 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden"
)


def choice(name: str, values: tuple[str, ...]) -> str:
    """Environment variable `name`, the first of `values` where it is not set."""
    got = os.environ.get(name) or values[0]
    if got not in values:
        sys.exit(f"{name} must be one of {', '.join(values)}, got {got!r}")
    return got


def isas() -> tuple[str, ...]:
    """Instruction sets to compile for, the best first."""
    return ISAS[ISAS.index(choice("MMQ_CPU_UP_TO", ISAS)) :]


def cpu_sources() -> list[Path]:
    """csrc/cpu/*.cpp but for NAME_ISA.cpp of instruction sets that are left out."""
    left_out = set(ISAS) - set(isas())
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    return [source for source in sources if source.stem.partition("_")[2] not in left_out]


def nvccs() -> list[Path]:
    """nvcc of CUDA_HOME, of the PATH, and of the usual folder, as far as they exist."""
    home, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(on_path).resolve()] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return [path for path in candidates if path.is_file()]


def find_runtime(nvcc: Path) -> Path | None:
    """Folder of the static CUDA runtime that belongs to `nvcc`."""
    home = nvcc.parent.parent
    folders = [home / "lib64", home / "lib", *sorted((home / "targets").glob("*/lib"))]
    return next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)


def cuda_toolkit() -> tuple[Path, Path] | None:
    """nvcc and the folder of its runtime, or None where CUDA is left out."""
    wanted = choice("MMQ_CUDA", ("auto", "on", "off"))
    if wanted == "off":
        return None
    for nvcc in nvccs():  # one on the PATH may be a script that stands apart from its toolkit
        runtime = find_runtime(nvcc)
        if runtime:
            return nvcc, runtime
    missing = "nvcc with libcudart_static.a (CUDA_HOME, PATH, /usr/local/cuda)"
    if wanted == "on":
        sys.exit(f"MMQ_CUDA=on needs {missing}, found none; install the CUDA toolkit or set MMQ_CUDA=off")
    print(f"without CUDA: found no {missing}")
    return None


def cuda_archs(nvcc: Path) -> list[str]:
    """Compute capabilities to compile for: those asked for, or those of the default that this nvcc knows."""
    asked = os.environ.get("MMQ_CUDA_ARCHS")
    archs = [arch.strip() for arch in (asked or ARCHS).split(";") if arch.strip()]
    for arch in archs:
        if not arch.rstrip("af").isdigit():
            sys.exit(f'MMQ_CUDA_ARCHS must be capabilities like "80;90a", got {arch!r}')
    if asked:
        return archs
    known = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    kept = [arch for arch in archs if f"sm_{arch.rstrip('af')}" in known]
    if kept != archs:
        print(f"{nvcc} knows only {', '.join(known)}: compiling for {', '.join(kept)}")
    return kept


def is_product(source: Path) -> bool:
    """Whether a source holds the products of one width, which take most of the time of a build."""
    return source.name.startswith("gemm_") and source.name.endswith("bit.cu")


def gencode(archs: list[str], one_ptx: bool) -> str:
    """nvcc's flags: machine code of each capability, and PTX of the least.

    Machine code from one PTX takes half the time where PTX takes long to make, and no kernel asks what it is compiled
    for; but one kernel spills without a PTX for each.
    """
    least = min(int(arch.rstrip("af")) for arch in archs)
    virtual = [(f"compute_{least if one_ptx else arch}", f"sm_{arch}") for arch in archs]
    pairs = [*virtual, (f"compute_{least}", f"compute_{least}")]
    return " ".join(f"-gencode arch={arch},code={code}" for arch, code in pairs)


KERNELS = ("gemm", "integer")
"""Beginnings of the sources whose loops are unrolled: with each check written out they compile for many minutes."""

WITHOUT_DOUBLES = "-fno-sanitize=null,object-size,pointer-overflow,alignment"
"""What AddressSanitizer sees of pointers is not checked twice."""

SIMPLE_REGISTERS = "--param ira-max-conflict-table-size=0"
"""Where checks are inline, GCC takes longer to choose registers well than for all the rest; the loops run no slower."""

CHECKS_OF_KERNELS = f"-Og --param asan-instrumentation-with-call-threshold=0 -Wno-uninitialized {WITHOUT_DOUBLES}"
"""Reads and writes are checked by calls, and what was unrolled is not optimized much. GCC 12 then takes the registers
that intrinsics leave undefined for mistakes."""


CHECKS_OF_AVX2 = f"{WITHOUT_DOUBLES} {SIMPLE_REGISTERS} -DMMQ_CHECK_REGIONS"
"""The whole suite runs through AVX2's products: there checks are inline, but for the loop of csrc/cpu/regions.h."""


def checks(stem: str) -> str:
    """Flags of a sanitized source of kernels."""
    return CHECKS_OF_AVX2 if stem == "gemm_avx2" else CHECKS_OF_KERNELS


def special() -> tuple[str, str]:
    """What a build for tests adds to its name and to the flags, "-name" and " -flags"; the usual one adds nothing."""
    name = flags = ""
    if sanitizers := os.environ.get("MMQ_SANITIZE"):
        name += f"-{sanitizers.replace(',', '-')}"
        # Stops at the first thing that is found. Less optimization: it compiles and runs in CI's time.
        flags += f" -fsanitize={sanitizers} -fno-sanitize-recover=all -g1 -O1"
    if choice("MMQ_EMULATE", ("none", "avx512")) == "avx512":
        name += "-avx512"
        flags += " -DMMQ_EMULATE_AVX512 -O1"
    return name, flags


def escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildNative(build_ext):
    """Writes one build.ninja and runs it: parallel, incremental, and the same for every way to install."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not `build_temp`: editable installs make a new one each time, and nothing would be incremental.
        name, special_flags = special()
        build = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}{name}"
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        toolkit = cuda_toolkit()
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        self.write_config(build / "build_config.h", cuda_archs(toolkit[0]) if toolkit else [])
        (build / "build.ninja").write_text(self.rules(includes, toolkit, build, target, special_flags))
        self.run_ninja(build)

    def write_config(self, path: Path, archs: list[str]) -> None:
        """What the module says about its build; rewritten only when it changed, so that nothing recompiles."""
        lines = ["#pragma once", f'#define MMQ_VERSION "{self.distribution.get_version()}"']
        if archs:
            lines.append(f'#define MMQ_CUDA_ARCHS "{";".join(archs)}"')
        text = "\n".join(lines) + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)

    def rules(
        self, includes: list, toolkit: tuple[Path, Path] | None, build: Path, target: Path, special_flags: str
    ) -> str:
        """The build.ninja."""
        # Only the bindings see these: an isolated build has pybind11 in another folder each time, and the kernels
        # must not recompile for that. -MMD lists no system headers, so build_config.h comes by -I.
        flags = " ".join([f"-I{escape(build)}", *(f"-isystem {escape(folder)}" for folder in includes)])
        link = f"-shared -fopenmp -Wl,--as-needed{special_flags}"
        bindings = [ROOT / "csrc" / name for name in ("bindings.cpp", "repeated.cpp")]
        sources = [*bindings, *cpu_sources()]
        lines = [
            f"cxx = {os.environ.get('CXX') or 'c++'}",
            "rule cxx",
            f"  command = $cxx -MMD -MF $out.d {CXX_FLAGS}{special_flags} $includes -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
        ]
        archs = cuda_archs(toolkit[0]) if toolkit else []
        if toolkit:
            nvcc, runtime = toolkit
            lines += [
                "rule nvcc",
                f"  command = {escape(nvcc)} -ccbin $cxx -MD -MF $out.d {NVCC_FLAGS} $codes -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = nvcc $in",
            ]
            # Longest first: the products take minutes, the rest fills up the cores.
            cuda = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: (not is_product(path), path))
            hosts = [ROOT / "csrc" / "bindings_cuda.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))]
            sources = [*cuda, *sources, *hosts]
            # Hidden: torch may hold a CUDA runtime of its own.
            link += f" -L{escape(runtime)} -Wl,--exclude-libs,ALL"
        libraries = "-lcudart_static -ldl -lrt -lpthread" if toolkit else ""
        lines += ["rule link", f"  command = $cxx $in -o $out {link} {libraries}", "  description = link $out"]
        objects = []
        for source in sources:
            item = escape(build / (source.relative_to(ROOT / "csrc").as_posix().replace("/", "_") + ".o"))
            lines.append(f"build {item}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {escape(source)}")
            if source.suffix == ".cu":
                lines.append(f"  codes = {gencode(archs, one_ptx=is_product(source))}")
            elif source.parent.name == "csrc":
                lines.append(f"  includes = {flags}")
            elif source.stem == "kernels":
                lines.append(f"  includes = -DMMQ_BEYOND_SCALAR={isas().index('scalar')}")
            elif "-fsanitize" in special_flags and source.stem.startswith(KERNELS):
                lines.append(f"  includes = {checks(source.stem)}")
            objects.append(item)
        lines += [f"build {escape(target)}: link {' '.join(objects)}", f"default {escape(target)}", ""]
        return "\n".join(lines)

    def run_ninja(self, build: Path) -> None:
        from ninja import BIN_DIR  # not another one of the PATH: versions do not read each other's logs

        jobs = os.environ.get("MAX_JOBS")
        command = [str(Path(BIN_DIR) / "ninja"), "-C", str(build), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit(
                "compiling csrc failed (see above); MMQ_BUILD=none installs without compiled kernels,"
                " MMQ_CUDA=off without CUDA"
            )


native = choice("MMQ_BUILD", ("all", "none")) == "all"
# `depends` brings csrc into source distributions; what recompiles, ninja finds out by itself.
files = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
setup(
    ext_modules=[Extension("mmq_kernels._C", sources=[], depends=files)] if native else [],
    cmdclass={"build_ext": BuildNative},
)
