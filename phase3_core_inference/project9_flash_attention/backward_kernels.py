"""
Backward kernels

This file implements the gradients of tiled attention on a GPU, in Triton, following:
- "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness" (Dao et al., 2022) - algorithm 4:
  probabilities are computed anew from the log-sum-exp instead of being stored
- "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (Dao, 2023) - algorithm 2

Each component is explained with paper references for educational purposes.
"""

import triton
import triton.language as tl

from phase3_core_inference.project9_flash_attention.forward_kernel import LOG2_E, key_range, visible


@triton.jit(do_not_specialize=["T"])  # one compilation for all lengths
def delta_kernel(o_desc, do_desc, dlse_ptr, delta_ptr, T, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """delta = rowsum(dO * O) - dL, the part of the softmax's gradient that a whole row shares (algorithm 2, line 4)."""
    first_row, head, b = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    rows = first_row + tl.arange(0, BLOCK_M)
    o = o_desc.load([b, head, first_row, 0]).reshape(BLOCK_M, BLOCK_V)
    do = do_desc.load([b, head, first_row, 0]).reshape(BLOCK_M, BLOCK_V)
    at = (b * tl.num_programs(1) + head).to(tl.int64) * T + rows
    dlse = tl.load(dlse_ptr + at, mask=rows < T, other=0.0)
    tl.store(delta_ptr + at, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) - dlse, mask=rows < T)


@triton.jit
def collect(dk, dv, k, v, q_desc, do_desc, lse_ptr, delta_ptr, b, head, begin, end, keys, upper, T, scale,
            BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr,
            CAUSAL: tl.constexpr, UPPER: tl.constexpr):  # fmt: skip
    """Add what the queries [begin, end) of one head send back to a tile of keys and values.

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, alg. 2.
    PAPER CONTEXT: P = e^(S - L), dV += P^T dO, dP = dO V^T, dS = P * (dP - delta), dK += dS^T Q.
    INTUITION: every query says how much it looked at this key, and what it would have liked to find there.
    IMPLEMENTATION: lines 10-17 on transposed tiles (keys down, queries across), so that P and dS are left operands of
        their products as they come; past the last query q, dO and delta are 0 and lse is inf, so nothing is added.
    WHY: two products would otherwise need a transposition through shared memory.
    """
    for m in range(begin, end, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        q = q_desc.load([b, head, m, 0]).reshape(BLOCK_M, BLOCK_D)
        lse = tl.load(lse_ptr + rows, mask=rows < T, other=float("inf")) * LOG2_E
        p = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale - lse[None, :])  # (BLOCK_N, BLOCK_M)
        if MASKED:
            seen = rows[None, :] < T
            if CAUSAL:
                seen = seen & (keys[:, None] <= rows[None, :])
            if UPPER:
                seen = seen & (rows[None, :] < upper[:, None])
            p = tl.where(seen, p, 0.0)
        do = do_desc.load([b, head, m, 0]).reshape(BLOCK_M, BLOCK_V)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + rows, mask=rows < T, other=0.0)
        dp = tl.dot(v, do.T, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["upper_stride", "T"])  # one compilation for all lengths
def key_gradient_kernel(q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, lse_ptr, delta_ptr, upper_ptr, upper_stride,
                        T, scale, GROUP, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CAUSAL: tl.constexpr,
                        UPPER: tl.constexpr):  # fmt: skip
    """One program: the gradients of BLOCK_N keys and values, from all heads of their group.

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, 3.1.2.
    PAPER CONTEXT: the backward is parallel over tiles of keys; for grouped heads dK and dV are summed over the group.
    INTUITION: the keys stay at home and receive all letters, one sender after the other.
    IMPLEMENTATION: `upper` is the first query that no longer sees a key (window, document); the loop over the group's
        heads stands inside the program.
    WHY: nobody else writes these rows: no atomics, so the result is the same bits every time.
    """
    first_key, kv_head, b = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2)
    keys = first_key + tl.arange(0, BLOCK_N)
    begin, diagonal = 0, 0
    if CAUSAL:
        begin = first_key // BLOCK_M * BLOCK_M
        diagonal = (first_key + BLOCK_N + BLOCK_M - 2) // BLOCK_M * BLOCK_M  # from here on all rows see all keys
    end, full, upper = T, T, keys
    if UPPER:
        upper_ptr += b.to(tl.int64) * upper_stride
        upper = tl.load(upper_ptr + keys, mask=keys < T, other=0)
        end = tl.max(upper, 0)
        full = tl.min(tl.where(keys < T, upper, T), 0) // BLOCK_M * BLOCK_M
    k = k_desc.load([b, kv_head, first_key, 0]).reshape(BLOCK_N, BLOCK_D)
    v = v_desc.load([b, kv_head, first_key, 0]).reshape(BLOCK_N, BLOCK_V)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    heads = tl.num_programs(1) * GROUP
    for g in range(GROUP):
        head = kv_head * GROUP + g
        row = (b * heads + head).to(tl.int64) * T
        lse, delta = lse_ptr + row, delta_ptr + row
        if CAUSAL:
            dk, dv = collect(dk, dv, k, v, q_desc, do_desc, lse, delta, b, head, begin, tl.minimum(diagonal, end), keys,
                             upper, T, scale * LOG2_E, BLOCK_M, BLOCK_D, BLOCK_V, True, CAUSAL, UPPER)  # fmt: skip
        dk, dv = collect(dk, dv, k, v, q_desc, do_desc, lse, delta, b, head, diagonal, full, keys, upper, T,
                         scale * LOG2_E, BLOCK_M, BLOCK_D, BLOCK_V, False, CAUSAL, UPPER)  # fmt: skip
        if UPPER:
            dk, dv = collect(dk, dv, k, v, q_desc, do_desc, lse, delta, b, head, tl.maximum(full, diagonal), end, keys,
                             upper, T, scale * LOG2_E, BLOCK_M, BLOCK_D, BLOCK_V, True, CAUSAL, UPPER)  # fmt: skip
    dk = (dk * scale).to(dk_desc.dtype)
    dk_desc.store([b, kv_head, first_key, 0], dk.reshape(1, 1, BLOCK_N, BLOCK_D))
    dv_desc.store([b, kv_head, first_key, 0], dv.to(dv_desc.dtype).reshape(1, 1, BLOCK_N, BLOCK_V))


