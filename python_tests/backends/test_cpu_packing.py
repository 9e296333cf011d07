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
def test_layout_is_planes_of_words_tiled_by_16_rows(bits, n, k) -> None:
    """As csrc/README.md draws them: a word of a plane of width p holds 32/p columns, lowest bits first."""
    spec = QuantSpec(bits, 8)
    case = Case(spec, n, k, torch.float16)
    codes = torch.nn.functional.pad(case.codes.long(), (0, 0, 0, 16 * ceil_div(n, 16) - n))
    planes, low = [], 0
    for width in spec.planes:
        fields = torch.nn.functional.pad((codes >> low) & (2**width - 1), (0, -k % (32 // width)))
        weights = 2 ** (width * torch.arange(32 // width))
        planes.append((fields.view(len(codes), -1, 32 // width) * weights).sum(2))
        low += width
    expected = torch.cat(planes, 1).view(-1, 16, spec.plane_words(k)).transpose(1, 2)
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
