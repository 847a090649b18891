"""
Products of few rows with stored weights

This file implements the float8 product of a decode step, in which the reading of weights is what takes time, following:
- "FP8 Formats for Deep Learning" (Micikevicius et al., 2022) - weights and activations in E4M3, scales beside
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - at small batches the time to load weights dominates

Each component is explained with paper references for educational purposes.
"""

import functools

import torch
from torch import Tensor

from common import kernels
from phase3_core_inference.project7_mixed_precision.float8 import E4M3, emulated_product, to_float8

FEW = 4  # rows up to which the kernel multiplies; beyond, the tensor cores' float8 product does
TILE = 8192  # codes of the weight that a program reads at once


@functools.cache
def gpu_code():
    """The module with the kernels: Triton is not there on every machine."""
    from phase3_core_inference.project7_mixed_precision import float8_kernels

    return float8_kernels


def have_kernels(x: Tensor) -> bool:
    """Whether the kernels run where x is."""
    return (x.is_cuda and kernels.has_triton()) or kernels.interpreting()


def can_cast(x: Tensor) -> bool:
    """Whether the GPU of x has instructions for float8: Ada and Hopper (8.9) and later."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)


def round_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `round_rows` computes, step by step."""
    codes, scale = to_float8(x, E4M3, dim=1)
    return codes.contiguous().view(torch.uint8), scale


def _round_shapes(x):
    """Empty results of `round_rows`."""
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@kernels.op("round_rows", round_reference, fake=_round_shapes, opaque=True)
def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of x (M, K) to E4M3 with a scale of its own: codes (M, K) uint8, scales (M, 1) float32."""
    (M, K), x = x.shape, x.contiguous()
    codes, scale = _round_shapes(x)
    if M:
        gpu_code().round_kernel[(M,)](x, codes, scale, K, BLOCK=1 << (K - 1).bit_length())
    return codes, scale


def few_rows_reference(x8: Tensor, of_x: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What the kernel computes: codes (M, K) and (N, K) with their scales (M, 1) and (N, 1) -> (M, N)."""
    return emulated_product(x8.view(E4M3), codes.view(E4M3).t(), of_x, scale.float().t(), dtype, True)


def _shapes(x8, of_x, codes, scale, dtype):
    """An empty result of `few_rows_product`; refuses sizes that do not fit, of which the kernel would see nothing."""
    if x8.shape[1] != codes.shape[1]:
        raise ValueError(f"rows of {x8.shape[1]} values cannot be multiplied with a weight of {codes.shape[1]} inputs")
    return x8.new_empty(x8.shape[0], codes.shape[0], dtype=dtype)


@kernels.op("few_rows_product", few_rows_reference, fake=_shapes, opaque=True)
def few_rows_product(x8: Tensor, of_x: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T of codes (uint8) x8 (M, K) and codes (N, K), with scales of_x (M, 1) and scale (N, 1) -> (M, N) in `dtype`.

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 4; "Efficiently Scaling Transformer Inference",
        arXiv:2211.05102, section 2.
    PAPER CONTEXT: weights and activations in E4M3; at small batches the time to load the weights dominates.
    INTUITION: half the bytes are worth half the time only if nothing but reading takes time.
    IMPLEMENTATION: one program for a few lines of the weight; the codes and scales of the tensor cores' product,
        summed in float32.
    WHY: that product is slower for few rows than one with weights of two bytes: see the benchmark.
    """
    (M, K), N = x8.shape, codes.shape[0]
    y = _shapes(x8, of_x, codes, scale, dtype)
    wide = min(1 << (K - 1).bit_length(), TILE)
    lines = max(1, TILE // wide)
    if M:
        x8, of_x, codes, scale = (tensor.contiguous() for tensor in (x8, of_x, codes, scale))
        gpu_code().few_rows_kernel[(-(-N // lines),)](
            x8, of_x, codes, scale, y, N, M=M, K=K, BLOCK_N=lines, BLOCK_K=wide, CAST=can_cast(x8), num_warps=4
        )
    return y
