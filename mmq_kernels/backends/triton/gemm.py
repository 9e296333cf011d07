"""``y [m, n] = activation((x [m, k] / input_scale)[:, perm] @ W [n, k]^T + bias)`` from a weight of layout "planes".

    W as operand A             x as operand B             y^T, accumulated in fp32
    [BLOCK_N, BLOCK_K]    x    [BLOCK_K, BLOCK_M]    ->   [BLOCK_N, BLOCK_M]

W stands on the left: the tensor cores take 16 or 64 rows of it, and any multiple of 8 or 16 tokens, so that few tokens
waste little. One program makes one tile of y^T from all of k in steps of BLOCK_K columns, or from a share of the steps
where tiles are too few for the GPU: each share then writes its sums, and the program that comes last adds them up in
order, so that the same input gives the same bits whoever that is.

Where scales enter (SCALES): "row", one for all of k, and "after", one a step, multiply sums; codes less zero points go
into the product as exact small integers. "tile", "word" and "pair" multiply weights before the product, one scale for a
step, for each word of the first plane, or for each pair of columns: what fits any group.
"""

# Kernels are compiled from these functions' source: no annotations but tl.constexpr.

import triton
import triton.language as tl

from mmq_kernels.backends.triton.decode import load_weights, scales


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The epilogue, in fp32."""
    if ACTIVATION == "relu":
        y = tl.where(y > 0, y, y * 0)  # NaN stays
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(u) = 2 sigmoid(2 u), without its cancellation
        y = y / (1 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    elif ACTIVATION == "quick_gelu":
        y = y / (1 + tl.exp(-1.702 * y))
    elif ACTIVATION == "silu":
        y = y / (1 + tl.exp(-y))
    return y


@triton.jit
def load_tokens(x, perm, input_scale, token, column, m, k):
    """``(x / input_scale)[:, perm]`` ``[BLOCK_M, BLOCK_K]``, the quotient rounded to x's dtype; 0 outside of x."""
    known = column < k
    inside = (token < m)[:, None] & known[None, :]
    source = column
    if perm is not None:
        source = tl.load(perm + column, mask=known, other=0)
    part = tl.load(x + token.to(tl.int64)[:, None] * k + source[None, :], mask=inside, other=0.0)
    if input_scale is not None:
        divisor = tl.load(input_scale + source, mask=known, other=1.0).to(tl.float32)
        divisor = tl.broadcast_to(divisor[None, :], part.shape)
        part = tl.div_rn(part.to(tl.float32), divisor).to(x.dtype.element_ty)
    return part


@triton.jit
def write(y, bias, acc, rows, token, m, n, ACTIVATION: tl.constexpr):
    """y from its sums ``[BLOCK_N, BLOCK_M]``."""
    if bias is not None:
        acc += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    acc = activate(acc, ACTIVATION).to(y.dtype.element_ty)
    inside = (token < m)[:, None] & (rows < n)[None, :]
    tl.store(y + token.to(tl.int64)[:, None] * n + rows[None, :], tl.trans(acc), mask=inside)


@triton.jit(do_not_specialize=["m", "splits"])
def gemm(
    x,
    weight,
    scale,
    zero,
    perm,
    input_scale,
    bias,
    y,
    partials,
    counters,
    m,
    n,
    k,
    length,
    zero_words,
    splits,
    BITS: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    SCALES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Programs: token tiles fastest (they share W), then shares of k, then tiles of rows.

    x ``[m, k]``, y ``[m, n]``; weight, scale, zero: layout "planes", zero None where symmetric; length: columns a scale
    covers; zero_words: words of a group's zero points; partials fp32 ``[tiles, splits, BLOCK_N, BLOCK_M]`` and counters
    int32 ``[tiles]``, zero before and after, or None where `splits` is 1.
    """
    # Scaled by fp32, a weight would be rounded twice on its way to half precision: it stays in fp32.
    SCALED: tl.constexpr = SCALES != "row" and SCALES != "after"
    WIDE: tl.constexpr = SCALED and scale.dtype.element_ty == tl.float32
    DTYPE: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    token_tiles = tl.cdiv(m, BLOCK_M)
    program = tl.program_id(0)
    token_tile = program % token_tiles
    split = program // token_tiles % splits
    row_tile = program // token_tiles // splits
    token = token_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(k, BLOCK_K)
    share = tl.cdiv(steps, splits)
    first = split * share
    last = tl.minimum(steps, first + share)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(first, last):
        k0 = step * BLOCK_K
        part = load_tokens(x, perm, input_scale, token, k0 + tl.arange(0, BLOCK_K), m, k)
        w = load_weights(
            weight, scale, zero, rows, n, k, k0, length, zero_words, BITS, W0, W1, W2, SCALES, DTYPE, BLOCK_K
        )
        part = part.to(DTYPE)
        if SCALES == "after":
            s = scales(scale, k0 // length, rows, rows < n, n).to(tl.float32)
            acc += tl.dot(w, tl.trans(part), input_precision="ieee") * s[:, None]
        else:
            acc = tl.dot(w, tl.trans(part), acc, input_precision="ieee")
    if SCALES == "row":
        acc *= scales(scale, 0, rows, rows < n, n).to(tl.float32)[:, None]

    if partials is None:
        write(y, bias, acc, rows, token, m, n, ACTIVATION)
    else:
        tile = row_tile * token_tiles + token_tile
        inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        shares = partials + tile.to(tl.int64) * splits * (BLOCK_N * BLOCK_M) + inner
        tl.store(shares + split * (BLOCK_N * BLOCK_M), acc)
        tl.debug_barrier()  # every thread's sums are written before one thread says so
        before = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        if before == splits - 1:
            tl.debug_barrier()
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for other in range(0, splits):
                total += tl.load(shares + other * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            tl.store(counters + tile, 0)
            write(y, bias, total, rows, token, m, n, ACTIVATION)
