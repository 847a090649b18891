"""
The idea, to read

This file implements a cache of keys and values in as few lines as the idea has, following:
- "Fast Transformer Decoding: One Write-Head is All You Need" (Shazeer, 2019) - incremental attention, and what it reads
- "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context" (Dai et al., 2019) - states of what was read
  are kept and not computed again

Each component is explained with paper references for educational purposes.
"""

import torch
from torch import Tensor


def attend_with_past(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """New queries over all keys so far.

    PAPER: "Fast Transformer Decoding: One Write-Head is All You Need", arXiv:1911.02150, sections 2.4 and 3 (one head
        of keys and values for several of queries).
    PAPER CONTEXT: decoding is the same attention, one query at a time; the keys and values of before are only read.
    INTUITION: the past does not change when a word is added, so nobody needs to look at it from its own place again.
    IMPLEMENTATION: the n queries stand at the end of the S keys: query i is at position S - n + i and sees up to there.
    WHY: the definition that the fast plans are tested against.

    q (n, H, D), k (S, Hkv, D), v (S, Hkv, Dv) -> (n, H, Dv)
    """
    n, S, group = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (S, H, D)
    scores = torch.einsum("nhd,shd->hns", q, k) * scale
    there, here = torch.arange(S, device=q.device), torch.arange(S - n, S, device=q.device).unsqueeze(-1)
    seen = (there <= here) & (there > here - (window or S + 1))
    return torch.einsum("hns,shd->nhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


class GrowingCache:
    """The plan of one sequence that grows: what is new is appended to what was kept.

    PAPER: "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", arXiv:1901.02860, section 3.2.
    PAPER CONTEXT: states of the past segment are cached and read by the next: evaluation up to 1,800+ times faster.
    INTUITION: a reader's notes: each page is read once, then only the notes are looked at.
    IMPLEMENTATION: one (k, v) a layer, joined by `torch.cat`. Here keys and values are kept rather than hidden states:
        with rotations by absolute position they stay right wherever they are read from.
    WHY: without it, token T costs a forward of T tokens; with it, a forward of one.
    """

    def __init__(self, specs):
        self.specs, self.length, self.past = specs, 0, [None] * len(specs)
        self.positions = torch.empty(0, dtype=torch.long)

    def advance(self, n: int) -> "GrowingCache":
        """The plan for the next n tokens."""
        self.positions = torch.arange(self.length, self.length + n)
        self.length += n
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append, then attend."""
        if self.past[layer] is not None:
            k, v = (torch.cat(pair) for pair in zip(self.past[layer], (k, v)))
        self.past[layer] = k, v
        return attend_with_past(q, k, v, self.specs[layer].scale, self.specs[layer].window)

    def select(self, x: Tensor) -> Tensor:
        """All rows."""
        return x
