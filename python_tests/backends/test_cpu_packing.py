"""The compiled packing against torch's (`mmq_kernels.packing`), bit for bit, for every width."""

import pytest
import torch
from cases import CPU, ISAS, NO_EXTENSION, Case

from mmq_kernels import packing
from mmq_kernels.spec import BITS, QuantSpec, ceil_div

pytestmark = pytest.mark.skipif(not ISAS, reason=NO_EXTENSION)

SHAPES = [(1, 1), (1, 33), (5, 8), (16, 31), (17, 32), (33, 100), (40, 257), (0, 8), (3, 0)]


def random_codes(bits: int, n: int, k: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n, k", SHAPES)
def test_streams_equal_those_of_torch(bits, n, k) -> None:
    codes = random_codes(bits, n, k)
    words = CPU.pack(codes, bits)
    assert torch.equal(words, packing.pack_stream(codes, bits))
    assert torch.equal(CPU.unpack(words, bits, k), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_at_every_position(bits) -> None:
    """Row c holds code c everywhere, so every code straddles every word boundary there is."""
    codes = torch.arange(2**bits, dtype=torch.uint8)[:, None].expand(-1, 64).contiguous()
    assert torch.equal(CPU.pack(codes, bits), packing.pack_stream(codes, bits))
    assert torch.equal(CPU.unpack(CPU.pack(codes, bits), bits, 64), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n, k", [shape for shape in SHAPES if min(shape) > 0])
def test_layout_is_units_of_32_columns_tiled_by_16_rows(bits, n, k) -> None:
    """As csrc/README.md draws them: byte b of a unit's words holds columns b, 4 + b, ..., 28 + b, plane after plane."""
    spec = QuantSpec(bits, 8)
    case = Case(spec, n, k, torch.float16)
    tiles, units = ceil_div(n, 16), ceil_div(k, 32)
    codes = torch.nn.functional.pad(case.codes.long(), (0, 32 * units - k, 0, 16 * tiles - n))
    columns = codes.view(tiles, 16, units, 8, 4).permute(0, 2, 1, 4, 3)  # tile, unit, row, byte, step
    planes, low = [], 0
    for width in spec.planes:
        # The steps' fields of a byte follow each other, lowest bits first, through as many bytes as a field has bits.
        fields = columns.reshape(*columns.shape[:-1], width, 8 // width) >> low & 2**width - 1
        in_bytes = (fields << width * torch.arange(8 // width)).sum(-1)  # tile, unit, row, byte, word
        planes.append((in_bytes << 8 * torch.arange(4).view(4, 1)).sum(3))  # tile, unit, row, word
        low += width
    expected = torch.cat(planes, 3).transpose(2, 3).reshape(tiles, units * bits, 16)
    assert torch.equal(case.runtime.weight.long() & 0xFFFFFFFF, expected)
    for tensor, shape in zip(case.runtime, CPU.runtime_shapes(spec, n, k), strict=True):
        assert tensor.shape == shape


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n, k", [(1, 1), (5, 40), (16, 64), (33, 100)])
def test_unprepack_inverts_prepack(bits, symmetric, n, k) -> None:
    case = Case(QuantSpec(bits, 32, symmetric), n, k, torch.bfloat16)
    back = CPU.unprepack(case.runtime, case.spec, n, k)
    for got, expected in zip(back, case.packed, strict=True):
        assert (got is None and expected is None) or torch.equal(got, expected)
