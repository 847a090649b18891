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
    IMPLEMENTATION: every lane keeps a maximum and a sum of its own; the second sweep writes exp(logit - lse) -
        [column = target] over the logit. 32 warps a row: two rows a multiprocessor are what the L2 cache can hold.
    WHY: logits cross the memory bus twice instead of three times, and no second kernel runs in the backward.
    """
    import triton  # only here: everything else works without it
    import triton.language as tl

    @triton.jit
    def nll_gradient_kernel(logits_ptr, targets_ptr, nll_ptr, V, stride, IGNORED: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * stride
        target = tl.load(targets_ptr + row)
        columns = tl.arange(0, BLOCK)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            at = start + columns
            x = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, x)
            # lanes past the end of a short row have seen nothing yet: -inf - -inf would be NaN
            total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(top - higher) + tl.exp(x - higher))
            top = higher
        peak = tl.max(top, 0)
        log_z = peak + tl.log(tl.sum(total * tl.exp(top - peak), 0))
        counts = target != IGNORED
        chosen = tl.load(logits_ptr + tl.where(counts, target, 0)).to(tl.float32)
        tl.store(nll_ptr + row, tl.where(counts, log_z - chosen, 0.0))
        tl.debug_barrier()  # the chosen logit must be read before it is overwritten
        weight = tl.where(counts, 1.0, 0.0)
        for start in range(0, V, BLOCK):
            at = start + columns
            x = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
            gradient = (tl.exp(x - log_z) - tl.where(at == target, 1.0, 0.0)) * weight
            tl.store(logits_ptr + at, gradient.to(logits_ptr.dtype.element_ty), mask=at < V)

    return nll_gradient_kernel


def launch_gradient_kernel(logits: Tensor, targets: Tensor) -> Tensor:
    """Run the kernel over logits (N, V), in place; returns nll (N,)."""
    nll = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    rows, V = logits.shape
    kernels.launch(gradient_kernel())[(rows,)](
        logits, targets, nll, V, logits.stride(0), IGNORED=IGNORE, BLOCK=8192, num_warps=32
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
        grad_x = (d_logits @ w) * scale
        grad_weight = d_logits.T @ (x * scale).to(x.dtype)
        return grad_x.to(ctx.types[0]), grad_weight.to(ctx.types[1]), None, None


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
