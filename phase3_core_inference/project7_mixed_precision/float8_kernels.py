"""
Float8 kernels

This file implements a product of few rows with weights of one byte, as Triton kernels, following:
- "FP8 Formats for Deep Learning" (Micikevicius et al., 2022) - E4M3, a scale beside
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - at small batches the time to load weights dominates

Each component is explained with paper references for educational purposes.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)  # of E4M3
SMALLEST = tl.constexpr(2.0**-100)  # below that the scale itself would be infinite


@triton.jit
def nearest_e4m3(x):
    """The value of E4M3 nearest to x, float32 of at most 448; to even where two are equally near.

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 3, table 1.
    PAPER CONTEXT: 4 bits of exponent and 3 of mantissa; the smallest normal value is 2^-6, below it steps are of 2^-9.
    INTUITION: strike out the last 20 of float32's 23 digits, having added half of what the last that stays is worth.
    IMPLEMENTATION: on the bits of float32; what lies below 2^-6 by adding and subtracting a number so large that its
        own steps are 2^-9.
    WHY: as the hardware's cast, and runs wherever Triton does, its interpreter included.
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (x + 1.5 * 2.0**14) - 1.5 * 2.0**14
    small = (small.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)  # zeros have signs
    return tl.where(tl.abs(x) < 2.0**-6, small, normal)


@triton.jit
def value_of(codes, CAST: tl.constexpr):
    """The values of E4M3 codes, float16: by the hardware's cast, or over 256 by moving the bits by 7.

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 3, table 1.
    PAPER CONTEXT: a sign, 4 bits of exponent that count from 7, 3 of mantissa.
    INTUITION: float16 has the same three parts, only more of each: put every bit where it belongs.
    IMPLEMENTATION: float16's exponent has 5 bits and counts from 15: hence the factor of 2^8. Subnormal codes become
        subnormal numbers, so this is exact. NaN becomes 480, but its row's scale is infinite or NaN then.
    WHY: Ada and Hopper cast two codes in one instruction; the shifts, five for each, run on any GPU.
    """
    if CAST:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    wide = codes.to(tl.int16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def round_kernel(x_ptr, codes_ptr, scale_ptr, K, BLOCK: tl.constexpr):
    """One program: scale one row of x so that its largest value is 448, and round it to E4M3.

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 3.
    PAPER CONTEXT: a scale for each tensor; here for each token.
    INTUITION: one look for the loudest, one to write everything down at that volume.
    IMPLEMENTATION: `to_float8` in one launch in place of eight. What is infinite or NaN makes the scale NaN, and so all
        that the row is multiplied to.
    WHY: in a decode step each launch costs as much as the work that it starts.
    """
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x)), SMALLEST)
    fits = tl.minimum(tl.maximum(x * tl.div_rn(LARGEST, largest), -LARGEST), LARGEST)
    bits = (nearest_e4m3(fits) / 256.0).to(tl.float16).to(tl.int16, bitcast=True)
    codes = ((bits >> 8) & 0x80) | ((bits >> 7) & 0x7F)
    tl.store(codes_ptr + row * K + k, codes.to(tl.uint8), mask=k < K)
    tl.store(scale_ptr + row, tl.div_rn(largest, LARGEST) + tl.sum(x * 0.0))


@triton.jit
def few_rows_kernel(x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, y_ptr, N, M: tl.constexpr, K: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CAST: tl.constexpr):  # fmt: skip
    """One program: a few outputs of all rows, y (M, N) = x (M, K) w (N, K)^T, both of them codes.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.
    PAPER CONTEXT: what a decode step takes at a small batch is the time to read the weights.
    INTUITION: the shelf of books is what is heavy, not the few readers: carry each book past all of them once.
    IMPLEMENTATION: no tensor cores, which would want sixteen rows: each thread multiplies its part of a few lines of
        the weight, which are read whole and at once, and a sum over the threads ends it. Rows after the first find the
        weight in the cache. Sums are float32, and products of two codes are exact in it.
    WHY: the tensor cores' float8 product is made for hundreds of rows.
    """
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w_at = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    w_scale = tl.load(w_scale_ptr + n, mask=n < N, other=0.0).to(tl.float32) * (1.0 if CAST else 65536.0)
    for m in tl.static_range(M):
        total = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, K, BLOCK_K):
            inside = start + k < K
            w = value_of(tl.load(w_at + start, mask=(n < N)[:, None] & inside[None, :], other=0), CAST)
            x = value_of(tl.load(x_ptr + m * K + start + k, mask=inside, other=0), CAST)
            total += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
        tl.store(y_ptr + m * N + n, total * w_scale * tl.load(x_scale_ptr + m), mask=n < N)
