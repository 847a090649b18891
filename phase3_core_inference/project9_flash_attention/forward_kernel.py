"""
Forward kernel

This file implements tiled attention on a GPU, in Triton, following:
- "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (Dao, 2023) - algorithm 1: one
  program owns a tile of queries and walks over the tiles of keys
- "Online normalizer calculation for softmax" (Milakov & Gimelshein, 2018) - the running maximum and sum

Each component is explained with paper references for educational purposes.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # the hardware has exp2, so that everything is counted in bits
HIDDEN = tl.constexpr(float("-inf"))  # the score of a key that is not seen
# Where a row's maximum begins: finite, as a row may meet a whole tile of hidden keys first, and -inf - -inf is NaN.
# HIDDEN in turn must not be finite: `scores * scale - higher` is one FMA, whose product is not rounded while `higher`
# was, and at a size of 1e30 the difference between the two is some 1e22, either way: exp2 of that is infinite.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def visible(rows, keys, lower, T, CAUSAL: tl.constexpr, LOWER: tl.constexpr):
    """The mask of one tile, in the shape that `rows` and `keys` broadcast to."""
    seen = keys < T
    if CAUSAL:
        seen = seen & (keys <= rows)
    if LOWER:
        seen = seen & (keys >= lower)
    return seen


@triton.jit
def key_range(first_row, lower, in_range, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
              LOWER: tl.constexpr):  # fmt: skip
    """Which keys a tile of rows has to visit.

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, 3.1.1.
    PAPER CONTEXT: tiles above the diagonal are skipped, and only the tiles on it need a mask.
    INTUITION: a staircase: most of it is solid, some blocks are cut by the edge, the rest is air.
    IMPLEMENTATION: (start, solid, cut, stop): [start, solid) is cut by the lower edge (window, document), [solid, cut)
        is seen by all rows, [cut, stop) holds the diagonal, or the end of the row.
    WHY: a mask costs comparisons for each score, and about half of all tiles of a causal row are not there at all.
    """
    stop = T
    cut = T // BLOCK_N * BLOCK_N
    if CAUSAL:
        stop = tl.minimum(first_row + BLOCK_M, T)
        cut = first_row // BLOCK_N * BLOCK_N
    start = 0
    solid = 0
    if LOWER:
        start = tl.min(tl.where(in_range, lower, T), 0) // BLOCK_N * BLOCK_N
        solid = (tl.max(lower, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    return start, tl.minimum(solid, cut), cut, stop


@triton.jit
def attend(acc, top, total, q, k_desc, v_desc, b, kv_head, begin, end, rows, lower, T, scale,
           BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr,
           CAUSAL: tl.constexpr, LOWER: tl.constexpr):  # fmt: skip
    """Take the keys [begin, end) into the running softmax.

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, alg. 1.
    PAPER CONTEXT: m = max(m, rowmax(S)), l = e^(m_old - m) l + rowsum(P), O = e^(m_old - m) O + P V.
    INTUITION: a running tournament: a new champion shrinks all that was counted before him.
    IMPLEMENTATION: lines 6-11; the scale and log2(e) are one factor, applied with the subtraction in a single FMA.
    WHY: no score leaves the chip: what is kept per row is one maximum, one sum and D numbers.
    """
    for n in range(begin, end, BLOCK_N):
        k = k_desc.load([b, kv_head, n, 0]).reshape(BLOCK_N, BLOCK_D)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if MASKED:
            keys = n + tl.arange(0, BLOCK_N)
            seen = visible(rows[:, None], keys[None, :], lower[:, None], T, CAUSAL, LOWER)
            scores = tl.where(seen, scores, HIDDEN)
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v = v_desc.load([b, kv_head, n, 0]).reshape(BLOCK_N, BLOCK_V)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["lower_stride", "T"])  # one compilation for all lengths
def forward_kernel(q_desc, k_desc, v_desc, o_desc, lse_ptr, lower_ptr, lower_stride, T, scale, GROUP,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                   CAUSAL: tl.constexpr, LOWER: tl.constexpr):  # fmt: skip
    """One program: BLOCK_M queries of one head against all keys they see.

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, 3.2.
    PAPER CONTEXT: the outer loop over queries is parallel, the inner one over keys is the program's own.
    INTUITION: each worker keeps the own rows on the desk and has the keys carried past.
    IMPLEMENTATION: tensor descriptors over (B, H, T, D) read whole tiles and fill zeros past the edges; the last,
        longest rows start first; the log-sum-exp (natural) is all that the backward needs of the softmax.
    WHY: long rows last would leave most of the chip idle at the end.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # longest rows first
    head = tl.program_id(1)
    b = tl.program_id(2)
    first_row = tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    in_range = rows < T
    lower = rows
    if LOWER:
        lower = tl.load(lower_ptr + b.to(tl.int64) * lower_stride + rows, mask=in_range, other=0)
    start, solid, cut, stop = key_range(first_row, lower, in_range, T, BLOCK_M, BLOCK_N, CAUSAL, LOWER)
    scale *= LOG2_E
    q = q_desc.load([b, head, first_row, 0]).reshape(BLOCK_M, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if LOWER:
        acc, top, total = attend(acc, top, total, q, k_desc, v_desc, b, head // GROUP, start, solid, rows, lower, T,
                                 scale, BLOCK_N, BLOCK_D, BLOCK_V, True, CAUSAL, LOWER)  # fmt: skip
    acc, top, total = attend(acc, top, total, q, k_desc, v_desc, b, head // GROUP, solid, cut, rows, lower, T, scale,
                             BLOCK_N, BLOCK_D, BLOCK_V, False, CAUSAL, LOWER)  # fmt: skip
    acc, top, total = attend(acc, top, total, q, k_desc, v_desc, b, head // GROUP, tl.maximum(cut, start), stop, rows,
                             lower, T, scale, BLOCK_N, BLOCK_D, BLOCK_V, True, CAUSAL, LOWER)  # fmt: skip
    o = (acc / total[:, None]).to(o_desc.dtype)
    o_desc.store([b, head, first_row, 0], o.reshape(1, 1, BLOCK_M, BLOCK_V))
    heads = tl.num_programs(1)
    tl.store(lse_ptr + (b * heads + head).to(tl.int64) * T + rows, (top + tl.log2(total)) / LOG2_E, mask=in_range)
