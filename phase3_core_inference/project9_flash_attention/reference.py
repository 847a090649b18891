"""
Tiled attention

This file implements exact attention without the matrix of scores, in plain PyTorch, following:
- "Online normalizer calculation for softmax" (Milakov & Gimelshein, 2018) - the softmax in one pass
- "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness" (Dao et al., 2022) - tiles, and a
  backward that computes the probabilities anew
- "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (Dao, 2023) - the loops' order

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


class OnlineSoftmax:
    """A softmax-weighted sum whose scores come in parts.

    PAPER: "Online normalizer calculation for softmax", arXiv:1805.02867, algorithm 3; FlashAttention-2, section 3.1.1.
    PAPER CONTEXT: m = max(m_old, max(x)), d = d_old e^(m_old - m) + sum(e^(x - m)).
    INTUITION: a running tournament: when a higher score comes, all that was counted shrinks by the same factor.
    IMPLEMENTATION: maximum, sum and weighted values per row; the division is done once, at the end (FlashAttention-2).
    WHY: the exact softmax, though no row of scores is ever there as a whole.

    >>> softmax = OnlineSoftmax((1,), 1, torch.float64, "cpu")
    >>> for scores, values in (([0.0, 1.0], [1.0, 2.0]), ([3.0], [4.0])):
    ...     softmax.update(torch.tensor([scores]), torch.tensor(values).double().unsqueeze(-1))
    >>> exact = torch.tensor([0.0, 1.0, 3.0]).double().softmax(0) @ torch.tensor([1.0, 2.0, 4.0]).double()
    >>> torch.allclose(softmax.finish()[0], exact)
    True
    """

    def __init__(self, shape, value_size: int, dtype: torch.dtype, device):
        self.top = torch.full((*shape, 1), -torch.inf, dtype=dtype, device=device)  # m
        self.total = torch.zeros((*shape, 1), dtype=dtype, device=device)  # l
        self.values = torch.zeros((*shape, value_size), dtype=dtype, device=device)  # O, not yet divided

    def update(self, scores: Tensor, values: Tensor) -> None:
        """Take in scores (..., M, N), -inf where nothing is seen, and values (..., N, Dv)."""
        higher = torch.maximum(self.top, scores.amax(dim=-1, keepdim=True))
        base = higher.masked_fill(higher == -torch.inf, 0.0)  # a row that has seen nothing yet: -inf - -inf is NaN
        p = (scores - base).exp()
        shrink = (self.top - base).exp()
        self.total = self.total * shrink + p.sum(dim=-1, keepdim=True)
        self.values = self.values * shrink + p.to(values.dtype) @ values
        self.top = higher

    def finish(self) -> tuple[Tensor, Tensor]:
        """The weighted mean (..., M, Dv) and the natural log-sum-exp (..., M)."""
        return self.values / self.total, (self.top + self.total.log()).squeeze(-1)


def lower_bounds(T: int, window: int | None, starts: Tensor | None, device) -> Tensor | None:
    """The first key that each query sees, (B or 1, T) int32; None where that is 0 for all.

    PAPER: "Longformer: The Long-Document Transformer", arXiv:2004.05150, section 3.1 (sliding window).
    PAPER CONTEXT: each token attends to a fixed number of neighbours.
    INTUITION: a window and the beginning of a document are the same thing to a query: a wall behind it.
    IMPLEMENTATION: max(i - window + 1, starts[i], 0); it never falls from one query to the next.
    WHY: one number a row tells a tile where its loop begins, so what is not seen is not computed either.

    >>> lower_bounds(5, 2, torch.tensor([[0, 0, 2, 2, 2]]), "cpu").tolist()
    [[0, 0, 2, 2, 3]]
    """
    if starts is None and (window is None or window >= T):
        return None
    lower = torch.zeros(1, T, dtype=torch.int32, device=device)
    if window is not None:
        lower = (torch.arange(T, dtype=torch.int32, device=device) - (window - 1)).clamp(min=0).unsqueeze(0)
    if starts is not None:
        lower = torch.maximum(lower, starts.reshape(-1, T).to(torch.int32))
    return lower


def walk(first: int, last: int, lower: Tensor | None, T: int, causal: bool, n: int) -> Iterator[tuple[int, int, str]]:
    """The tiles of keys that the queries [first, last) meet: (begin, end, "skipped" | "full" | "masked").

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, 3.1.1.
    PAPER CONTEXT: blocks in which all columns are past all rows are skipped; most of the others need no mask.
    INTUITION: a staircase of tiles: air above it, solid stone below, and an edge that has to be cut.
    IMPLEMENTATION: a tile is full if its keys are behind the first query and not before the highest lower bound.
    WHY: about half of the work of a causal row, and all but a window's width of a windowed one, is never done.

    >>> [kind for _, _, kind in walk(4, 8, None, 12, True, 4)]
    ['full', 'masked', 'skipped']
    """
    low, high = (0, 0) if lower is None else (int(lower[:, first:last].min()), int(lower[:, first:last].max()))
    for begin in range(0, T, n):
        end = min(begin + n, T)
        if end <= low or (causal and begin >= last):
            yield begin, end, "skipped"
        elif begin >= high and (not causal or end <= first + 1):
            yield begin, end, "full"
        else:
            yield begin, end, "masked"


def _hide(scores: Tensor, rows: tuple, keys: tuple, lower: Tensor | None, causal: bool) -> Tensor:
    """Scores (B, Hkv, G, M, N) with -inf where a query does not see a key."""
    i = torch.arange(*rows, device=scores.device).unsqueeze(-1)
    j = torch.arange(*keys, device=scores.device)
    seen = j <= i if causal else torch.ones_like(j <= i)
    if lower is not None:
        seen = seen & (j >= lower[:, rows[0] : rows[1], None])[:, None, None]  # (B, 1, 1, M, N)
    return scores.masked_fill(~seen, -torch.inf)


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """(B, T, H, D) -> (B, Hkv, G, T, D): the query heads of one key head side by side."""
    return q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)


def _flat(x: Tensor) -> Tensor:
    """(B, Hkv, G, T, D) -> (B, T, H, D)."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, lower: Tensor | None, scale: float, causal: bool, m: int = 128, n: int = 128
) -> tuple[Tensor, Tensor]:
    """Attention tile by tile: o (B, T, H, Dv) and the log-sum-exp of each row (B, H, T), at least float32.

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, alg. 1.
    PAPER CONTEXT: for each block of queries, loop over blocks of keys; keep O, m and l; write O and L once.
    INTUITION: keep your own rows on the desk and have the library carried past, shelf by shelf.
    IMPLEMENTATION: q (B, T, H, D), k (B, T, Hkv, D), v (B, T, Hkv, Dv); `m` queries against `n` keys at a time.
    WHY: the scores need m x n numbers instead of T x T: memory grows with T, not with its square.
    """
    B, T, H, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = _grouped(q, k), k.transpose(1, 2).unsqueeze(2), v.transpose(1, 2).unsqueeze(2)  # (B, Hkv, G or 1, T, D)
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = torch.empty(q.shape[:-1], dtype=wide, device=q.device)
    for first in range(0, T, m):  # line 3
        last = min(first + m, T)
        softmax = OnlineSoftmax((*q.shape[:3], last - first), v.shape[-1], wide, q.device)  # line 5
        for begin, end, kind in walk(first, last, lower, T, causal, n):  # line 6
            if kind == "skipped":
                continue
            scores = (q[..., first:last, :] @ k[..., begin:end, :].mT).to(wide) * scale  # line 8
            if kind == "masked":
                scores = _hide(scores, (first, last), (begin, end), lower, causal)
            softmax.update(scores, v[..., begin:end, :])  # lines 9-10
        rows, lse[..., first:last] = softmax.finish()  # lines 12-13
        o[..., first:last, :] = rows.to(o.dtype)
    o = _flat(o)
    # PyTorch 2.11 compiles a forward that ends in a `contiguous` that does nothing to one with gradients of zero
    return o if o.is_contiguous() else o.contiguous(), lse.reshape(B, H, T)


