"""Codes <-> words: the normative bit layouts, in plain torch.

Three layouts of the codes of one weight ``[n, k]``:

* **stream** (on disk): int32 ``[n, ceil(k*bits/32)]``; per row one LSB-first bit stream, code i at bit ``i*bits``;
  a code may straddle two words. Equal to compressed-tensors' dense `pack-quantized`.
* **planes** (reference, Triton): int32 ``[rows, n]``; the bits of a code are split into planes of width 1, 2, 4 or 8
  (`QuantSpec.planes`, lowest bits first); a word of a plane of width p holds ``32/p`` consecutive columns, the even
  ones in its low half and the odd ones in its high half, each lowest bits first (column c at bit ``16 (c % 2) +
  p (c // 2)``): a kernel gets two neighbours by one shift; the word rows of the planes follow each other.
* **cpu**: planes whose words hold their columns in order, with n tiled by 16: made and read by the compiled extension
  (csrc/README.md draws it, and the layout of the CUDA kernels).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels.spec import QuantSpec, ceil_div

_ROWS_AT_ONCE = 2**22
"""Codes expanded to int64 at a time: bounds the memory of the torch versions to about 100 MB."""


def _by_rows(function, source: Tensor, cost_per_row: int) -> Tensor:
    """`function` over slices of rows, concatenated: same result, bounded memory."""
    rows = max(1, _ROWS_AT_ONCE // max(1, cost_per_row))
    if source.shape[0] <= rows:
        return function(source)
    return torch.cat([function(part) for part in source.split(rows)])


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[n, k]`` (uint8, each < 2**bits) -> words int32 ``[n, ceil(k*bits/32)]``, LSB first, dense."""
    spec = QuantSpec(bits)
    k = codes.shape[1]
    words = spec.words(k)

    def rows(part: Tensor) -> Tensor:
        position = torch.arange(k, device=part.device) * bits
        index, offset = position // 32, position % 32
        shifted = part.long() << offset  # at most 8 + 31 bits
        out = torch.zeros(part.shape[0], words + 1, dtype=torch.int64, device=part.device)
        # Codes occupy disjoint bits, so adding is OR-ing.
        out.index_add_(1, index, shifted & 0xFFFFFFFF)
        out.index_add_(1, index + 1, shifted >> 32)
        return _to_int32(out[:, :words])

    return _by_rows(rows, codes, k)


def unpack_stream(words: Tensor, bits: int, k: int) -> Tensor:
    """Words int32 ``[n, ceil(k*bits/32)]`` -> codes uint8 ``[n, k]``: the inverse of `pack_stream`."""
    QuantSpec(bits)

    def rows(part: Tensor) -> Tensor:
        position = torch.arange(k, device=part.device) * bits
        index, offset = position // 32, position % 32
        wide = part.long() & 0xFFFFFFFF
        wide = torch.cat([wide, torch.zeros_like(wide[:, :1])], 1) if wide.shape[1] else wide
        low = wide[:, index] >> offset
        high = wide[:, index + 1] << (32 - offset)
        return ((low | high) & (2**bits - 1)).to(torch.uint8)

    return _by_rows(rows, words, k)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[n, k]`` uint8 -> planes int32 ``[plane_words(k), n]``."""
    out, low = [], 0
    for width in QuantSpec(bits).planes:
        out.append(pack_plane(codes, low, width))
        low += width
    return torch.cat(out, 1).t().contiguous()


def pack_plane(codes: Tensor, low: int, width: int) -> Tensor:
    """Bits ``[low, low + width)`` of codes ``[n, k]`` -> int32 ``[n, ceil(k*width/32)]``."""
    per_word = 32 // width
    k = codes.shape[1]
    words = ceil_div(k, per_word)

    def rows(part: Tensor) -> Tensor:
        fields = (part.long() >> low) & (2**width - 1)
        fields = torch.nn.functional.pad(fields, (0, words * per_word - k)).view(part.shape[0], words, per_word)
        return _to_int32((fields << _plane_shifts(width, part.device)).sum(-1))

    return _by_rows(rows, codes, k)


def unpack_planes(planes: Tensor, bits: int, k: int) -> Tensor:
    """Planes int32 ``[plane_words(k), n]`` -> codes uint8 ``[n, k]``: the inverse of `pack_planes`."""
    n = planes.shape[1]
    codes = torch.zeros(n, k, dtype=torch.uint8, device=planes.device)
    row, low = 0, 0
    for width in QuantSpec(bits).planes:
        per_word = 32 // width
        words = ceil_div(k, per_word)
        plane = planes[row : row + words].t().contiguous()
        shifts = _plane_shifts(width, planes.device)
        fields = (plane.unsqueeze(-1) >> shifts) & (2**width - 1)  # arithmetic shift: masked afterwards
        codes |= fields.view(n, words * per_word)[:, :k].to(torch.uint8) << low
        row, low = row + words, low + width
    return codes


def _plane_shifts(width: int, device: torch.device) -> Tensor:
    """int32: where the columns of a word of a plane lie."""
    column = torch.arange(32 // width, device=device, dtype=torch.int32)
    return 16 * (column % 2) + width * (column // 2)


def _to_int32(words: Tensor) -> Tensor:
    """int64 in [0, 2**32) -> the int32 with the same 32 bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
