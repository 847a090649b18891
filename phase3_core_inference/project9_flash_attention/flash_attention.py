"""
FlashAttention

This file implements exact attention by Triton kernels, forward and backward, as an operator, following:
- "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness" (Dao et al., 2022) - the method
- "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (Dao, 2023) - the kernels

Each component is explained with paper references for educational purposes.
"""

import functools

import torch
from torch import Tensor

from common import kernels
from phase1_foundation.project3_pretrain.head import autocast_dtype
from phase1_foundation.project3_pretrain.plans import sdpa
from phase3_core_inference.project9_flash_attention import reference, tiles

WIDEST = 256  # head size that the kernels have tiles for


@functools.cache
def gpu_code():
    """The modules with the kernels: Triton is not there on every machine."""
    from phase3_core_inference.project9_flash_attention import backward_kernels, forward_kernel

    return forward_kernel, backward_kernels


def runs_on_kernels(x: Tensor) -> bool:
    """Whether the kernels take x: half precision on a GPU; in the interpreter all but bfloat16, which it gets wrong."""
    if x.is_cuda:
        return kernels.has_triton() and x.dtype in (torch.bfloat16, torch.float16)
    return kernels.interpreting() and x.dtype in (torch.float16, torch.float32)


def heads_first(x: Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of x (B, T, H, D) as (B, H, T, D).

    The tensor memory accelerator wants strides of whole 16 bytes; a dimension of size 1 may have any.
    """
    strides = [x.stride(i) if x.shape[i] > 1 else 16 for i in (0, 2, 1)]
    return [x.shape[i] for i in (0, 2, 1, 3)], [*strides, 1]


def tiled(x: Tensor, rows: int, width: int):
    """A descriptor that reads and writes tiles (rows, width) of x (B, T, H, D), zeros past its edges."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, *heads_first(x), [1, 1, rows, width])


def readable(x: Tensor) -> Tensor:
    """X itself, or a copy where a descriptor cannot read it as it lies."""
    aligned = all(x.shape[i] == 1 or x.stride(i) * x.itemsize % 16 == 0 for i in range(3))
    return (
        x if aligned and x.stride(3) == 1 and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    )


def _bounds(bounds: Tensor | None, otherwise: Tensor) -> tuple[Tensor, int]:
    """A tensor of bounds (B or 1, T) with the stride of its rows; any pointer will do where there are none."""
    if bounds is None:
        return otherwise, 0
    return bounds, bounds.stride(0) if bounds.shape[0] > 1 else 0


def _forward_shapes(q, k, v, lower, scale, causal):
    """Empty results of `flash_forward`."""
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=torch.float32)