def tiled_backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lower: Tensor | None,
    scale: float, causal: bool, m: int = 128, n: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `tiled_forward`, tile by tile: dq, dk, dv, shaped like q, k, v.

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, alg. 2.
    PAPER CONTEXT: P = e^(S - L); dV += P^T dO; dS = P * (dO V^T - delta); dQ += dS K; dK += dS^T Q.
    INTUITION: rather than file T x T probabilities, remember how to compute them: one number a row is enough.
    IMPLEMENTATION: `dlse` (B, H, T) is what flows into the log-sum-exp (whoever merges parts needs it); gradients are
        summed in float32; key heads collect what their group of query heads sends.
    WHY: a backward that stored P would bring back the memory that the forward has saved.
    """
    T, wide = q.shape[1], lse.dtype
    delta = (do.to(wide) * o.to(wide)).sum(dim=-1).transpose(1, 2) - dlse  # (B, H, T), line 4
    q, do = _grouped(q, k), _grouped(do, k)
    k, v = k.transpose(1, 2).unsqueeze(2), v.transpose(1, 2).unsqueeze(2)
    lse, delta = (x.reshape(q.shape[:-1]).unsqueeze(-1) for x in (lse, delta))  # (B, Hkv, G, T, 1)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    for first in range(0, T, m):
        rows = slice(first, min(first + m, T))
        for begin, end, kind in walk(first, rows.stop, lower, T, causal, n):
            if kind == "skipped":
                continue
            keys = slice(begin, end)
            scores = (q[..., rows, :] @ k[..., keys, :].mT).to(wide) * scale
            if kind == "masked":
                scores = _hide(scores, (first, rows.stop), (begin, end), lower, causal)
            p = (scores - lse[..., rows, :]).exp()  # line 11
            dv[..., keys, :] += (p.to(do.dtype).mT @ do[..., rows, :]).sum(2, keepdim=True)  # line 12
            dp = (do[..., rows, :] @ v[..., keys, :].mT).to(wide)  # line 13
            ds = (p * (dp - delta[..., rows, :])).to(q.dtype)  # line 14
            dq[..., rows, :] += ds @ k[..., keys, :]  # line 15
            dk[..., keys, :] += (ds.mT @ q[..., rows, :]).sum(2, keepdim=True)  # line 16
    dk, dv = (x.squeeze(2).transpose(1, 2) for x in (dk * scale, dv))
    return tuple(x.to(q.dtype).contiguous() for x in (_flat(dq * scale), dk, dv))


class TiledAttention(torch.autograd.Function):
    """`tiled_forward` with `tiled_backward`: what is kept between them is q, k, v, o and one number a row.

    PAPER: "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", arXiv:2205.14135, section 3.1.
    PAPER CONTEXT: recomputation: with O and the softmax statistics, S and P are computed anew in the backward.
    INTUITION: a cheap calculation twice beats a walk to the archive.
    IMPLEMENTATION: more FLOPs, fewer bytes; faster on a GPU, where bytes are what costs.
    WHY: autograd on the loops of the forward would keep every tile.
    """

    @staticmethod
    def forward(ctx, q, k, v, lower, scale, causal, m, n):
        """Compute and keep the little that the backward needs."""
        o, lse = tiled_forward(q, k, v, lower, scale, causal, m, n)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.lower, ctx.rest = lower, (scale, causal, m, n)
        return o

    @staticmethod
    def backward(ctx, do):
        """Do -> dq, dk, dv."""
        q, k, v, o, lse = ctx.saved_tensors
        grads = tiled_backward(do, torch.zeros_like(lse), q, k, v, o, lse, ctx.lower, *ctx.rest)
        return (*grads, None, None, None, None, None)


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, starts: Tensor | None = None,
    causal: bool = True, m: int = 128, n: int = 128,
) -> Tensor:  # fmt: skip
    """Exact attention in tiles; the signature of project 3's `plans.Kernel`, for `model.use_attention`.

    PAPER: "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", arXiv:2205.14135, theorem 1.
    PAPER CONTEXT: O = softmax(Q K^T) V with O(N^2 d) FLOPs and O(N) memory beyond inputs and output.
    INTUITION: the same answer as ever; only the scratch paper is smaller.
    IMPLEMENTATION: leading dimensions become one; windows and documents become lower bounds; then `TiledAttention`.
    WHY: the reference that the Triton kernels are held against, and the lesson to read first.

    Args:
        q, k, v: (..., T, H, D), (..., T, Hkv, D), (..., T, Hkv, Dv); Hkv divides H.
        m, n: queries and keys of a tile.

    >>> x = torch.randn(1, 5, 2, 4, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(tiled_attention(x, x, x, scale=0.5, m=2, n=2)[0, 0], x[0, 0])   # the first sees itself alone
    True
    """
    check_shapes(q, k, v, starts)
    T = q.shape[-3]
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
    if starts is not None:
        starts = starts.expand(q.shape[:-2])
    o = TiledAttention.apply(*flat, lower_bounds(T, window, starts, q.device), scale, causal, m, n)
    return o.reshape(*q.shape[:-1], v.shape[-1])


def check_shapes(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None) -> None:
    """Refuse what is no self-attention of grouped heads: ValueError with the shapes."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim < 3 or q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{shapes}: pass q (..., T, H, D), k (..., T, Hkv, D) and v (..., T, Hkv, Dv) of equal T")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{shapes}: {q.shape[-2]} query heads are no multiple of {k.shape[-2]} key heads: repeat keys")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v of types {q.dtype}, {k.dtype}, {v.dtype}: convert them to one, v's, say")
    if starts is not None and starts.shape[-1] != q.shape[-3]:
        raise ValueError(f"starts {tuple(starts.shape)} must hold one number for each of the {q.shape[-3]} tokens")
