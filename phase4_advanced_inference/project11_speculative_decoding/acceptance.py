"""
Acceptance

This file implements which drafted tokens are kept, and what stands in place of the first that is not, following:
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - speculative sampling
- "Accelerating Large Language Model Decoding with Speculative Sampling" (Chen et al., 2023) - modified rejection
  sampling

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from phase3_core_inference.project8_kv_cache.buffers import on_device
from phase3_core_inference.project8_kv_cache.drawing import cut_tail
from phase3_core_inference.project8_kv_cache.noise import gumbel, noise_keys, scramble, uniform

DRAFT, LUCK, DEAL = 1, 2, 3  # what noise is for: the draft's draw, keep or reject, the draw that follows


def odds_of(cuts: bool, logits: Tensor, limits: Tensor) -> Tensor:
    """What a request really draws from, (R, V): after temperature and cuts (the penalty came before).

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, section 2.2.
    PAPER CONTEXT: argmax, top-k, nucleus and temperature are all sampling, from a changed distribution.
    INTUITION: compare what is dealt, not the whole pack.
    IMPLEMENTATION: project 8's cuts over all tokens, then softmax; greedy is 1 on the first of the likeliest tokens.
    WHY: with the raw probabilities the rule would be exact for a text that nobody asked for.

    Args:
        cuts: whether any row has its tail cut; logits (R, V) float32; limits (R, 5) as of `draw_among`.
    """
    temperature, top_k, top_p, min_p, luck = limits.split(1, dim=-1)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    best = certain(logits.argmax(-1), logits)
    odds = (cut_tail(scaled, top_k.long(), top_p, min_p) if cuts else scaled).softmax(-1)
    return torch.where(luck == 0, best, odds)


def acceptance(p: Tensor, q: Tensor, drafts: Tensor) -> Tensor:
    """The probability to keep each drafted token: min(1, p / q); p, q (..., V), drafts (...) -> (...).

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, section 2.3.
    PAPER CONTEXT: a sample x of q is kept if q(x) <= p(x), and otherwise rejected with probability 1 - p(x) / q(x).
    INTUITION: what the draft says too often is struck out as often as it is too much.
    IMPLEMENTATION: one gather of each; a token that q could not have drawn (padding) is never kept.
    WHY: summed over x this keeps min(p, q), the most that any rule can keep: what is common to both.

    >>> acceptance(torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.8]), torch.tensor(1)).item()
    0.625
    """
    theirs, own = (x.gather(-1, drafts.unsqueeze(-1)).squeeze(-1) for x in (p, q))
    return torch.where(own > 0, (theirs / own.clamp(min=1e-38)).clamp(max=1.0), 0.0)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Where the token in place of a rejected one is drawn from: norm(max(0, p - q)).

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, section 2.3, appendix A.1.
    PAPER CONTEXT: p'(x) = norm(max(0, p(x) - q(x))); together with what was kept this is p.
    INTUITION: the draft filled a part of every glass; what is missing is poured from the rest.
    IMPLEMENTATION: all zero only where p and q differ by rounding alone: p itself then. With q = 0 it is p.
    WHY: drawing from p here instead is the classic mistake: what draft and target both like would come too often.

    >>> residual(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7, 0.1])).tolist()
    [0.75, 0.0, 0.25]
    """
    rest = (p - q).clamp(min=0.0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp(min=1e-38), p)


def verify(p: Tensor, q: Tensor, drafts: Tensor, counts: Tensor, luck: Tensor, deal: Tensor) -> tuple[Tensor, Tensor]:
    """Keep what can be kept of every row's draft, and draw one token more.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, algorithm 1; "Accelerating
        Large Language Model Decoding with Speculative Sampling", arXiv:2302.01318, algorithm 2.
    PAPER CONTEXT: tokens are kept up to the first rejection, in whose place one is drawn; after none, one more is.
    INTUITION: read the guess up to the first wrong word, write the right one there, and hand it back.
    IMPLEMENTATION: a cumulative product finds the first rejection. Both cases are one draw (argmax of log probability
        plus Gumbel noise): behind a draft that was kept whole q counts as 0.
    WHY: every step brings at least one token, and each is distributed as if the target had drawn it.

    Args:
        p: (R, K+1, V), the target's odds at every drafted place and behind; q: (R, K, V), the draft's.
        drafts: (R, K) tokens; counts: (R,), how many of them are real.
        luck: (R, K) int64 keys of the noise that keeps or rejects; deal: (R, K+1), of that which draws.

    Returns (kept (R,), tokens (R,)): how many drafted tokens stay, and the one that follows them.
    """
    R, K = drafts.shape
    u = uniform(luck.reshape(-1, 1)).view(R, K)
    stays = (u <= acceptance(p[:, :K], q, drafts)) & (torch.arange(K, device=p.device) < counts.unsqueeze(-1))
    kept = stays.long().cumprod(-1).sum(-1)  # (R,)
    row = torch.arange(R, device=p.device)
    theirs = torch.where((kept < counts).unsqueeze(-1), q[row, kept.clamp(max=K - 1)], 0.0)  # (R, V)
    rest = residual(p[row, kept], theirs)
    return kept, draw(rest, deal[row, kept].unsqueeze(-1))


def keys_for(purpose: int, seeds: Sequence[int], positions: Sequence[int], device) -> Tensor:
    """One int64 for each (seed, position): of noise that is for this purpose, and independent of any other's."""
    keys = noise_keys([scramble(seed + (purpose << 32)) for seed in seeds], positions)
    return on_device(keys, device)


def certain(tokens: Tensor, like: Tensor) -> Tensor:
    """Probabilities (..., V) that are all on one token (...), shaped like others."""
    return torch.zeros_like(like).scatter(-1, tokens.unsqueeze(-1), 1.0)


def draw(odds: Tensor, keys: Tensor) -> Tensor:
    """One token from each row of probabilities (R, V), by noise of keys (R, 1)."""
    return (odds.log() + gumbel(keys, torch.arange(odds.shape[-1], device=odds.device))).argmax(-1)


def propose(cuts: bool, logits: Tensor, limits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """How a draft draws where its odds are needed afterwards: (odds (R, V), tokens (R,))."""
    odds = odds_of(cuts, logits, limits)
    return odds, draw(odds, keys)


def judge(cuts: bool, logits: Tensor, limits: Tensor, q: Tensor, drafts: Tensor, *rest: Tensor):
    """`verify` from logits (R (K+1), V); q of one place (R, K, 1) stands for drafts that are certain."""
    p = odds_of(cuts, logits, limits).view(len(drafts), -1, logits.shape[-1])
    if q.shape[-1] == 1:  # a point distribution: all of it on the drafted token
        q = certain(drafts, p[:, :-1])
    return verify(p, q, drafts, *rest)
