"""Layout "planes", which backends share whose kernels read it in place: made and read by plain torch, on any device."""

from __future__ import annotations

from torch import Tensor

from mmq_kernels import packing
from mmq_kernels.backends import Backend, PackedWeight, RuntimeShapes, RuntimeWeight
from mmq_kernels.spec import QuantSpec


class PlanesBackend(Backend):
    """Layout "planes": weight int32 ``[plane_words(k), n]``, scale ``[groups, n]``, zero ``[groups, words(n)]``."""

    layout = "planes"

    def runtime_shapes(self, spec: QuantSpec, n: int, k: int) -> RuntimeShapes:
        groups = spec.groups(k)
        return RuntimeShapes((spec.plane_words(k), n), (groups, n), (groups, spec.words(n)))

    def prepack(self, packed: PackedWeight, spec: QuantSpec, n: int, k: int) -> RuntimeWeight:
        codes = packing.unpack_stream(packed.words, spec.bits, k)
        zero = None if packed.zero is None else packed.zero.t().contiguous()
        return RuntimeWeight(packing.pack_planes(codes, spec.bits), packed.scale.t().contiguous(), zero)

    def unprepack(self, runtime: RuntimeWeight, spec: QuantSpec, n: int, k: int) -> PackedWeight:
        codes = packing.unpack_planes(runtime.weight, spec.bits, k)
        zero = None if runtime.zero is None else runtime.zero.t().contiguous()
        return PackedWeight(packing.pack_stream(codes, spec.bits), runtime.scale.t().contiguous(), zero)

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        return packing.pack_stream(codes, bits)

    def unpack(self, words: Tensor, bits: int, k: int) -> Tensor:
        return packing.unpack_stream(words, bits, k)
