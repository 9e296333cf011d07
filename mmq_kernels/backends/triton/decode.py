"""Reading a weight of layout "planes" inside a Triton kernel.

A tile of BLOCK_K columns and BLOCK_N rows of W is held as ``[R, P, BLOCK_N]``: R words of the widest plane, which is
the first, and the P = 16 / width pairs of columns of each. Column 2 i of a word lies in its low half and column 2 i + 1
at the same place of its high half, so that one shift and one mask leave a pair of codes in the halves of a register,
and one addition makes a pair of fp16 or bf16 numbers of it.

Of a narrower plane each of the R rows reads the word that holds its columns: the same word is read by neighbouring rows
(from the cache), and all planes meet in one register layout. Nothing moves between threads: Triton then loads words
into those threads that need their codes for the product (seen in its intermediate code for sm_80 and sm_90).
"""

# Kernels are compiled from these functions' source: no annotations but tl.constexpr.

import triton
import triton.language as tl

from mmq_kernels.backends.triton.interpreter import mend

if triton.knobs.runtime.interpret:
    mend()


@triton.jit
def plane(weight, row, shift, rows, inside, n, WIDTH: tl.constexpr):
    """Fields ``[R, P, N]`` of one plane, in both halves: word `row` [R, 1], shifted by `shift` [R, P]."""
    words = tl.load(weight + row * n + rows[None, :], mask=inside, other=0, eviction_policy="evict_first")
    # The shift is arithmetic; what it draws in is masked away.
    return (words[:, None, :] >> shift[:, :, None]) & (((1 << WIDTH) - 1) * 0x10001)


@triton.jit
def code_pairs(weight, rows, n, k, k0, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes of columns k0.. of the rows `rows` [N], two in an int32, ``[R, P, N]``; 0 outside of W.

    W0, W1, W2: widths of the planes, lowest bits first, 0 for those that are not there.
    """
    P: tl.constexpr = 16 // W0
    R: tl.constexpr = BLOCK_K // (2 * P)
    pair = tl.arange(0, P)[None, :]
    word = k0 // (2 * P) + tl.arange(0, R)[:, None]
    first = tl.cdiv(k, 2 * P)
    inside = (word < first) & (rows < n)[None, :]
    code = plane(weight, word, pair * W0, rows, inside, n, W0)
    if W1 > 0:
        RATIO1: tl.constexpr = W0 // W1
        shift = ((word % RATIO1) * P + pair) * W1
        code |= plane(weight, first + word // RATIO1, shift, rows, inside, n, W1) << W0
    if W2 > 0:
        RATIO2: tl.constexpr = W0 // W2
        second = first + tl.cdiv(k * W1, 32)
        shift = ((word % RATIO2) * P + pair) * W2
        code |= plane(weight, second + word // RATIO2, shift, rows, inside, n, W2) << (W0 + W1)
    return code


@triton.jit
def scales(scale, group, rows, inside, n):
    """Scales of groups and rows, shapes broadcast; 0 outside of W."""
    return tl.load(scale + group * n + rows, mask=inside, other=0.0)


@triton.jit
def zero_points(zero, group, rows, inside, zero_words, BITS: tl.constexpr):
    """Zero points int32 of groups and rows, shapes broadcast; the middle of the codes where `zero` is None.

    A group's are a dense stream of n codes, so that one may straddle two words.
    """
    if zero is None:
        return tl.full(inside.shape, 1 << (BITS - 1), tl.int32)
    else:
        bit = rows * BITS
        at = zero + group * zero_words + bit // 32
        shift = bit % 32
        z = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        if 32 % BITS != 0:
            crosses = shift + BITS > 32
            high = tl.load(at + 1, mask=inside & crosses, other=0).to(tl.uint32, bitcast=True)
            z |= tl.where(crosses, high << ((32 - shift) % 32).to(tl.uint32), 0)
        return (z & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def centred(pairs, z, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """``code - z`` of the low and of the high halves in DTYPE, exactly; `z` broadcasts.

    Codes are put under an exponent instead of being converted, zero points with them: 1536 + q - z has the bits of
    0x6600 plus q - z in fp16, 192 + q - z those of 0x4340 plus q - z in bf16 (up to 6 bits), so that one integer
    addition serves both halves, and what is left to subtract is a constant. Otherwise 2^23 + q in fp32.
    """
    if tl.float16 == DTYPE or (tl.bfloat16 == DTYPE and BITS < 7):
        lifted = pairs + ((0x6600 if tl.float16 == DTYPE else 0x4340) - z) * 0x10001
        LIFT: tl.constexpr = 1536.0 if tl.float16 == DTYPE else 192.0
        low = lifted.to(tl.int16).to(DTYPE, bitcast=True) - tl.full((), LIFT, DTYPE)
        high = (lifted >> 16).to(tl.int16).to(DTYPE, bitcast=True) - tl.full((), LIFT, DTYPE)
    else:
        taken = (z + 8388608).to(tl.float32)
        low = (((pairs & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - taken).to(DTYPE)
        high = ((((pairs >> 16) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - taken).to(DTYPE)
    return low, high


@triton.jit
def load_weights(
    weight,
    scale,
    zero,
    rows,
    n,
    k,
    k0,
    length,
    zero_words,
    BITS: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile ``[BLOCK_N, BLOCK_K]`` of W in DTYPE; without scales where SCALES (see gemm.py) is "row" or "after"."""
    P: tl.constexpr = 16 // W0
    R: tl.constexpr = BLOCK_K // (2 * P)
    pairs = code_pairs(weight, rows, n, k, k0, W0, W1, W2, BLOCK_K)
    column = tl.full((1, 1, 1), 0, tl.int32) + k0
    if SCALES == "word" or SCALES == "pair":
        column += (tl.arange(0, R) * (2 * P))[:, None, None]
    if SCALES == "pair":  # groups are multiples of 8: both columns of a pair belong to one
        column += (tl.arange(0, P) * 2)[None, :, None]
    at = tl.broadcast_to(rows[None, None, :], (column + rows[None, None, :]).shape)
    inside = (column < k) & (at < n)
    z = zero_points(zero, column // length, at, inside, zero_words, BITS)
    if SCALES == "row" or SCALES == "after":
        low, high = centred(pairs, z, BITS, DTYPE)
    else:
        s = scales(scale, column // length, at, inside, n)
        if scale.dtype.element_ty == DTYPE:  # exact integer times scale, rounded once, like everywhere
            low, high = centred(pairs, z, BITS, DTYPE)
            low *= s
            high *= s
        else:
            low, high = centred(pairs, z, BITS, tl.float32)
            low = (low * s.to(tl.float32)).to(DTYPE)
            high = (high * s.to(tl.float32)).to(DTYPE)
    together = tl.permute(tl.join(low, high), (2, 0, 1, 3))
    return tl.reshape(together, (rows.shape[0], BLOCK_K))
