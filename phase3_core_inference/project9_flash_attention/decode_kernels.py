"""
Decode kernels

This file implements attention of one query over a long cache, split among many programs, following:
- "Flash-Decoding for long-context inference" (Dao et al., 2023) - split the keys, then merge by log-sum-exp
- "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (Ainslie et al., 2023) - all
  query heads of a group share one reading of the cache

Each component is explained with paper references for educational purposes.
"""

import triton
import triton.language as tl

from phase3_core_inference.project9_flash_attention.forward_kernel import HIDDEN, LOG2_E, LOWEST


@triton.jit
def split_kernel(q_ptr, k_ptr, v_ptr, lengths_ptr, top_ptr, total_ptr, part_ptr, stride_qb, stride_qh, stride_kb,
                 stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, S, D, V, window, scale, GROUP: tl.constexpr,
                 BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                 WINDOW: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One program: the queries of one group against one part of the keys of one row.

    PAPER: "Flash-Decoding for long-context inference" (Dao et al., 2023), the three steps.
    PAPER CONTEXT: with one query a head there are too few programs to fill the chip: parallelise over keys as well.
    INTUITION: a long book is read by many at once, a chapter each; their notes are merged afterwards.
    IMPLEMENTATION: the row's length is read on the device and shared out evenly in whole tiles; the group's queries are
        padded to 16 rows, the smallest tile of the tensor cores; maximum, sum and sum of values stay in float32.
    WHY: decoding is bound by the reading of the cache: each key is read once for all heads of its group.
    """
    split, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, kv_heads = tl.num_programs(0), tl.num_programs(1)
    length = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), S)  # the host does not know it, so it cannot refuse it
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    tiles = tl.cdiv(length - first, BLOCK_N)
    begin = first + (tiles * split // splits) * BLOCK_N
    end = tl.minimum(first + (tiles * (split + 1) // splits) * BLOCK_N, length)
    g, d, e = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    heads = kv_head * GROUP + g
    q_at = q_ptr + b.to(tl.int64) * stride_qb + heads[:, None] * stride_qh + d[None, :]
    q = tl.load(q_at, mask=(g[:, None] < GROUP) & (d[None, :] < D), other=0.0)
    k_at = k_ptr + b.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_at = v_ptr + b.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    acc = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
    top = tl.full((BLOCK_G,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    scale *= LOG2_E
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        keys = n + tl.arange(0, BLOCK_N)
        inside = keys < end
        at = keys.to(tl.int64)[:, None]
        k = tl.load(k_at + at * stride_ks + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0)
        scores = tl.where(inside[None, :], tl.dot(q, k.T, input_precision="ieee") * scale, HIDDEN)
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_at + at * stride_vs + e[None, :], mask=inside[:, None] & (e[None, :] < V), other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    at = ((b * kv_heads * GROUP + heads) * splits + split).to(tl.int64)
    tl.store(top_ptr + at, top, mask=g < GROUP)
    tl.store(total_ptr + at, total, mask=g < GROUP)
    tl.store(part_ptr + at[:, None] * V + e[None, :], acc, mask=(g[:, None] < GROUP) & (e[None, :] < V))


@triton.jit
def merge_kernel(top_ptr, total_ptr, part_ptr, o_ptr, splits, V, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr):
    """One program: the parts of one head of one row become one.

    PAPER: "Flash-Decoding for long-context inference" (Dao et al., 2023), step 3.
    PAPER CONTEXT: the output is the reduction over all splits, scaled by their log-sum-exps.
    INTUITION: the notes of the readers count by how much each found.
    IMPLEMENTATION: one more step of the online softmax, over parts instead of keys; a part without keys has sum 0, and
        a row without keys gives 0.
    WHY: exact, whatever the number of parts; they are tiny beside the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    s, e = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    top = tl.load(top_ptr + row * splits + s, mask=s < splits, other=LOWEST)
    total = tl.load(total_ptr + row * splits + s, mask=s < splits, other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    inside = (s[:, None] < splits) & (e[None, :] < V)
    part = tl.load(part_ptr + (row * splits + s[:, None]) * V + e[None, :], mask=inside, other=0.0)
    everything = tl.sum(total * weight, 0)
    o = tl.sum(part * weight[:, None], 0) / tl.where(everything == 0.0, 1.0, everything)
    tl.store(o_ptr + row * V + e, o.to(o_ptr.dtype.element_ty), mask=e < V)
