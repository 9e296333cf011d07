"""What every mutant of the CUDA sources must fail: run by test_cuda_mutants.py in a process of its own.

`outcome` exits with 0 when nothing was found, with CAUGHT and a line in a file that says what otherwise.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from cases import Case
from emulation import POLICIES, EmulatedBackend, load
from test_cpu_quantizers import hard_weight, inverse_factor
from test_cuda_convert import tiles_by_the_drawing
from test_cuda_descent import moved_group

from mmq_kernels.backends import backend, transformed
from mmq_kernels.spec import QuantSpec

CAUGHT = 3
DTYPES = (torch.float16, torch.bfloat16)


def expect(condition: object, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def products(emulated: EmulatedBackend, bits: int) -> None:
    """Integers and power-of-two scales: every output must be exact."""
    shapes = (
        (3, 70, 200, 16),
        (12, 33, 100, -1),
        (20, 257, 72, 32),
        (95, 64, 136, 48),
        (5, 40, 640, 64),
        (38, 300, 330, 32),
    )
    for i, (m, n, k, group) in enumerate(shapes):
        case = Case(QuantSpec(bits, group), n, k, torch.float16, power_of_two=True, owner=emulated)
        dtype = DTYPES[i % 2]
        x, bias = torch.randint(-2, 3, (m, k)).to(dtype), torch.randint(-4, 5, (n,)).to(dtype)
        for perm in (None, torch.randperm(k).int()):
            got = emulated.gemm(x, case.runtime, bias, case.spec, n, "cuda", "relu", perm)
            want = (transformed(x, perm, None).double() @ case.dense.t() + bias.double()).clamp(min=0).to(dtype)
            expect(torch.equal(got, want), f"product of {m} x {n} x {k}, {case.spec}")


def shared_tiles(emulated: EmulatedBackend, bits: int) -> None:
    """Tiles cut between blocks, twice over the same counters."""
    for m, n, k in ((3, 64, 1024), (40, 600, 448)):
        case = Case(QuantSpec(bits, 64), n, k, torch.float16, power_of_two=True, owner=emulated)
        plan = emulated._native().gemm_plan(bits, 64, m, n, k, 1, 0)
        expect(plan["counters"] > 0, "this shape is there to be cut")
        counters = torch.zeros(plan["counters"], dtype=torch.int32)
        emulated._take_counters = lambda count, device, held=counters: held[:count]  # type: ignore[method-assign]
        for _ in range(2):
            x = torch.randint(-2, 3, (m, k)).half()
            got = emulated.gemm(x, case.runtime, None, case.spec, n, "cuda", "none")
            expect(torch.equal(got, (x.double() @ case.dense.t()).half()), f"cut product of {m} x {n} x {k}")
        expect(not counters.any(), "counters left at zero")


def conversions(emulated: EmulatedBackend, bits: int) -> None:
    for n, k in ((70, 200), (5, 33)):
        case = Case(QuantSpec(bits, 16), n, k, torch.float16, owner=emulated)
        expect(torch.equal(case.runtime.weight, tiles_by_the_drawing(case.codes, bits)), "tiles as drawn")
        back = emulated.unprepack(case.runtime, case.spec, n, k)
        expect(torch.equal(back.words, case.packed.words), "tiles -> words")
        dense = emulated.dequantize(case.runtime, case.spec, n, k, "cuda", torch.float32)
        expect(torch.equal(dense, case.dense.float()), "dequantize")
        expect(torch.equal(emulated.pack(case.codes, bits), case.packed.words), "pack")
        expect(torch.equal(emulated.unpack(case.packed.words, bits, k), case.codes), "unpack")


def quantizers(emulated: EmulatedBackend, bits: int) -> None:
    reference = backend("reference")
    for n, k, group in ((19, 100, 32), (37, 128, 16), (9, 300, -1)):
        spec, weight = QuantSpec(bits, group), hard_weight(n, k)
        got = emulated.quantize_rtn(weight, spec, torch.float16)
        pairs = zip(got, reference.quantize_rtn(weight, spec, torch.float16), strict=True)
        expect(all(torch.equal(a, b) for a, b in pairs), "quantize_rtn")
        if k > 128:
            continue
        arguments = (weight, inverse_factor(k), None, None, spec, torch.float16)
        pairs = zip(emulated.gptq_block(*arguments), reference.gptq_block(*arguments), strict=True)
        expect(all(torch.equal(a, b) for a, b in pairs), "gptq_block")


def descents(emulated: EmulatedBackend, bits: int) -> None:
    cpu = backend("cpu")
    for n, columns, symmetric in ((37, 20, False), (3, 128, True)):
        spec = QuantSpec(bits, -1, symmetric)
        group = moved_group(n, columns, spec, torch.float16)
        pairs = zip(
            emulated.descend(*group, spec, torch.float16), cpu.descend(*group, spec, torch.float16), strict=True
        )
        expect(all(torch.equal(a, b) for a, b in pairs), "descend")
        arguments = (torch.randn(n, columns), torch.rand(columns) + 0.1, spec, torch.float16)
        pairs = zip(emulated.search_grid(*arguments), cpu.search_grid(*arguments), strict=True)
        expect(all(torch.equal(a, b) for a, b in pairs), "search_grid")


def outcome(module: Path, bits: int, log: Path) -> None:
    """Of the module of emulated kernels in a file, for one width; ends the process."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    emulated = EmulatedBackend(load(module))
    for seed, policy in enumerate(POLICIES):
        torch.manual_seed(seed)
        random.seed(seed)
        for work in (conversions, products, shared_tiles, quantizers, descents):
            # Five multiprocessors cut the tiles of `shared_tiles` so that shares end and begin inside of tiles.
            with emulated.scheduled(policy, seed, resident_blocks=5, multiprocessors=5 if work is shared_tiles else 2):
                try:
                    work(emulated, bits)
                except (AssertionError, RuntimeError) as error:
                    log.write_text(f"{work.__name__}, {policy}: {error}")
                    sys.exit(CAUGHT)
            vars(emulated).pop("_take_counters", None)
