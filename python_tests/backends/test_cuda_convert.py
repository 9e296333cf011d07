"""Codes, streams, tiles and dense weights of the CUDA backend: bit for bit as packing.py and the layout say."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from torch import Tensor

from mmq_kernels import packing
from mmq_kernels.backends import PackedWeight
from mmq_kernels.spec import BITS, QuantSpec

SHAPES = ((1, 1), (64, 64), (70, 200), (5, 33), (130, 31))
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def tiles_by_the_drawing(codes: Tensor, bits: int) -> Tensor:
    """The layout as csrc/cuda/layout.cuh draws it, one field after another, in plain Python."""
    n, k = codes.shape
    n_tiles, k_tiles = -(-n // 64), -(-k // 64)
    padded = torch.zeros(64 * n_tiles, 64 * k_tiles, dtype=torch.int64)
    padded[:n, :k] = codes
    shifts = 4 if bits <= 3 else 2 if bits <= 6 else 1
    fields: list[tuple[int, int, int, int, int, int]] = []  # row, column, low, width, word of the tile, bit
    for row_tile in range(4):
        for pair in range(16):
            step, i = divmod(pair, 4)
            for lane in range(32):
                for half in range(2):
                    row = 16 * row_tile + lane // 4 + 8 * (i % 2)
                    column = 16 * step + 2 * (lane % 4) + 8 * (i // 2) + half
                    low = 0
                    for width in PLANES[bits]:
                        turn = pair % (16 // width) // shifts
                        per_turn = 8 // shifts // width
                        rotation = width * (turn % per_turn) + 8 * (turn // per_turn)
                        flat = row_tile * width + pair * width // 16
                        word = (low + flat // 4) * 128 + 4 * lane + flat % 4
                        bit = (pair % shifts * (8 // shifts) + low + rotation + 16 * half) % 32
                        fields.append((row, column, low, width, word, bit))
                        low += width
    row, column, low, width, word, bit = torch.tensor(fields).t()
    out = torch.zeros(n_tiles, k_tiles, bits * 128, dtype=torch.int64)
    for i in range(n_tiles):
        for j in range(k_tiles):
            tile = padded[64 * i : 64 * i + 64, 64 * j : 64 * j + 64]
            value = (tile[row, column] >> low) & ((1 << width) - 1)
            out[i, j].index_add_(0, word, value << bit)
    return (out - ((out >> 31) << 32)).to(torch.int32).view(n_tiles, k_tiles, bits, 128)


@pytest.mark.parametrize("bits", BITS)
def test_tiles_are_as_drawn_and_invertible(bits, machine) -> None:
    for n, k in SHAPES:
        case = Case(QuantSpec(bits, 16), n, k, torch.float16, owner=machine.backend, device=machine.device)
        assert torch.equal(case.runtime.weight.cpu(), tiles_by_the_drawing(case.codes, bits))
        shapes = machine.backend.runtime_shapes(case.spec, n, k)
        assert [tuple(part.shape) for part in case.runtime] == list(shapes)
        back = machine.backend.unprepack(case.runtime, case.spec, n, k)
        for got, want in zip(back, case.packed, strict=True):
            assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_in_every_place(bits, machine) -> None:
    """A tile that counts through the codes, begun at different ones."""
    spec = QuantSpec(bits, -1, True)
    for value in range(min(16, 2**bits)):
        codes = ((torch.arange(64 * 64).view(64, 64) * 7 + value) % 2**bits).to(torch.uint8)
        words = packing.pack_stream(codes, bits)
        packed = (words.to(machine.device), torch.ones(64, 1, device=machine.device), None)
        runtime = machine.backend.prepack(PackedWeight(*packed), spec, 64, 64)
        dense = machine.backend.dequantize(runtime, spec, 64, 64, "cuda", torch.float32)
        assert torch.equal(dense.cpu(), codes.float() - 2 ** (bits - 1))


@pytest.mark.parametrize("bits", BITS)
def test_pack_and_unpack_equal_the_normative_ones(bits, machine) -> None:
    for n, k in SHAPES:
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        words = machine.backend.pack(codes.to(machine.device), bits)
        assert torch.equal(words.cpu(), packing.pack_stream(codes, bits))
        assert torch.equal(machine.backend.unpack(words, bits, k).cpu(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_exact(bits, machine) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for i, (n, k) in enumerate(((1, 1), (64, 64), (70, 200), (5, 33), (20, 100))):
        for group in (-1, 16, 48):
            spec, dtype = QuantSpec(bits, group, i % 2 == 0), dtypes[(i + group) % 3]
            case = Case(spec, n, k, dtypes[i % 3], owner=machine.backend, device=machine.device)
            got = machine.backend.dequantize(case.runtime, spec, n, k, "cuda", dtype)
            assert torch.equal(got.cpu(), case.dense.float().to(dtype))
