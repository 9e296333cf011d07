"""A region checked before a loop is as good as its loads checked: csrc/cpu/regions.h under AddressSanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = os.environ.get("CXX") or "c++"
CSRC = Path(__file__).resolve().parents[2] / "csrc"

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "cpu/regions.h"

MMQ_REGIONS_CHECKED float total(const float* from, int64_t count) {
    mmq::check_region(from, count);
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += from[i];
    return sum;
}

float on_stack(int64_t count) {
    float numbers[24];
    for (float& number : numbers) number = 1;
    return total(numbers, count);
}

int main(int, char** args) {
    const int64_t count = std::atoll(args[2]);
    float* numbers = new float[24];
    for (int i = 0; i < 24; ++i) numbers[i] = 1;
    std::printf("%g", args[1][0] == 's' ? on_stack(count) : total(numbers, count));
    delete[] numbers;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which(COMPILER):
        pytest.skip(f"no C++ compiler {COMPILER}")
    folder = tmp_path_factory.mktemp("regions")
    source, built = folder / "program.cpp", folder / "program"
    source.write_text(PROGRAM)
    flags = [
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsanitize=address",
        "-DMMQ_CHECK_REGIONS",
        f"-I{CSRC}",
    ]
    done = subprocess.run([COMPILER, *flags, str(source), "-o", str(built)], capture_output=True, text=True)
    if done.returncode != 0 and "asan" in done.stderr:
        pytest.skip("the compiler has no AddressSanitizer")
    assert done.returncode == 0, done.stderr
    return built


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    mine = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # it has its own
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=mine)


@pytest.mark.parametrize("where", ["heap", "stack"])
def test_what_is_the_programs_passes(program: Path, where: str) -> None:
    for count in (0, 1, 24):
        done = run(program, where, str(count))
        assert (done.returncode, done.stdout) == (0, str(count)), done.stderr


@pytest.mark.parametrize("where", ["heap", "stack"])
def test_one_number_more_is_reported(program: Path, where: str) -> None:
    done = run(program, where, "25")
    assert done.returncode != 0
    assert f"{where}-buffer-overflow" in done.stderr and "check_region" in done.stderr
