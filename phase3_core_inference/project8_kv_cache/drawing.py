"""
Drawing

This file implements drawing a token from each row of logits, on the device alone, following:
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - temperature and nucleus (top-p) sampling
- "Hierarchical Neural Story Generation" (Fan et al., 2018) - top-k sampling

Each component is explained with paper references for educational purposes.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from common.graphs import capture
from phase3_core_inference.project8_kv_cache.noise import gumbel

CANDIDATES = 1024  # tokens of a row that are looked at first, where tails are cut


def cut_tail(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, share: Tensor | None = None) -> Tensor:
    """Set to -inf what may not be drawn: logits (R, n), each limit (R, 1).

    PAPER: "Hierarchical Neural Story Generation", arXiv:1805.04833 (top-k); "The Curious Case of Neural Text
        Degeneration", arXiv:1904.09751, section 3.1, equations 2 and 3 (top-p).
    PAPER CONTEXT: top-k keeps a fixed number; the nucleus is the smallest set of likeliest tokens that reaches p.
    INTUITION: from a sorted list, three fences: a number, a share of the odds, a fraction of the best.
    IMPLEMENTATION: one sort serves all; each fence is a value in the sorted row, and what lies below the highest goes.
        Ties with the k-th stay; the nucleus is measured within the k. min-p: probability >= min_p times the largest.
    WHY: a batch holds requests with other limits each, and rows of a tensor can not branch.

    Args:
        share: (R, 1), the part of the odds that these tokens have, where others were left out before; a top_k above n
            then means that there is none.

    >>> logits, none = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), torch.tensor([[0.0]])
    >>> cut_tail(logits, torch.tensor([[4]]), torch.tensor([[0.6]]), none).isfinite().tolist()
    [[True, True, False, False]]
    """
    n = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, top_k.clamp(max=n) - 1), -torch.inf)
    probabilities = ordered.softmax(-1)
    if share is not None:
        probabilities = torch.where(top_k > n, share * probabilities, probabilities)
    # A token stays while those before it do not yet reach p; the first one always does.
    # Rounding may let the sum reach 1 too early, so p = 1 is asked for.
    gone = (probabilities.cumsum(-1) - probabilities >= top_p) & (top_p < 1)
    gone[..., 0] = False
    gone |= probabilities < min_p * probabilities[..., :1]
    return logits.masked_fill(gone.logical_or_(ordered == -torch.inf).scatter(-1, order, gone), -torch.inf)


def draw_among(n: int, cuts: bool, logits: Tensor, limits: Tensor, keys: Tensor) -> Tensor:
    """Draw from the n likeliest tokens of each row; -1 where what the cuts leave may reach beyond them.

    PAPER: "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, section 3.
    PAPER CONTEXT: the next token is drawn from the truncated, renormalised distribution.
    INTUITION: whoever is out of the race after the first look need not be dealt a card.
    IMPLEMENTATION: Gumbel-max, the argmax of log p + noise. The nucleus is measured against all of the odds, also where
        only n tokens are sorted. Whether n were enough is seen from the row itself, never from its neighbours.
    WHY: sorting a whole vocabulary, and noise for all of it, cost more than what they are needed for.

    Args:
        n: of V; cuts: whether any row wants its tail cut (fewer than all are always cut).
        logits (R, V) float32; keys (R, 1) int64.
        limits: (R, 5) float32: temperature, top_k (exact below 2^24), top_p, min_p, and what noise is multiplied by.

    Returns the tokens (R,).
    """
    temperature, top_k, top_p, min_p, luck = limits.split(1, dim=-1)
    top_k, V = top_k.long(), logits.shape[-1]
    # The largest logit becomes 0 first: a tiny temperature then cannot overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    if n == V:
        noise = luck * gumbel(keys, torch.arange(V, device=logits.device))
        return ((cut_tail(scaled, top_k, top_p, min_p) if cuts else scaled) + noise).argmax(-1)
    # In the order of their ids, so that equal logits keep the order that they have in the whole row.
    ids = scaled.topk(n, sorted=False).indices.sort().values  # (R, n)
    likeliest = scaled.gather(-1, ids)
    share = scaled.softmax(-1).gather(-1, ids).sum(-1, keepdim=True)
    cut = cut_tail(likeliest, top_k, top_p, min_p, share)
    # Others may be as likely as the last candidate: it must have been cut, and lie below the k-th, whose equals stay.
    least = likeliest.amin(-1, keepdim=True)
    last = cut.masked_fill(likeliest > least, -torch.inf).amax(-1, keepdim=True)
    kth = likeliest.topk(n).values.gather(-1, top_k.clamp(max=n) - 1)
    settled = (last == -torch.inf) & ((top_k == V) | ((top_k <= n) & ((kth > least) | (least == -torch.inf))))
    best = (cut + luck * gumbel(keys, ids)).argmax(-1, keepdim=True)
    return torch.where(settled, ids.gather(-1, best), -1).squeeze(-1)


class RecordedDraws:
    """`draw_among`, recorded into a CUDA graph for each number of rows (elsewhere than on a GPU it is just called).

    PAPER: "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, section 3; recording is practice.
    PAPER CONTEXT: a draw follows every step of the model.
    INTUITION: seventy small orders are given at once, in one letter that was written before.
    IMPLEMENTATION: rows are filled up to a power of two, so that few graphs serve all batches. Rows whose candidates
        were not enough are drawn without.
    WHY: launched one by one from Python, drawing takes three times as long as the GPU needs for it.
    """

    def __init__(self):
        self._recorded = {}

    def __call__(self, n: int, cuts: bool, logits: Tensor, limits: Tensor, keys: Tensor) -> Tensor:
        """As `draw_among`; the result lies in a buffer that the next call overwrites."""
        R, V = logits.shape
        if cuts and n == V:  # seldom, and with any number of rows: not worth a graph
            return draw_among(n, cuts, logits, limits, keys)
        filled = (1 << (R - 1).bit_length()) - R
        arguments = [F.pad(x, (0, 0, 0, filled), value=1) if filled else x for x in (logits, limits, keys)]
        key = (n, cuts, *arguments[0].shape)
        if key not in self._recorded:
            self._recorded[key] = capture(functools.partial(draw_among, n, cuts), *arguments)
        return self._recorded[key](*arguments)[:R]
