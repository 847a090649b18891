"""
Paged attention kernels

This file implements attention over keys that lie in blocks, found through a table, following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - keys and
  values in blocks of a few tokens, anywhere in memory
- "Flash-Decoding for long-context inference" (Dao et al., 2023) - few queries: the keys are shared out among programs
- "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (Dao, 2023) - many queries: a
  program owns a tile of them and walks over the keys
- "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (Ainslie et al., 2023) - the
  heads of a group are rows of one product, so that each key is read once for all of them

Each component is explained with paper references for educational purposes.
"""

import triton
import triton.language as tl

from phase3_core_inference.project9_flash_attention.forward_kernel import HIDDEN, LOG2_E, LOWEST


@triton.jit
def gather(at, offsets, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """The vectors that begin `offsets` behind `at`, as one tile; zeros where not `inside`, which is not read there."""
    columns = tl.arange(0, BLOCK)
    here = at + offsets[:, None] + columns[None, :]
    if MASKED:
        tile = tl.load(here, mask=inside[:, None] & (columns[None, :] < WIDTH), other=0.0)
    elif WIDTH < BLOCK:
        tile = tl.load(here, mask=columns[None, :] < WIDTH, other=0.0)
    else:
        tile = tl.load(here)
    return tile


@triton.jit
def attend(acc, top, total, q, k_at, v_at, table_at, stride_kb, stride_ks, stride_vb, stride_vs, begin, end, places,
           window, scale, D: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
           BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
           STAGES: tl.constexpr):  # fmt: skip
    """Take the keys at positions [begin, end) of one row into the running softmax of queries at `places`.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180, 4.1.
    PAPER CONTEXT: the kernel fetches the blocks of a sequence one by one, wherever they lie; eq. 4.
    INTUITION: the pages of a book lie all over the library; a slip of paper says on which shelf each of them is.
    IMPLEMENTATION: FlashAttention-2's loop with one step more: position -> table -> block -> address (64 bits). Without
        MASKED all keys are read and seen: then [begin, end) must be whole tiles before the first place.
    WHY: a table entry is 4 bytes, read for vectors of hundreds: paging costs next to nothing.
    """
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        keys = n + tl.arange(0, BLOCK_N)
        inside = keys < end
        if MASKED:
            blocks = tl.load(table_at + keys // PAGE, mask=inside, other=0).to(tl.int64)
        else:
            blocks = tl.load(table_at + keys // PAGE).to(tl.int64)
        slots = (keys % PAGE).to(tl.int64)
        k = gather(k_at, blocks * stride_kb + slots * stride_ks, inside, D, BLOCK_D, MASKED)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if MASKED:
            seen = inside[None, :] & (keys[None, :] <= places[:, None])
            if WINDOW:
                seen = seen & (keys[None, :] > places[:, None] - window)
            scores = tl.where(seen, scores, HIDDEN)
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v = gather(v_at, blocks * stride_vb + slots * stride_vs, inside, V, BLOCK_V, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["stride_table", "longest"])  # one compilation for all widths of the table
def few_kernel(q_ptr, k_ptr, v_ptr, tables_ptr, ends_ptr, o_ptr, top_ptr, total_ptr, part_ptr, stride_qn, stride_qh,
               stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_table, longest, window, scale,
               N_EACH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
               WINDOW: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One program: the last few queries of one row, one group of heads, against one part of the row's keys.

    PAPER: "Flash-Decoding for long-context inference" (Dao et al., 2023), the three steps.
    PAPER CONTEXT: with a query a head there are too few programs to fill the chip: parallelise over keys as well.
    INTUITION: a long book is read by many at once; if there are books enough, by one reader each.
    IMPLEMENTATION: queries x heads are the rows of one product, padded to the 16 of the tensor cores. If the keys are
        in one part (WHOLE), the result is written at once, else project 9's merge_kernel joins the parts.
    WHY: a draft of five tokens is checked by one reading of the cache, as a single token would be.
    """
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, kv_heads = tl.num_programs(0), tl.num_programs(1)
    length = tl.minimum(tl.load(ends_ptr + row), longest)  # the host does not know it, so it cannot refuse it
    first = 0
    if WINDOW:
        first = tl.maximum(length - N_EACH + 1 - window, 0)
    tiles = tl.cdiv(tl.maximum(length - first, 0), BLOCK_N)
    begin = first + (tiles * split // splits) * BLOCK_N
    end = tl.minimum(first + (tiles * (split + 1) // splits) * BLOCK_N, length)
    m, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    tokens, heads = row * N_EACH + m // GROUP, kv_head * GROUP + m % GROUP
    real = m < N_EACH * GROUP
    q = gather(q_ptr, tokens.to(tl.int64) * stride_qn + heads * stride_qh, real, D, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc, top, total = attend(
        acc, top, total, q, k_ptr + kv_head.to(tl.int64) * stride_kh, v_ptr + kv_head.to(tl.int64) * stride_vh,
        tables_ptr + row.to(tl.int64) * stride_table, stride_kb, stride_ks, stride_vb, stride_vs, begin, end,
        length - N_EACH + m // GROUP, window, scale * LOG2_E, D, V, PAGE, BLOCK_N, BLOCK_D, BLOCK_V, True, WINDOW,
        STAGES)  # fmt: skip
    at = tokens.to(tl.int64) * kv_heads * GROUP + heads
    inside = real[:, None] & (e[None, :] < V)
    if WHOLE:
        o = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(o_ptr + at[:, None] * V + e[None, :], o.to(o_ptr.dtype.element_ty), mask=inside)
    else:
        at = at * splits + split
        tl.store(top_ptr + at, top, mask=real)
        tl.store(total_ptr + at, total, mask=real)
        tl.store(part_ptr + at[:, None] * V + e[None, :], acc, mask=inside)


@triton.jit
def query_tile(q_ptr, k_at, v_at, table_at, o_ptr, stride_qn, stride_qh, stride_kb, stride_ks, stride_vb, stride_vs,
               kv_head, kv_heads, first, count, place, longest, window, scale, GROUP: tl.constexpr, D: tl.constexpr,
               V: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """`count` queries from token `first` on, the first of them at `place` of its row, against all keys they see.

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, 3.1.1.
    PAPER CONTEXT: tiles above the diagonal are skipped, and only the tiles on it need a mask.
    INTUITION: most keys lie before all queries of the tile: there is nothing to ask about them.
    IMPLEMENTATION: [start, solid) is cut by the window's edge, [solid, cut) is seen by all queries, [cut, stop) holds
        the diagonal. Keys are gathered one by one, so tiles begin where the window does, not at multiples.
    WHY: what lies before a window is never read: its blocks may belong to another row by now.
    """
    m, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    tokens, heads = first + m // GROUP, kv_head * GROUP + m % GROUP
    real = m < count * GROUP
    places = place + tl.minimum(m // GROUP, count - 1)
    q = gather(q_ptr, tokens.to(tl.int64) * stride_qn + heads * stride_qh, real, D, BLOCK_D, True)
    stop = tl.minimum(place + count, longest)
    start = 0
    solid = 0
    if WINDOW:
        start = tl.maximum(place + 1 - window, 0)
        solid = start + tl.cdiv(tl.maximum(place + count - window - start, 0), BLOCK_N) * BLOCK_N
    cut = solid + tl.maximum(tl.minimum(place + 1, longest) - solid, 0) // BLOCK_N * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if WINDOW:
        acc, top, total = attend(acc, top, total, q, k_at, v_at, table_at, stride_kb, stride_ks, stride_vb, stride_vs,
                                 start, tl.minimum(solid, stop), places, window, scale, D, V, PAGE, BLOCK_N, BLOCK_D,
                                 BLOCK_V, True, True, STAGES)  # fmt: skip
    acc, top, total = attend(acc, top, total, q, k_at, v_at, table_at, stride_kb, stride_ks, stride_vb, stride_vs,
                             solid, cut, places, window, scale, D, V, PAGE, BLOCK_N, BLOCK_D, BLOCK_V, False, False,
                             STAGES)  # fmt: skip
    acc, top, total = attend(acc, top, total, q, k_at, v_at, table_at, stride_kb, stride_ks, stride_vb, stride_vs,
                             cut, stop, places, window, scale, D, V, PAGE, BLOCK_N, BLOCK_D, BLOCK_V, True, False,
                             STAGES)  # fmt: skip
    o = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = tokens.to(tl.int64) * kv_heads * GROUP + heads
    inside = real[:, None] & (e[None, :] < V)
    tl.store(o_ptr + at[:, None] * V + e[None, :], o.to(o_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["stride_table", "longest", "tiles"])
def ragged_kernel(q_ptr, k_ptr, v_ptr, tables_ptr, begins_ptr, ends_ptr, rows_ptr, firsts_ptr, o_ptr, stride_qn,
                  stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_table, longest,
                  tiles, window, scale, kv_heads, GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
                  PAGE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, SMALL: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, WINDOW: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """One program: a tile of the queries of one row, one group of heads, against all keys they see.

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, 3.2.
    PAPER CONTEXT: the outer loop over queries is parallel, the inner one over keys is the program's own.
    INTUITION: a shop with one queue for all: customers with full carts and with one bottle stand in the same line.
    IMPLEMENTATION: which row a tile belongs to is looked up in a list that was made before. The last tiles of a prompt
        see the most keys, so they start first. A tile with a query or two (a decode) is a product of SMALL rows.
    WHY: chunks of prompts and single tokens of other rows go through one launch, whose size the host knows.
    """
    tile = tiles - 1 - tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    row = tl.load(rows_ptr + tile)
    if row >= 0:
        first = tl.load(firsts_ptr + tile)
        left = tl.load(begins_ptr + row + 1) - first
        count = tl.minimum(left, BLOCK_Q)
        place = tl.load(ends_ptr + row) - left
        k_at = k_ptr + kv_head.to(tl.int64) * stride_kh
        v_at = v_ptr + kv_head.to(tl.int64) * stride_vh
        table_at = tables_ptr + row.to(tl.int64) * stride_table
        if count * GROUP <= SMALL:
            query_tile(q_ptr, k_at, v_at, table_at, o_ptr, stride_qn, stride_qh, stride_kb, stride_ks, stride_vb,
                       stride_vs, kv_head, kv_heads, first, count, place, longest, window, scale * LOG2_E, GROUP, D, V,
                       PAGE, SMALL, BLOCK_N, BLOCK_D, BLOCK_V, WINDOW, STAGES)  # fmt: skip
        else:
            query_tile(q_ptr, k_at, v_at, table_at, o_ptr, stride_qn, stride_qh, stride_kb, stride_ks, stride_vb,
                       stride_vs, kv_head, kv_heads, first, count, place, longest, window, scale * LOG2_E, GROUP, D, V,
                       PAGE, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, WINDOW, STAGES)  # fmt: skip