@triton.jit
def send(dq, q, do, lse, delta, k_desc, v_desc, b, kv_head, begin, end, rows, lower, T, scale, BLOCK_N: tl.constexpr,
         BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
         LOWER: tl.constexpr):  # fmt: skip
    """Add what the keys [begin, end) send back to a tile of queries: dQ += dS K (algorithm 2, line 15)."""
    for n in range(begin, end, BLOCK_N):
        k = k_desc.load([b, kv_head, n, 0]).reshape(BLOCK_N, BLOCK_D)
        p = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale - lse[:, None])
        if MASKED:
            keys = n + tl.arange(0, BLOCK_N)
            p = tl.where(visible(rows[:, None], keys[None, :], lower[:, None], T, CAUSAL, LOWER), p, 0.0)
        v = v_desc.load([b, kv_head, n, 0]).reshape(BLOCK_N, BLOCK_V)
        dp = tl.dot(do, v.T, input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["lower_stride", "T"])  # one compilation for all lengths
def query_gradient_kernel(q_desc, k_desc, v_desc, do_desc, dq_desc, lse_ptr, delta_ptr, lower_ptr, lower_stride, T,
                          scale, GROUP, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                          BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CAUSAL: tl.constexpr,
                          LOWER: tl.constexpr):  # fmt: skip
    """One program: the gradient of BLOCK_M queries, by the walk over keys of the forward.

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, alg. 2.
    PAPER CONTEXT: there dQ is updated by atomic additions from the programs that own the keys.
    INTUITION: rather than have everybody shout corrections across the room, each row walks past the keys once more.
    IMPLEMENTATION: a second kernel, a deviation: S and dP are computed twice (7 products instead of 5).
    WHY: float atomics add in an order that changes from run to run, and cross the L2 cache for every tile.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # longest rows first
    head, b, first_row = tl.program_id(1), tl.program_id(2), tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    in_range = rows < T
    lower = rows
    if LOWER:
        lower = tl.load(lower_ptr + b.to(tl.int64) * lower_stride + rows, mask=in_range, other=0)
    start, solid, cut, stop = key_range(first_row, lower, in_range, T, BLOCK_M, BLOCK_N, CAUSAL, LOWER)
    at = (b * tl.num_programs(1) + head).to(tl.int64) * T + rows
    lse = tl.load(lse_ptr + at, mask=in_range, other=float("inf")) * LOG2_E
    delta = tl.load(delta_ptr + at, mask=in_range, other=0.0)
    q = q_desc.load([b, head, first_row, 0]).reshape(BLOCK_M, BLOCK_D)
    do = do_desc.load([b, head, first_row, 0]).reshape(BLOCK_M, BLOCK_V)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    kv_head = head // GROUP
    if LOWER:
        dq = send(dq, q, do, lse, delta, k_desc, v_desc, b, kv_head, start, solid, rows, lower, T, scale * LOG2_E,
                  BLOCK_N, BLOCK_D, BLOCK_V, True, CAUSAL, LOWER)  # fmt: skip
    dq = send(dq, q, do, lse, delta, k_desc, v_desc, b, kv_head, solid, cut, rows, lower, T, scale * LOG2_E, BLOCK_N,
              BLOCK_D, BLOCK_V, False, CAUSAL, LOWER)  # fmt: skip
    dq = send(dq, q, do, lse, delta, k_desc, v_desc, b, kv_head, tl.maximum(cut, start), stop, rows, lower, T,
              scale * LOG2_E, BLOCK_N, BLOCK_D, BLOCK_V, True, CAUSAL, LOWER)  # fmt: skip
    dq_desc.store([b, head, first_row, 0], (dq * scale).to(dq_desc.dtype).reshape(1, 1, BLOCK_M, BLOCK_D))
