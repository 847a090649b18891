"""
Attention over a cache, split among programs

This file implements project 8's decoding steps on the split-KV kernel following:
- "Flash-Decoding for long-context inference" (Dao et al., 2023) - keys shared out among programs

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence

from torch import Tensor

from phase1_foundation.project3_pretrain.plans import LayerSpec
from phase3_core_inference.project8_kv_cache.attention import by_length
from phase3_core_inference.project8_kv_cache.kv_cache import ContiguousCache
from phase3_core_inference.project9_flash_attention.decoding import flash_decode


def split_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, ends: Tensor | None = None) -> Tensor:
    """How queries read a cache: one a row by `flash_decode`, several as project 8 does; a `CacheKernel`.

    PAPER: "Flash-Decoding for long-context inference" (Dao et al., 2023).
    PAPER CONTEXT: the cache is read once, by enough programs to keep the memory busy, whatever the batch.
    INTUITION: the reader asks for pages up to a number, not for a map of every page that there is.
    IMPLEMENTATION: `ends` in place of `bias`: what lies behind a row's end is not read at all, where a mask has it read
        and thrown away. Layers with windows, and steps of several tokens, are left to project 8's kernels.
    WHY: a cache has room for more than is in it, and rows of a batch are not equally long.

    q (R, T, H, D), k (R, Hkv, S, D), v (R, Hkv, S, Dv), bias (R, T, S), ends (R,) -> (R, T, H, Dv).
    """
    if q.shape[1] > 1 or ends is None:
        return by_length(q, k, v, bias, scale)
    return flash_decode(q.squeeze(1), k.transpose(1, 2), v.transpose(1, 2), ends, scale).unsqueeze(1)


def flash_cache(specs: Sequence[LayerSpec], n_rows: int, capacity: int, **options) -> ContiguousCache:
    """Project 8's contiguous cache on `split_attention`: `generate.py --cache flash`."""
    return ContiguousCache(specs, n_rows, capacity, kernel=split_attention, **options)
