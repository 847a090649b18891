"""
Fused cross-entropy

This file implements the loss whose gradient is ready when its value is, following:
- "Online normalizer calculation for softmax" (Milakov & Gimelshein, 2018) - maximum and sum in one pass
- "Liger Kernel: Efficient Triton Kernels for LLM Training" (Hsu et al., 2024) - writing the gradient over the logits

Each component is explained with paper references for educational purposes.
"""

import functools

import torch
from torch import Tensor

from common import kernels
from phase1_foundation.project3_pretrain.head import IGNORE, autocast_dtype


def reference(logits: Tensor, targets: Tensor) -> Tensor:
    """What the kernel computes: nll (N,) of logits (N, V), which are overwritten by softmax - one_hot(target)."""
    wide = logits.float()
    log_z = wide.logsumexp(dim=-1)
    safe = targets.clamp(min=0).unsqueeze(-1)
    nll = torch.where(targets == IGNORE, 0.0, log_z - wide.gather(-1, safe).squeeze(-1))
    gradient = (wide - log_z.unsqueeze(-1)).exp()
    gradient.scatter_add_(-1, safe, torch.full_like(wide[:, :1], -1.0))
    logits.copy_(torch.where((targets == IGNORE).unsqueeze(-1), 0.0, gradient))
    return nll


@functools.cache
def gradient_kernel():
    """
    The Triton kernel: one program a row, log-sum-exp in the first sweep, the gradient in the second

    PAPER: arXiv:1805.02867 (Milakov & Gimelshein), algorithm 3; in place as arXiv:2410.10989 (Liger), section 3.2.
    PAPER CONTEXT: a running maximum rescales the running sum, so one pass over a row gives its log-sum-exp.
    INTUITION: while a row of 100 KB still lies in the cache, read it again and leave its gradient there.
    IMPLEMENTATION: every lane takes WIDTH neighbours at a time and keeps one maximum and one sum, so rescaling costs
        one exponential for WIDTH logits; the second sweep writes the softmax, and 1 is taken from the target's.
    WHY: logits cross the memory bus twice instead of three times, and no second kernel runs in the backward. With a
        rescaling for every logit the exponentials, three a logit, take longer than the memory does.
    """
    import triton  # only here: everything else works without it
    import triton.language as tl

    @triton.jit
    def nll_gradient_kernel(
        logits_ptr, targets_ptr, nll_ptr, V, stride, IGNORED: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr
    ):
        LOG2_E: tl.constexpr = 1.4426950408889634  # everything in bits: exp2 is what the hardware has
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * stride
        target = tl.load(targets_ptr + row)
        columns = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        top = tl.full((LANES,), float("-inf"), tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for start in range(0, V, LANES * WIDTH):
            at = start + columns
            # "evict_last": the row is read a second time, so it should stay in the cache
            x = tl.load(logits_ptr + at, mask=at < V, other=float("-inf"), eviction_policy="evict_last")
            x = x.to(tl.float32) * LOG2_E
            higher = tl.maximum(top, tl.max(x, 1))
            # lanes past the end of a short row have seen nothing yet: -inf - -inf would be NaN
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(x - base[:, None]), 1)
            top = higher
        peak = tl.max(top, 0)
        log_z = peak + tl.log2(tl.sum(total * tl.exp2(top - peak), 0))
        counts = target != IGNORED
        place = logits_ptr + tl.where(counts, target, 0)
        chosen = tl.load(place).to(tl.float32) * LOG2_E
        tl.store(nll_ptr + row, tl.where(counts, (log_z - chosen) / LOG2_E, 0.0))
        tl.debug_barrier()  # the chosen logit must be read before it is overwritten
        divisor = tl.where(counts, log_z, float("inf"))  # an ignored row has gradient 0
        for start in range(0, V, LANES * WIDTH):
            at = start + columns
            x = tl.load(logits_ptr + at, mask=at < V, other=float("-inf"), eviction_policy="evict_first")
            share = tl.exp2(x.to(tl.float32) * LOG2_E - divisor).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + at, share, mask=at < V, eviction_policy="evict_first")
        tl.debug_barrier()  # the softmax must be written before the target's share is taken from it
        tl.store(place, (tl.exp2(chosen - log_z) - 1.0).to(logits_ptr.dtype.element_ty), mask=counts)

    return nll_gradient_kernel


def launch_gradient_kernel(logits: Tensor, targets: Tensor) -> Tensor:
    """Run the kernel over logits (N, V), in place; returns nll (N,)."""
    nll = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    rows, V = logits.shape
    kernels.launch(gradient_kernel())[(rows,)](
        logits, targets, nll, V, logits.stride(0), IGNORED=IGNORE, LANES=1024, WIDTH=8, num_warps=32
    )
    return nll


nll_and_gradient = kernels.op("nll_and_gradient", reference, mutates={"logits"})(launch_gradient_kernel)


class FusedNLL(torch.autograd.Function):
    """Forward and backward of `fused_nll`.

    PAPER: arXiv:2410.10989 (Liger Kernel), section 3.2.
    PAPER CONTEXT: d nll / d logits = softmax - one_hot(target).
    INTUITION: the forward leaves the gradient where the logits were, so the backward has nothing left to compute.
    IMPLEMENTATION: the incoming gradient is one number a row; it scales rows of x and of the result.
    WHY: the N x V matrix is touched by two products and nothing else.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype):
        """x (N, C), weight (V, C), targets (N,) -> nll (N,)."""
        x_cast, w = x.to(dtype), weight.to(dtype)
        logits = x_cast @ w.T  # (N, V)
        nll = torch.ops.roadmap.nll_and_gradient(logits, targets)
        ctx.save_for_backward(x_cast, w, logits)
        ctx.types = x.dtype, weight.dtype
        return nll

    @staticmethod
    def backward(ctx, grad):
        """grad (N,) -> gradients of x (N, C) and weight (V, C)."""
        x, w, d_logits = ctx.saved_tensors
        scale = grad.unsqueeze(-1)
        grad_x = ((d_logits @ w) * scale).to(ctx.types[0])
        if not ctx.needs_input_grad[1]:  # a frozen head, under adapters
            return grad_x, None, None, None
        grad_weight = d_logits.T @ (x * scale).to(x.dtype)
        return grad_x, grad_weight.to(ctx.types[1]), None, None


def fused_nll(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """
    `plain_nll` with the gradient computed on the spot

    PAPER: arXiv:2410.10989 (Liger Kernel), section 3.2, without its chunks.
    PAPER CONTEXT: softmax - one_hot is all the backward needs, and it is known as soon as the log-sum-exp is.
    INTUITION: do not file the logits away to fetch them again: turn them into their gradient while they are at hand.
    IMPLEMENTATION: product, `nll_and_gradient`, two products; the incoming gradient scales rows, not the matrix.
    WHY: cross-entropy is the largest memory-bound part of a small model's step (V is 65 times C in GPT-2 124M).

    Same shapes and values as `plain_nll`; under autocast the products run in autocast's dtype.
    """
    nll = FusedNLL.apply(x.flatten(0, -2), weight, targets.flatten(), autocast_dtype(x))
    return nll.view(targets.shape)


def use_fused_loss(model):
    """Give `model` the fused loss."""
    return model.use_loss(fused_nll)