@kernels.op("flash_forward", reference.tiled_forward, fake=_forward_shapes, opaque=True)
def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, lower: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Launch the forward: o (B, T, H, Dv) and the natural log-sum-exp of each row (B, H, T).

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, alg. 1.
    PAPER CONTEXT: parallel over batch, heads and tiles of queries.
    INTUITION: every program gets a strip of the score matrix that it never has to write down.
    IMPLEMENTATION: q, k, v (B, T, H, D) are read where they lie (slices of one projection, say), by descriptors.
    WHY: an operator: autograd, torch.compile and CUDA graphs treat it like any other.
    """
    q, k, v = readable(q), readable(k), readable(v)
    (B, T, H, D), V = q.shape, v.shape[-1]
    o, lse = _forward_shapes(q, k, v, lower, scale, causal)
    bounds, stride = _bounds(lower, lse)
    d, w = tiles.width_of(D), tiles.width_of(V)

    def launch(tile):
        gpu_code()[0].forward_kernel[(-(-T // tile.m), H, B)](
            tiled(q, tile.m, d), tiled(k, tile.n, d), tiled(v, tile.n, w), tiled(o, tile.m, w), lse, bounds, stride, T,
            scale, GROUP=H // k.shape[2], BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_D=d, BLOCK_V=w, CAUSAL=causal,
            LOWER=lower is not None, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    tiles.launch_best("forward", max(d, w), T, launch)
    return o, lse


def _backward_shapes(do, dlse, q, k, v, o, lse, lower, scale, causal):
    """Empty results of `flash_backward`."""
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@kernels.op("flash_backward", reference.tiled_backward, fake=_backward_shapes, opaque=True)
def flash_backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lower: Tensor | None,
    scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward: dq, dk, dv from the gradients of both results of `flash_forward`.

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, alg. 2.
    PAPER CONTEXT: delta first, then one program for each tile of keys.
    INTUITION: keys gather, queries gather; nobody writes into another's rows.
    IMPLEMENTATION: three kernels (delta, dK with dV, dQ). `upper`, the first query that no longer sees a key, follows
        from the lower bounds, which never fall.
    WHY: without atomics the gradients have the same bits every time: deterministic, without an option for it.
    """
    do, q, k, v = readable(do), readable(q), readable(k), readable(v)
    (B, T, H, D), V = q.shape, v.shape[-1]
    dq, dk, dv = _backward_shapes(do, dlse, q, k, v, o, lse, lower, scale, causal)
    d, w = tiles.width_of(D), tiles.width_of(V)
    delta = torch.empty_like(lse)
    code = gpu_code()[1]
    code.delta_kernel[(-(-T // 64), H, B)](
        tiled(o, 64, w), tiled(do, 64, w), dlse.contiguous(), delta, T, BLOCK_M=64, BLOCK_V=w
    )
    lows, low_stride = _bounds(lower, lse)
    highs, high_stride = _bounds(None if lower is None else upper_bounds(lower), lse)
    shape = {"GROUP": H // k.shape[2], "BLOCK_D": d, "BLOCK_V": w, "CAUSAL": causal}

    def keys(tile):
        code.key_gradient_kernel[(-(-T // tile.n), k.shape[2], B)](
            tiled(q, tile.m, d), tiled(k, tile.n, d), tiled(v, tile.n, w), tiled(do, tile.m, w), tiled(dk, tile.n, d),
            tiled(dv, tile.n, w), lse, delta, highs, high_stride, T, scale, BLOCK_M=tile.m, BLOCK_N=tile.n,
            UPPER=lower is not None, num_warps=tile.warps, num_stages=tile.stages, **shape,
        )  # fmt: skip

    def queries(tile):
        code.query_gradient_kernel[(-(-T // tile.m), H, B)](
            tiled(q, tile.m, d), tiled(k, tile.n, d), tiled(v, tile.n, w), tiled(do, tile.m, w), tiled(dq, tile.m, d),
            lse, delta, lows, low_stride, T, scale, BLOCK_M=tile.m, BLOCK_N=tile.n, LOWER=lower is not None,
            num_warps=tile.warps, num_stages=tile.stages, **shape,
        )  # fmt: skip

    tiles.launch_best("keys", max(d, w), T, keys)
    tiles.launch_best("queries", max(d, w), T, queries)
    return dq, dk, dv


def upper_bounds(lower: Tensor) -> Tensor:
    """The first query that no longer sees a key, (B or 1, T) int32: how many lower bounds are at most its index.

    >>> upper_bounds(torch.tensor([[0, 0, 1, 2, 2]], dtype=torch.int32)).tolist()   # key 0 is seen by queries 0 and 1
    [[2, 3, 5, 5, 5]]
    """
    keys = torch.arange(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand(lower.shape)
    return torch.searchsorted(lower.contiguous(), keys.contiguous(), right=True, out_int32=True)


def remember(ctx, inputs, output) -> None:
    """Keep q, k, v, o and one number a row for the backward."""
    q, k, v, lower, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, lower, *output)


def differentiate(ctx, do: Tensor, dlse: Tensor) -> tuple:
    """The gradients of the six arguments of `flash_forward`."""
    q, k, v, lower, o, lse = ctx.saved_tensors
    grads = torch.ops.roadmap.flash_backward(do, dlse, q, k, v, o, lse, lower, ctx.scale, ctx.causal)
    return (*grads, None, None, None)


flash_forward.register_autograd(differentiate, setup_context=remember)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, starts: Tensor | None = None,
    causal: bool = True,
) -> Tensor:  # fmt: skip
    """Exact attention by Triton kernels; the signature of project 3's `plans.Kernel`, for `model.use_attention`.

    PAPER: "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", arXiv:2205.14135, section 3.
    PAPER CONTEXT: not an approximation: the same numbers with fewer reads and writes of the GPU's main memory.
    INTUITION: do all that can be done with a tile while it is on the chip.
    IMPLEMENTATION: autocast's type is taken on, as by `sdpa`; windows and documents become lower bounds. float32, which
        has no full-precision tensor cores, and devices without Triton are left to project 3's `sdpa`.
    WHY: any T, grouped heads, windows and packed documents, at memory that grows with T alone.

    Args:
        q, k, v: (..., T, H, D), (..., T, Hkv, D), (..., T, Hkv, Dv), bfloat16 or float16; D, Dv multiples of 8, at most
            256.
        starts: (..., T), where the document of each token begins; must not fall within a row.

    Raises:
        ValueError: shapes, types or sizes that do not fit; the message says which.
    """
    dtype = autocast_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    reference.check_shapes(q, k, v, starts)
    if not runs_on_kernels(q):
        return sdpa(q, k, v, scale=scale, window=window, starts=starts, causal=causal)
    D, V = q.shape[-1], v.shape[-1]
    if max(D, V) > WIDEST or D % 8 or V % 8:
        raise ValueError(f"head sizes {D} and {V} must be multiples of 8 up to {WIDEST}: pad them, or use sdpa")
    if not scale > 0:
        raise ValueError(f"scale={scale} must be above 0: pass 1 / sqrt(head size) = {D**-0.5:.4f}")
    if starts is not None:
        starts = starts.expand(q.shape[:-2])
    lower = reference.lower_bounds(q.shape[-3], window, starts, q.device)
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
    o, _ = torch.ops.roadmap.flash_forward(*flat, lower, scale, causal)
    return o.reshape(*q.shape[:-1], V)


def use_flash_attention(model, gluon: bool = False, tune: bool = False):
    """Give `model` FlashAttention, for training and for whole prompts.

    Args:
        gluon: the forward made for Hopper GPUs.
        tune: measure tile sizes on this GPU when a head size and length is first met, instead of taking the table's.

    Raises:
        ValueError: `gluon` without a Hopper GPU or without a Triton that has Gluon for it.
    """
    if tune:
        tiles.tune_at_first_use()
    if not gluon:
        return model.use_attention(flash_attention)
    from phase3_core_inference.project9_flash_attention import gluon_attention  # it stands on this file

    gluon_attention.require_hopper()
    return model.use_attention(gluon_attention.gluon_attention)
