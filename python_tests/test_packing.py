"""The normative layouts, against a bit-by-bit definition that shares no code with the package."""

import pytest
import torch

from mmq_kernels import packing
from mmq_kernels.spec import BITS, QuantSpec

K = (1, 2, 7, 8, 15, 16, 31, 32, 33, 64, 100)


def stream_by_definition(codes: list[int], bits: int) -> list[int]:
    """Code i at bit i*bits of one LSB-first stream, cut into signed 32-bit words."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    unsigned = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(words)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


def every_code(bits: int, n: int, k: int) -> torch.Tensor:
    """All codes, in every position as n grows; 0 and the largest code sit at both ends."""
    codes = (torch.arange(n * k) * 7 + torch.arange(n * k) // k).remainder(2**bits).view(n, k)
    codes[0, 0], codes[0, -1] = 0, 2**bits - 1
    return codes.to(torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", K)
def test_stream_is_the_definition(bits, k) -> None:
    codes = every_code(bits, 19, k)
    words = packing.pack_stream(codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [stream_by_definition(row, bits) for row in codes.tolist()]
    assert torch.equal(packing.unpack_stream(words, bits, k), codes)


@pytest.mark.parametrize("bits", BITS)
def test_stream_round_trips_every_code_in_every_position(bits) -> None:
    k = 64
    for shift in range(2**bits):
        codes = ((torch.arange(k) + shift) % 2**bits).to(torch.uint8).view(1, k)
        assert torch.equal(packing.unpack_stream(packing.pack_stream(codes, bits), bits, k), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", K)
def test_planes_hold_the_bits_they_say(bits, k) -> None:
    codes = every_code(bits, 5, k)
    planes = packing.pack_planes(codes, bits)
    assert planes.shape == (QuantSpec(bits).plane_words(k), 5)
    row, low = 0, 0
    for width in QuantSpec(bits).planes:
        per_word = 32 // width
        for column in range(k):
            word = planes[row + column // per_word].long() & 0xFFFFFFFF
            field = (word >> (column % 2 * 16 + column % per_word // 2 * width)) & (2**width - 1)
            assert torch.equal(field, (codes[:, column].long() >> low) & (2**width - 1))
        row, low = row - (-k // per_word), low + width
    assert torch.equal(packing.unpack_planes(planes, bits, k), codes)


def test_large_matrices_are_packed_in_slices(monkeypatch) -> None:
    codes = every_code(3, 50, 40)
    whole = packing.pack_stream(codes, 3)
    monkeypatch.setattr(packing, "_ROWS_AT_ONCE", 80)
    assert torch.equal(packing.pack_stream(codes, 3), whole)
    assert torch.equal(packing.unpack_stream(whole, 3, 40), codes)
