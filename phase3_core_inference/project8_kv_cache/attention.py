"""
Attention over a cache

This file implements queries that read cached keys and values following:
- "Attention Is All You Need" (Vaswani et al., 2017) - scaled dot-product attention
- "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (Ainslie et al., 2023) - groups
  of query heads read one head of keys and values
- "Fast Transformer Decoding: One Write-Head is All You Need" (Shazeer, 2019) - why decoding waits for memory

Each component is explained with paper references for educational purposes.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from phase3_core_inference.project8_kv_cache.work import SHORT

FEW_HEADS, MANY_KEYS = 8, 1024  # of keys in a step, and of each: where the fused kernel leaves a GPU idle


class CacheKernel(Protocol):
    """How queries read a cache; a constructor argument of the cache.

    `bias` is 0 where a query sees a key and -inf elsewhere, in the type of the cache; or PyTorch's `CausalBias`, where
    the queries of one row end at its last key, each seeing what comes before it. `ends` says the same of a lone
    query in one number a row: it sees the first so many keys; None where that is not so (windows, rings).
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, ends: Tensor | None = None
    ) -> Tensor:
        """q (R, T, H, D), k (R, Hkv, S, D), v (R, Hkv, S, Dv), bias (R, T, S), ends (R,) -> (R, T, H, Dv)."""
        ...


def by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, ends: Tensor | None = None) -> Tensor:
    """Attention as two batched matrix products around a softmax.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3.2.1, equation 1; "GQA: Training Generalized
        Multi-Query Transformer Models from Multi-Head Checkpoints", arXiv:2305.13245, section 2.2.
    PAPER CONTEXT: softmax(Q K^T / sqrt(d)) V; a group of query heads shares one head of keys and values.
    INTUITION: with one query a row the score matrix is a line: there is nothing to save by tiling it.
    IMPLEMENTATION: the G query heads of a group and the T queries are the rows of one product with their shared keys,
        so keys are neither repeated nor copied. Queries are scaled, which are fewer than scores. The softmax runs in
        float32, over scores that the product has already rounded to the cache's type.
    WHY: all streaming processors of a GPU share the keys of a long text, also when the batch is one row.
    """
    R, T, H, D = q.shape
    G = H // k.shape[1]
    rows = (q * scale).unflatten(2, (-1, G)).permute(0, 2, 3, 1, 4).reshape(R, -1, G * T, D)  # (R, Hkv, G*T, D)
    scores = (rows @ k.transpose(-2, -1)).unflatten(2, (G, T)) + bias[:, None, None]  # (R, Hkv, G, T, S)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    y = weights.flatten(2, 3) @ v  # (R, Hkv, G*T, Dv)
    return y.unflatten(2, (G, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (R, T, H, Dv)


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, ends: Tensor | None = None) -> Tensor:
    """Attention by PyTorch's fused kernels.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3.2.1, equation 1.
    PAPER CONTEXT: softmax(Q K^T / sqrt(d)) V.
    INTUITION: many queries make a large score matrix, which the fused kernels never write down.
    IMPLEMENTATION: one query a row: the query heads of a group are called queries of one head. Several: keys are
        repeated, as masked kernels know no groups.
    WHY: prefill; and decoding on a CPU, where it is the fastest that PyTorch has.
    """
    # A `CausalBias`, the last query at the last key: kernels skip what is not seen, and know groups.
    if type(bias) is not Tensor:
        q = q.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=True).transpose(1, 2)
    G = q.shape[2] // k.shape[1]
    bias = bias.unsqueeze(1)  # (R, 1, T, S)
    if q.shape[1] == 1:
        rows = q.unflatten(2, (-1, G)).squeeze(1)  # (R, Hkv, G, D)
        y = F.scaled_dot_product_attention(rows, k, v, bias.expand(-1, -1, G, -1), scale=scale)
        return y.flatten(1, 2).unsqueeze(1)
    k, v = (x if G == 1 else x.repeat_interleave(G, dim=1) for x in (k, v))  # (R, H, S, D)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, bias, scale=scale).transpose(1, 2)


def by_length(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, ends: Tensor | None = None) -> Tensor:
    """The fused kernel, or products where that leaves a GPU idle or would repeat keys.

    PAPER: "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", arXiv:2305.13245.
    PAPER CONTEXT: groups of query heads share a head of keys, so a step has fewer heads to share out.
    INTUITION: many short queues want many counters, one long queue wants many hands at one counter.
    IMPLEMENTATION: one query a row: products if few heads, shared by groups, have many keys; a few queries: products;
        many: the fused one.
    WHY: measured (benchmark.py, kernels): the fused one takes up to 33% less time, but products with 4 heads of 8,000
        keys 38% less.
    """
    (R, T, H, _), (_, Hkv, S, _) = q.shape, k.shape
    crowded = Hkv < H and R * Hkv <= FEW_HEADS and S > MANY_KEYS
    kernel = by_products if (crowded if T == 1 else T <= SHORT) else by_sdpa
    return kernel(q, k, v, bias, scale)


KERNELS: dict[str, CacheKernel] = {"products": by_products, "sdpa": by_sdpa, "length": by_length}


def best_kernel(device) -> CacheKernel:
    """The kernel that a cache on this device uses unless it is given one."""
    return by_length if torch.device(device).type == "cuda" else by_sdpa
