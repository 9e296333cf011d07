"""``W [n, k] = scale * (q - zero)`` from a weight of layout "planes", computed in fp32 and rounded once."""

# Kernels are compiled from these functions' source: no annotations but tl.constexpr.

import triton
import triton.language as tl

from mmq_kernels.backends.triton.decode import load_weights


@triton.jit
def dequantize(
    weight,
    scale,
    zero,
    out,
    n,
    k,
    length,
    zero_words,
    BITS: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a tile; tiles along n fastest, as the words lie. Arguments as of `gemm`."""
    row_tiles = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    rows = program % row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = program // row_tiles * BLOCK_K
    DTYPE: tl.constexpr = out.dtype.element_ty
    w = load_weights(weight, scale, zero, rows, n, k, k0, length, zero_words, BITS, W0, W1, W2, SCALES, DTYPE, BLOCK_K)
    column = k0 + tl.arange(0, BLOCK_K)
    inside = (rows < n)[:, None] & (column < k)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * k + column[None, :], w, mask=inside)
