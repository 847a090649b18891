"""
Sampling

This file implements drawing the next token of every request in a batch following:
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - temperature and nucleus (top-p) sampling
- "Hierarchical Neural Story Generation" (Fan et al., 2018) - top-k sampling

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phase3_core_inference.project8_kv_cache.noise import gumbel, noise_keys
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make tokens that occurred less likely: logits (R, V), seen (R, V) bool, penalty (R, 1).

    >>> penalize(torch.tensor([[3.0, -3.0, 3.0]]), torch.tensor([[True, True, False]]), torch.tensor([[1.5]])).tolist()
    [[2.0, -4.5, 3.0]]
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def cut_tail(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set to -inf what may not be drawn: logits (R, V), each limit (R, 1).

    PAPER: "Hierarchical Neural Story Generation", arXiv:1805.04833 (top-k); "The Curious Case of Neural Text
        Degeneration", arXiv:1904.09751, section 3.1, equations 2 and 3 (top-p).
    PAPER CONTEXT: top-k keeps a fixed number; the nucleus is the smallest set of likeliest tokens that reaches p.
    INTUITION: from a sorted list, three fences: a number, a share of the odds, a fraction of the best.
    IMPLEMENTATION: one sort serves all; each fence is a value in the sorted row, and what lies below the highest goes.
        Ties with the k-th stay; the nucleus is measured within the k. min-p: probability >= min_p times the largest.
    WHY: a batch holds requests with other limits each, and rows of a tensor can not branch.

    >>> logits, none = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), torch.tensor([[0.0]])
    >>> cut_tail(logits, torch.tensor([[4]]), torch.tensor([[0.6]]), none).isfinite().tolist()
    [[True, True, False, False]]
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, top_k - 1), -torch.inf)
    probabilities = ordered.softmax(-1)
    # A token stays while those before it do not yet reach p; the first one always does.
    # Rounding may let the sum reach 1 too early, so p = 1 is asked for.
    gone = (probabilities.cumsum(-1) - probabilities >= top_p) & (top_p < 1)
    gone[..., 0] = False
    gone |= probabilities < min_p * probabilities[..., :1]
    return logits.masked_fill(gone.logical_or_(ordered == -torch.inf).scatter(-1, order, gone), -torch.inf)


@dataclass(frozen=True)
class Drawn:
    """What was drawn for each request of a batch: on the host."""

    tokens: list[int]
    logprobs: list["Logprobs | None"]


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of one token, by the model itself: before penalty, temperature and cuts."""

    chosen: float
    top: list[tuple[int, float]]  # (token, log-probability) of the likeliest ones, best first


class Sampler:
    """Draws for a batch of requests, each with its own parameters.

    PAPER: "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, section 3.
    PAPER CONTEXT: the next token is drawn from the truncated, renormalised distribution.
    INTUITION: one dealer at many tables, each with its own rules and its own pack of cards.
    IMPLEMENTATION: parameters are columns (R, 1). The host knows which requests want what, and skips what none does: a
        batch of greedy ones is an argmax. Drawing is Gumbel-max: the argmax of log p + noise.
    WHY: one launch for the batch, and nothing of a request depends on who shares it.

    Args:
        params, seeds: of each request; prompts: their tokens (the penalty counts them); vocab_size: of the tokenizer.
    """

    def __init__(self, params: Sequence[SamplingParams], seeds, prompts, vocab_size: int, device):
        self.params, self.seeds, self.vocab_size, self.device = params, seeds, vocab_size, device
        self.seen = None
        if any(p.repetition_penalty != 1.0 for p in params):
            self.seen = torch.zeros(len(params), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in zip(self.seen, prompts):
                row[torch.tensor(prompt, device=device)] = True
        as_column = lambda values: torch.tensor(values, device=device).unsqueeze(-1)  # noqa: E731
        self.penalty = as_column([p.repetition_penalty for p in params])
        self.temperature = as_column([p.temperature or 1.0 for p in params])
        self.top_k = as_column([min(p.top_k or vocab_size, vocab_size) for p in params])
        self.top_p = as_column([1.0 if p.top_p is None else p.top_p for p in params])
        self.min_p = as_column([p.min_p or 0.0 for p in params])
        self.drawing = as_column([not p.greedy for p in params])

    def draw(self, logits: Tensor, requests: Sequence[int], positions: Sequence[int]) -> Drawn:
        """Draw from logits (R, V) for these requests, whose tokens will stand at these positions."""
        params = [self.params[i] for i in requests]
        logits = raw = logits[:, : self.vocab_size].float()  # padding of the vocabulary is no token
        everyone = list(requests) == list(range(len(self.params)))
        index = slice(None) if everyone else torch.tensor(requests, device=self.device)
        if self.seen is not None:
            logits = penalize(logits, self.seen[index], self.penalty[index])
        if not all(p.greedy for p in params):
            logits = self._with_noise(logits, params, index, requests, positions)
        tokens = logits.argmax(-1)  # (R,)
        if self.seen is not None:
            rows = torch.tensor(requests, device=self.device)
            self.seen[rows, tokens] = True
        return Drawn(tokens.tolist(), self._logprobs(raw, tokens, params))

    def _with_noise(self, logits, params, index, requests, positions) -> Tensor:
        # The largest logit becomes 0 first: a tiny temperature then cannot overflow.
        scaled = (logits - logits.amax(-1, keepdim=True)) / self.temperature[index]
        if any(p.cuts for p in params):
            cut = cut_tail(scaled, self.top_k[index], self.top_p[index], self.min_p[index])
            scaled = torch.where(self.drawing[index], cut, scaled)
        keys = torch.tensor(noise_keys([self.seeds[i] for i in requests], positions), device=self.device)
        return torch.where(self.drawing[index], scaled + gumbel(keys, self.vocab_size), logits)

    def _logprobs(self, logits, tokens, params) -> list[Logprobs | None]:
        if all(p.logprobs is None for p in params):
            return [None] * len(params)
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist()
        top = logprobs.topk(min(max(p.logprobs or 0 for p in params), self.vocab_size), dim=-1)
        best = [list(zip(ids, values)) for ids, values in zip(top.indices.tolist(), top.values.tolist())]
        return [
            None if p.logprobs is None else Logprobs(own, pairs[: p.logprobs])
            for p, own, pairs in zip(params, chosen, best)
        ]
