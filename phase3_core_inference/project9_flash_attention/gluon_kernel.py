"""
Gluon forward kernel

This file implements the forward for Hopper GPUs with its stages under our own control, in Gluon, following:
- "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision" (Shah et al., 2024) - producer and
  consumer warps, ping-pong scheduling of two warp groups, softmax under the shadow of the matrix products
- "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (Dao, 2023) - the algorithm

Each component is explained with paper references for educational purposes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2_E = gl.constexpr(1.4426950408889634)
# the names of the two copies in newer versions of Triton, and in 3.6
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
HIDDEN = gl.constexpr(float("-inf"))  # the score of a key that is not seen; every row sees a key of its first tile


@gluon.jit
def hide(s, rows, keys, T, CAUSAL: gl.constexpr):
    """The scores of one tile, -inf where a key is not seen."""
    seen = keys < T
    if CAUSAL:
        seen = seen & (keys <= rows)
    return gl.where(seen, s, HIDDEN)


@gluon.jit
def producer(q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_empty, v_ready, v_empty, b, head,
             kv_head, first_row, tiles, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """One warp that does nothing but order tiles from memory, as soon as there is room for them.

    PAPER: "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", arXiv:2407.08608, alg. 1.
    PAPER CONTEXT: a producer warp issues TMA loads into a circular buffer; it gives its registers to the consumers.
    INTUITION: a runner between cold store and kitchen, who stops only when every shelf is full.
    IMPLEMENTATION: STAGES places for keys and as many for values, each with two barriers: `ready` counts the bytes that
        have arrived, `empty` the consumers that are done. A barrier's phase flips at every use: hence the parity.
    WHY: one thread starts a copy of a whole tile; no register and no other warp takes part in it.
    """
    for c in gl.static_range(2):
        mbarrier.expect(q_ready.index(c), q_desc.block_type.nbytes)
        load_tile(q_desc, [b, head, first_row + c * ROWS, 0], q_ready.index(c), q_tiles.index(c))
    for i in range(tiles):
        stage = i % STAGES
        parity = (i // STAGES & 1) ^ 1
        n = (tiles - 1 - i) * KEYS  # the diagonal first
        mbarrier.wait(k_empty.index(stage), parity)
        mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
        load_tile(k_desc, [b, kv_head, n, 0], k_ready.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_empty.index(stage), parity)
        mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
        load_tile(v_desc, [b, kv_head, n, 0], v_ready.index(stage), v_tiles.index(stage))


@gluon.jit
def consumer(o_desc, lse_ptr, q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_empty, v_ready, v_empty, turn, b, head,
             heads, first_row, tiles, T, scale, ME: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
             D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, PING_PONG: gl.constexpr):  # fmt: skip
    """A warp group that owns ROWS queries and walks over all tiles of keys.

    PAPER: "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", arXiv:2407.08608, alg. 2.
    PAPER CONTEXT: S of the next tile is multiplied while the softmax of this one is computed (intra-warpgroup overlap).
    INTUITION: put the next pot on the stove before you season the last.
    IMPLEMENTATION: in turn i, S_i = Q K_i^T and O += P_(i-1) V_(i-1) run together; the softmax of S_i begins when the
        first is done. With PING_PONG a consumer starts its products only after the other has started its own.
    WHY: an H100 has 256 times the throughput for products that it has for exponentials (section 3.1): whatever does not
        overlap them is lost.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = q_tiles.dtype
    first_row += ME * ROWS
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    blank = gl.zeros((ROWS, KEYS), gl.float32, s_layout)
    o = gl.zeros((ROWS, D), gl.float32, o_layout)
    q = q_tiles.index(ME)
    # the first tile, the only one with a mask: the diagonal, or the end of the row
    mbarrier.wait(q_ready.index(ME), 0)
    mbarrier.wait(k_ready.index(0), 0)
    s = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), blank, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(0), count=1)
    keys = (tiles - 1) * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
    s = hide(s, rows[:, None], keys[None, :], T, CAUSAL)
    top = gl.max(s, 1) * scale
    p = gl.exp2(s * scale - top[:, None])
    total = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(dtype), p_layout)
    for i in range(1, tiles):
        stage = i % STAGES
        parity = i // STAGES & 1
        before = (i - 1) % STAGES
        if PING_PONG:
            mbarrier.wait(turn.index(ME), ((i - 1) & 1) ^ (1 - ME))
        mbarrier.wait(k_ready.index(stage), parity)
        s = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), blank, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(before), (i - 1) // STAGES & 1)
        o = warpgroup_mma(weights, v_tiles.index(before), o, is_async=True)
        if PING_PONG:
            mbarrier.arrive(turn.index(1 - ME), count=1)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        higher = gl.maximum(top, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - higher[:, None])
        shrink = gl.exp2(top - higher)
        total = total * shrink + gl.sum(p, 1)
        top = higher
        o = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(v_empty.index(before), count=1)
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
        weights = gl.convert_layout(p.to(dtype), p_layout)
    last = (tiles - 1) % STAGES
    mbarrier.wait(v_ready.index(last), (tiles - 1) // STAGES & 1)
    o = warpgroup_mma(weights, v_tiles.index(last), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=(o,))
    o = o / gl.convert_layout(total, gl.SliceLayout(1, o_layout))[:, None]
    q.store(o.to(dtype))  # the queries are not needed any more: their place takes the result
    fence_async_shared()
    store_tile(o_desc, [b, head, first_row, 0], q)
    gl.store(lse_ptr + (b * heads + head).to(gl.int64) * T + rows, (top + gl.log2(total)) / LOG2_E, mask=rows < T)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T"])
def gluon_forward_kernel(q_desc, k_desc, v_desc, o_desc, lse_ptr, T, scale, GROUP, ROWS: gl.constexpr,
                         KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
                         PING_PONG: gl.constexpr):  # fmt: skip
    """One program: 2 x ROWS queries of one head; three roles run side by side.

    PAPER: "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", arXiv:2407.08608, 3.1.
    PAPER CONTEXT: warp specialisation: producer and consumers are different warps of a block, with different registers.
    INTUITION: two cooks and a runner; all they share is the shelves and the bells.
    IMPLEMENTATION: shared memory and barriers are made here, then `warp_specialize` starts the roles: the first in this
        program's own 4 warps, the second in 4 more, the producer in one; [240, 24] are registers a thread of those.
    WHY: copies, products and exponentials come from three units of the chip: only side by side are they all busy.
    """
    tile = gl.num_programs(0) - 1 - gl.program_id(0)  # longest rows first
    head, b, heads = gl.program_id(1), gl.program_id(2), gl.num_programs(1)
    first_row = tile * 2 * ROWS
    end = T
    if CAUSAL:
        end = gl.minimum(first_row + 2 * ROWS, T)
    tiles = (end + KEYS - 1) // KEYS
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], q_desc.dtype)
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, D], tile_layout)
    k_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, KEYS, D], tile_layout)
    v_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, KEYS, D], tile_layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(2):
        mbarrier.init(q_ready.index(c), count=1)
        mbarrier.init(turn.index(c), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    scale *= LOG2_E
    gl.warp_specialize(
        [
            (consumer, (o_desc, lse_ptr, q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_empty, v_ready, v_empty, turn,
                        b, head, heads, first_row, tiles, T, scale, 0, ROWS, KEYS, D, STAGES, CAUSAL, PING_PONG)),
            (consumer, (o_desc, lse_ptr, q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_empty, v_ready, v_empty, turn,
                        b, head, heads, first_row, tiles, T, scale, 1, ROWS, KEYS, D, STAGES, CAUSAL, PING_PONG)),
            (producer, (q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_empty, v_ready, v_empty,
                        b, head, head // GROUP, first_row, tiles, ROWS, KEYS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
