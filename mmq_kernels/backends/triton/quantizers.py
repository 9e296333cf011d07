"""Round to nearest, and a block of columns of GPTQ: what `reference.py` says, bit for bit.

Both must be launched without fused multiply-adds: what the reference rounds twice is rounded twice here.
"""

# Kernels are compiled from these functions' source: no annotations but tl.constexpr.

import triton
import triton.language as tl


@triton.jit
def rint(x):
    """Nearest integer, halves to even, of ``|x| < 2^22``; beyond, something as large, which clamping makes right."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def range_grid(low, high, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, DTYPE: tl.constexpr):
    """Scale (in DTYPE, as fp32) and zero point (fp32) of the range ``[low, high]``, which holds 0."""
    TOP: tl.constexpr = (1 << BITS) - 1
    TINY: tl.constexpr = 6.103515625e-05 if tl.float16 == DTYPE else 1.1754943508222875e-38
    if SYMMETRIC:
        span = 2 * tl.maximum(-low, high)
    else:
        span = high - low
    s = tl.div_rn(span, tl.full(span.shape, TOP, tl.float32)).to(DTYPE).to(tl.float32)
    s = tl.where(span == 0, 1.0, tl.maximum(s, TINY))
    if SYMMETRIC:
        z = tl.full(s.shape, 1 << (BITS - 1), tl.float32)
    else:
        z = tl.minimum(tl.maximum(rint(tl.div_rn(-low, s)), 0.0), TOP)
    return s, z


@triton.jit
def nearest(w, s, z, BITS: tl.constexpr):
    """Nearest codes, as fp32."""
    return tl.minimum(tl.maximum(rint(tl.div_rn(w, s)) + z, 0.0), (1 << BITS) - 1)


@triton.jit
def quantize_rtn(
    weight,
    codes,
    scale,
    zero,
    n,
    k,
    length,
    groups,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weight ``[n, k]`` -> codes uint8 ``[n, k]``, scale and zero uint8 ``[n, groups]``.

    One program a group of ROWS rows, in steps of BLOCK columns: the range first, then the codes.
    """
    program = tl.program_id(0)
    group = program % groups
    row = program // groups * ROWS + tl.arange(0, ROWS)
    first = group * length
    last = tl.minimum(k, first + length)
    start = row.to(tl.int64)[:, None] * k
    low = tl.zeros((ROWS,), tl.float32)
    high = tl.zeros((ROWS,), tl.float32)
    for k0 in range(first, last, BLOCK):
        column = k0 + tl.arange(0, BLOCK)[None, :]
        inside = (row < n)[:, None] & (column < last)
        part = tl.load(weight + start + column, mask=inside, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(part, 1))
        high = tl.maximum(high, tl.max(part, 1))
    s, z = range_grid(low, high, BITS, SYMMETRIC, scale.dtype.element_ty)
    at = row * groups + group
    tl.store(scale + at, s.to(scale.dtype.element_ty), mask=row < n)
    tl.store(zero + at, z.to(tl.uint8), mask=row < n)
    wide_s = tl.broadcast_to(s[:, None], (ROWS, BLOCK))
    for k0 in range(first, last, BLOCK):
        column = k0 + tl.arange(0, BLOCK)[None, :]
        inside = (row < n)[:, None] & (column < last)
        part = tl.load(weight + start + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(codes + start + column, nearest(part, wide_s, z[:, None], BITS).to(tl.uint8), mask=inside)


@triton.jit
def gptq_block(
    weight,
    hinv,
    codes,
    error,
    scale,
    zero,
    n,
    columns,
    length,
    groups,
    weight_layer,
    weight_row,
    hinv_layer,
    hinv_row,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SEARCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weight fp32 ``[layers, n, columns]``, hinv fp32 ``[layers, columns, columns]`` -> codes uint8 and error fp32 like
    weight; scale and zero uint8 ``[layers, n, groups]``, found (SEARCH) or read.

    Second and third dimension of weight and hinv: strides *_layer, *_row, and 1. One program holds ROWS rows of a layer
    in registers, BLOCK >= columns wide, and goes through the columns; column j is what a sum over a mask leaves.
    """
    layer = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    known = row < n
    inside = known[:, None] & (column < columns)[None, :]
    at = weight + layer * weight_layer + row.to(tl.int64)[:, None] * weight_row + column[None, :]
    w = tl.load(at, mask=inside, other=0.0)
    row_out = (layer * n + row) * columns
    row_grid = (layer * n + row) * groups
    s = tl.full((ROWS,), 1.0, tl.float32)
    z = tl.zeros((ROWS,), tl.float32)
    for j in range(0, columns):
        if j % length == 0:
            group = row_grid + j // length
            if SEARCH:
                mine = ((column >= j) & (column < j + length))[None, :]
                part = tl.where(mine & inside, w, 0.0)
                low = tl.minimum(tl.min(part, 1), 0.0)
                high = tl.maximum(tl.max(part, 1), 0.0)
                s, z = range_grid(low, high, BITS, SYMMETRIC, scale.dtype.element_ty)
                tl.store(scale + group, s.to(scale.dtype.element_ty), mask=known)
                tl.store(zero + group, z.to(tl.uint8), mask=known)
            else:
                s = tl.load(scale + group, mask=known, other=1.0).to(tl.float32)
                z = tl.load(zero + group, mask=known, other=0).to(tl.float32)
        factor = hinv + layer * hinv_layer + j * hinv_row
        right = tl.load(factor + column, mask=(column > j) & (column < columns), other=0.0)
        diagonal = tl.load(factor + j)
        current = tl.sum(tl.where((column == j)[None, :], w, 0.0), 1)
        q = nearest(current, s, z, BITS)
        e = tl.div_rn(current - s * (q - z), tl.full((ROWS,), 0.0, tl.float32) + diagonal)
        tl.store(codes + row_out + j, q.to(tl.uint8), mask=known)
        tl.store(error + row_out + j, e, mask=known)
        w = w - e[:, None] * right[None, :]
